"""Graceful shutdown on Ctrl-C, SIGTERM, SIGHUP and SIGUSR1.

SIGUSR1 is what schedulers such as SLURM send before the time limit of a job.

The first signal lets the current step finish, so that its state can be saved; the second exits
immediately. Both are noticed even while a long operation keeps the interpreter from running its
signal handlers.
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
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
_NO_SIGNAL = b"\0"
_SHOW_CURSOR = b"\x1b[?25h"
_PARENT_SECONDS = 1.0  # interval at which a worker checks whether its parent is alive
_DUPLICATE_SECONDS = 0.3  # a terminal and a parent that forwards signals may both send one


class InterruptedBySignal(KeyboardInterrupt):
    """A signal asked the process to stop.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code by shell convention: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.number


def exit_code_of(interruption: KeyboardInterrupt) -> int:
    """Return the exit code of a process that was interrupted, by a signal or by Ctrl-C."""
    has_number = isinstance(interruption, InterruptedBySignal)
    return interruption.exit_code if has_number else 128 + signal.SIGINT


class StopRequest:
    """Whether a signal has asked the process to stop.

    Attributes:
        number: the number of the first signal received; None if none was.
        deferring: whether signals are only recorded in `number`, not raised.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals in a with block; the caller checks `number` and shuts down."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        self.check()

    def check(self) -> None:
        """Raise if a signal was received.

        Raises:
            InterruptedBySignal: a signal was received.
        """
        if self.number is not None:
            raise InterruptedBySignal(self.number)


@contextmanager
def handling_signals(say: Callable[[str], None] = lambda line: None) -> Iterator[StopRequest]:
    """Turn signals into `InterruptedBySignal`, immediately or, if deferred, later.

    A signal that the process ignores from its start, as under nohup, stays ignored. Outside the
    main thread, where Python cannot handle signals, this is a no-op.

    Args:
        say: called from another thread with a line that tells the user what a second signal does.
    """
    request = StopRequest()
    handled = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not handled:
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        request.number = request.number or number
        if not request.deferring:
            raise InterruptedBySignal(request.number)

    old_handlers = {number: signal.signal(number, handle) for number in handled}
    # Python writes the number of each signal to this socket, whatever the main thread is doing.
    incoming, outgoing = socket.socketpair()
    outgoing.setblocking(False)
    old_wakeup_fd = signal.set_wakeup_fd(outgoing.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(incoming, handled, request, say), daemon=True)
    watcher.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(old_wakeup_fd)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        outgoing.send(_NO_SIGNAL)  # closing does not suffice: a child process may hold it open
        watcher.join()
        outgoing.close()
        incoming.close()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals while child processes are started; the children inherit the mask.

    Windows has no such masks.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def leave_signals_to_parent() -> None:
    """Make a worker process ignore signals that are meant for its parent.

    A terminal signals the whole process group, but only the parent may act on it. The parent ends
    its workers with SIGTERM; a worker whose parent was killed exits by itself. Call this in a
    process that was started within `signals_blocked`.
    """
    signal.set_wakeup_fd(-1)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # also discards pending signals
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Torch's own watchdog takes the current parent for the original one, so it would wait forever
    # if the original parent was killed before the watchdog started.
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
    first_at = None
    while _NO_SIGNAL not in (numbers := incoming.recv(64)):
        for number in numbers:
            if number not in handled:
                continue
            now = time.monotonic()
            if first_at is not None and now - first_at > _DUPLICATE_SECONDS:
                _exit_now(number)
            if first_at is not None:
                continue
            first_at = now
            if request.deferring:
                request.number = request.number or number
                say(
                    "Stopping after this step. "
                    "Press Ctrl-C again to exit now (the last checkpoint is kept)."
                )


def _exit_now(number: int) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(128 + number)
