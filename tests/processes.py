"""Run whole commands in separate processes, forked from a server that has imported everything.

The server imports torch, fastai and this package once, trains nothing, and forks for each command.
A command starts in milliseconds and is a process like any other, with its own signals, workers and
process group. It ends without the teardown of the interpreter, which takes half a second with so
many modules; threads are joined and exit handlers run as usual.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
import torch

from mixmo_fastai.runs.folder import RunFolder

PATIENCE = 60.0  # seconds until a process that says nothing counts as hung


class Server:
    """The process that forks."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.codes, self.heard = {}, b""

    def start(self, words, folder, *, script=None, prelude="", environment=None):
        """Start a command in a session of its own.

        Args:
            words: of the command line.
            folder: where it runs; its output goes to files below.
            script: path of a Python program to run in place of `mixmo`.
            prelude: Python that it executes first, to slow down what is to be caught.
            environment: more of it.
        """
        output = Path(folder) / f"output-{time.monotonic_ns()}"
        output.touch()
        order = {
            "words": [str(word) for word in words],
            "folder": str(folder),
            "output": str(output),
            "script": script and str(script),
            "prelude": prelude,
            "environment": {k: str(v) for k, v in (environment or {}).items()},
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = self._read(lambda told: told.get("started"))["started"]
        return Command(self, pid, output)

    def _read(self, wanted, patience=PATIENCE):
        until = time.monotonic() + patience
        while True:
            while b"\n" not in self.heard:
                left = max(0, until - time.monotonic())
                readable, _, _ = select.select([self.process.stdout], [], [], left)
                assert readable, "the process hangs"
                # Past Python's buffer, in which lines would lie that select does not see.
                self.heard += os.read(self.process.stdout.fileno(), 2**16)
            line, _, self.heard = self.heard.partition(b"\n")
            told = json.loads(line)
            if "ended" in told:
                self.codes[told["ended"]] = told["code"]
            if wanted(told):
                return told

    def code_of(self, pid, patience):
        if pid not in self.codes:
            self._read(lambda told: told.get("ended") == pid, patience)
        return self.codes[pid]

    def stop(self):
        self.process.stdin.write("null\n")  # other children of this process may hold it open
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)
        self.process.stdout.close()


class Command:
    """A command under way, or ended."""

    def __init__(self, server, pid, output):
        self.server, self.pid, self.output = server, pid, output

    def wait(self, patience=PATIENCE):
        """Wait for its end; give its exit code, -n where signal n ended it."""
        try:
            return self.server.code_of(self.pid, patience)
        except AssertionError:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL, group=True)
            raise AssertionError(f"it hangs; so far it said:\n{self.said}") from None

    def signal(self, number, *, group=False):
        """Send it a signal, or its whole group, as a terminal does."""
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def said(self):
        """What it wrote to both its outputs."""
        return self.output.read_text()

    def until(self, is_so, patience=PATIENCE):
        """Wait until something is so; fail where the process ended or hangs before."""
        began = time.monotonic()
        while not is_so():
            assert time.monotonic() - began < patience, f"never so; it said:\n{self.said}"
            assert self.is_alive() or is_so(), f"it ended before; it said:\n{self.said}"
            time.sleep(0.005)

    def ends_within(self, seconds):
        """Give it some time; tell whether it has ended."""
        until = time.monotonic() + seconds
        while self.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        return not self.is_alive()

    def until_said(self, text, patience=PATIENCE):
        """Wait until it has said something, to the end of the line, which is written by itself."""
        self.until(lambda: "\n" in self.said.partition(text)[2], patience)

    def is_alive(self):
        return Path(f"/proc/{self.pid}").exists() and state_of(self.pid) != "Z"

    def others(self):
        """Processes of its session that are alive, but itself."""
        return [pid for pid in session_of(self.pid) if pid != self.pid]


def state_of(pid):
    """The state of a process in one letter, "Z" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def session_of(leader):
    """Processes of a session that are alive."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                session = os.getsid(int(path.name))
            except ProcessLookupError:
                continue
            if session == leader and state_of(int(path.name)) != "Z":
                found.append(int(path.name))
    return found


def undisturbed(server, folder, words):
    """Give a function of what is asked for beyond some words, which end with the run folder's flag.

    It gives the run of a command that nobody disturbed, made when it is first asked for.
    """
    runs = {}

    def give(*more):
        if more not in runs:
            place = folder / f"run-{len(runs)}"
            command = server.start([*words, place, *more], folder)
            assert command.wait() == 0, command.said
            runs[more] = RunFolder(place)
        return runs[more]

    return give


def fork_instead(command, *, check, capture_output=False, text=False):
    """Do as `subprocess.run`, but fork where the command is `python -m mixmo_fastai …`."""
    program = [sys.executable, "-m", "mixmo_fastai"]
    if command[: len(program)] != program:
        return subprocess.run(command, check=check, capture_output=capture_output, text=text)
    assert capture_output
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        child = os.fork()
        if not child:
            _drop_exit_handlers()
            _redirect(*outputs)
            torch.set_grad_enabled(True)  # whatever the script does meanwhile
            _exit_as(lambda: _run_mixmo(command[len(program) :]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        contents = [Path(path).read_text() if text else Path(path).read_bytes() for path in outputs]
    done = subprocess.CompletedProcess(command, code, *contents)
    if check:
        done.check_returncode()
    return done


# For a script that starts `mixmo` several times: new interpreters would take most of its time.
FORK_INSTEAD = """
import __main__, subprocess, sys, types
names = {**vars(subprocess), "run": __main__.fork_instead}
sys.modules["subprocess"] = types.SimpleNamespace(**names)
"""


@pytest.fixture(scope="session")
def server():
    own = Server()
    yield own
    own.stop()


@pytest.fixture
def mixmo(server, tmp_path):
    """A function that starts `mixmo …` in a folder of the test; what is left is killed.

    With `script` it starts that Python program: in a second, where a new interpreter takes five.
    """
    started = []

    def start(*words, **how):
        started.append(server.start(words, tmp_path, **how))
        return started[-1]

    yield start
    for command in started:
        for pid in session_of(command.pid):
            os.kill(pid, signal.SIGKILL)


def keep_digits():
    """Keep the digits in memory; scikit-learn parses a compressed text file at each call."""
    from sklearn import datasets

    datasets.load_digits = cache(datasets.load_digits)
    datasets.load_digits()


def _serve():
    import mixmo_fastai.training.ensemble
    import mixmo_fastai.training.lr_find  # noqa: F401
    from mixmo_fastai.cli.program import run

    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        run(["recipes"])  # imports what reading a command line takes
    keep_digits()
    gc.collect()
    gc.freeze()  # or each command would, as it ends, look through all that was imported: 1.5 s
    waiting = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        if readable:
            chunk = os.read(0, 2**16)
            if not chunk:
                return
            waiting += chunk
            *orders, waiting = waiting.split(b"\n")
            for order in map(json.loads, orders):
                if order is None:
                    return
                child = os.fork()
                if not child:
                    _exit_as(lambda order=order: _obey(order))
                _tell(started=child)
        while (ended := _ended()) is not None:
            _tell(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


def _ended():
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _exit_as(program):
    """Run a program, then leave the process as Python does, without tearing down its modules."""
    code = 0
    try:
        program()
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
        code = code if isinstance(code, int) else int(code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _obey(order):
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):  # whatever the tests were started under
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _redirect(order["output"], order["output"])
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    exec(order["prelude"], {})
    if order["script"]:
        sys.argv, sys.path[0] = (
            [order["script"], *order["words"]],
            str(Path(order["script"]).parent),
        )
        runpy.run_path(order["script"], run_name="__main__")
        return
    _run_mixmo(order["words"])


def _drop_exit_handlers():
    """Leave the temporary folders of the process that forked alone."""
    atexit._clear()
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False


def _redirect(output, errors):
    """Read nothing, and append the two outputs to files."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)


def _run_mixmo(words):
    from mixmo_fastai.cli import main

    sys.argv = ["mixmo", *words]
    main()


def _tell(**values):
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
