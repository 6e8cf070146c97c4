"""Ctrl-C and the signals that ask a process to end.

The first one lets the step under way come to its end, so that its state can be saved; the second
leaves at once. Both are seen as they come, even while a long operation keeps the interpreter from
running its own handlers.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_NO_SIGNAL = b"\0"
_SHOW_CURSOR = b"\x1b[?25h"
_PARENT_SECONDS = 1.0  # how often a worker looks whether its parent is there
_SAME_SECONDS = 0.3  # a terminal and a parent that passes signals on may both send the same one


class InterruptedBySignal(KeyboardInterrupt):  # as the built-in one
    """A signal asked the process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


def exit_code_of(interruption: KeyboardInterrupt) -> int:
    """Give the exit code of a process that was interrupted, by a signal or by Ctrl-C."""
    own = isinstance(interruption, InterruptedBySignal)
    return interruption.exit_code if own else 128 + signal.SIGINT


class StopRequest:
    """Whether somebody asked to stop.

    Attributes:
        number: of the first signal that came; None where none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is only noted; the caller looks at `number` and stops in good order."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        self.check()

    def check(self) -> None:
        """Stop here where it was asked for.

        Raises:
            InterruptedBySignal: it was.
        """
        if self.number is not None:
            raise InterruptedBySignal(self.number)


@contextmanager
def handling_signals(say: Callable[[str], None] = lambda line: None) -> Iterator[StopRequest]:
    """Turn signals into `InterruptedBySignal`, at once or, where that is deferred, later.

    A signal that the process was started to ignore, as under nohup, stays ignored. Elsewhere than
    in the main thread, where Python handles no signals, nothing happens.

    Args:
        say: told when a signal was noted and what a second one does; from another thread.
    """
    request = StopRequest()
    handled = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not handled:
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.number = request.number or number
        if not request.deferring:
            raise InterruptedBySignal(request.number)

    before = {number: signal.signal(number, note) for number in handled}
    # Python writes the number of a signal here as it comes, whatever the main thread is doing.
    incoming, outgoing = socket.socketpair()
    outgoing.setblocking(False)
    woken = signal.set_wakeup_fd(outgoing.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(incoming, handled, request, say), daemon=True)
    watch.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        outgoing.send(_NO_SIGNAL)  # closing it is no end while a child process has it as well
        watch.join()
        outgoing.close()
        incoming.close()


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait while processes are made, which then hold them back as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Put a process that works for another out of reach of what is sent to their group.

    A terminal sends its signals to a whole group; the parent alone decides what they mean. It ends
    its workers with SIGTERM, and a worker whose parent was killed ends by itself. To be called in a
    process that was made while signals were held.
    """
    signal.set_wakeup_fd(-1)
    os.setpgrp()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # those that came before, too
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Torch's own watch takes whoever is the parent when it begins for the right one, and so waits
    # for ever where the parent was killed before.
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    while os.getppid() == parent.pid:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _watch(
    incoming: socket.socket,
    handled: list[signal.Signals],
    request: StopRequest,
    say: Callable[[str], None],
) -> None:
    noted_at = None
    while _NO_SIGNAL not in (numbers := incoming.recv(64)):
        for number in numbers:
            if number not in handled:
                continue
            now = time.monotonic()
            if noted_at is not None and now - noted_at > _SAME_SECONDS:
                _leave_at_once(number)
            if noted_at is not None:
                continue
            noted_at = now
            if request.deferring:
                request.number = request.number or number
                say("Stopping after this step. Once more to leave at once, as saved last.")


def _leave_at_once(number: int) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(128 + number)
