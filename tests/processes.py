"""Run complete commands in separate processes, forked from a server that has imported everything.

The server imports torch, fastai and this package once, and forks for each command. A command starts
in milliseconds and is an ordinary process with its own signals, workers and process group. It exits
without the teardown of the interpreter, which takes half a second with so many modules; threads are
joined and exit handlers run as usual.
"""

import atexit
import gc
import importlib
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
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from mixmo_fastai.runs.folder import RunFolder

TIMEOUT = 60.0  # seconds after which a process is considered hung


class Server:
    """Server process that forks a child for each command."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.exit_codes, self.buffer = {}, b""

    def start(self, arguments, folder, *, script=None, prelude="", environment=None):
        """Start a command in its own session.

        Args:
            arguments: command-line arguments.
            folder: working directory, in which the output file is created.
            script: path of a Python program to run in place of `mixmo`.
            prelude: Python code that is executed first, such as a patch that slows down steps.
            environment: additional environment variables.
        """
        output = Path(folder) / f"output-{time.monotonic_ns()}"
        output.touch()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "output": str(output),
            "script": script and str(script),
            "prelude": prelude,
            "environment": {k: str(v) for k, v in (environment or {}).items()},
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self._read_until(lambda message: message.get("started"))["started"]
        return Command(self, pid, output)

    def _read_until(self, condition, timeout=TIMEOUT):
        deadline = time.monotonic() + timeout
        while True:
            while b"\n" not in self.buffer:
                remaining = max(0, deadline - time.monotonic())
                readable, _, _ = select.select([self.process.stdout], [], [], remaining)
                assert readable, "the server hangs"
                # Read without Python's buffer, whose lines select would not see.
                self.buffer += os.read(self.process.stdout.fileno(), 2**16)
            line, _, self.buffer = self.buffer.partition(b"\n")
            message = json.loads(line)
            if "ended" in message:
                self.exit_codes[message["ended"]] = message["code"]
            if condition(message):
                return message

    def exit_code(self, pid, timeout):
        if pid not in self.exit_codes:
            self._read_until(lambda message: message.get("ended") == pid, timeout)
        return self.exit_codes[pid]

    def stop(self):
        self.process.stdin.write("null\n")  # closing is not enough if other children hold it open
        self.process.stdin.close()
        self.process.wait(timeout=TIMEOUT)
        self.process.stdout.close()


class Command:
    """A command that is running or has ended."""

    def __init__(self, server, pid, output):
        self.server, self.pid, self.output = server, pid, output

    def wait(self, timeout=TIMEOUT):
        """Wait for the end; return the exit code, or -n if signal n ended the command."""
        try:
            return self.server.exit_code(self.pid, timeout)
        except AssertionError:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL, group=True)
            raise AssertionError(f"the command hangs; it printed:\n{self.printed}") from None

    def signal(self, number, *, group=False):
        """Send a signal to the process, or to its group as a terminal does."""
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def printed(self):
        """Text that was written to stdout and stderr."""
        return self.output.read_text()

    def wait_until(self, condition, timeout=TIMEOUT):
        """Wait until a condition holds; fail if the process ends or hangs before."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < timeout, f"timeout; it printed:\n{self.printed}"
            assert self.is_alive() or condition(), f"it ended; it printed:\n{self.printed}"
            time.sleep(0.005)

    def ends_within(self, seconds):
        """Wait for at most `seconds`; return whether the command has ended."""
        deadline = time.monotonic() + seconds
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self.is_alive()

    def wait_until_printed(self, text, timeout=TIMEOUT):
        """Wait until a text was printed, including the end of its line."""
        self.wait_until(lambda: "\n" in self.printed.partition(text)[2], timeout)

    def is_alive(self):
        return Path(f"/proc/{self.pid}").exists() and process_state(self.pid) != "Z"

    def other_processes(self):
        """Return the ids of the other living processes in the command's session."""
        return [pid for pid in processes_in_session(self.pid) if pid != self.pid]


def process_state(pid):
    """Return the state of a process as one letter, "Z" if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def processes_in_session(leader):
    """Return the ids of the living processes in a session."""
    pids = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                session = os.getsid(int(path.name))
            except ProcessLookupError:
                continue
            if session == leader and process_state(int(path.name)) != "Z":
                pids.append(int(path.name))
    return pids


def uninterrupted_runs(server, folder, arguments):
    """Return a function that trains uninterrupted runs.

    Its arguments are added to `arguments`, which end with the flag of the run folder. Runs are
    cached by them.
    """
    runs = {}

    def get(*more):
        if more not in runs:
            path = folder / f"run-{len(runs)}"
            command = server.start([*arguments, path, *more], folder)
            assert command.wait() == 0, command.printed
            runs[more] = RunFolder(path)
        return runs[more]

    return get


def fork_instead(command, *, check, capture_output=False, text=False):
    """Replace `subprocess.run`; fork for `python -m mixmo_fastai …` and `python -c …`."""
    if command[:3] == [sys.executable, "-m", "mixmo_fastai"]:
        function = partial(_run_mixmo, command[3:])
    elif command[:2] == [sys.executable, "-c"]:
        function = partial(exec, command[2], {})
    else:
        return subprocess.run(command, check=check, capture_output=capture_output, text=text)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        child = os.fork()
        if not child:
            _drop_exit_handlers()
            if capture_output:
                _redirect(*outputs)
            torch.set_grad_enabled(True)  # the script may have disabled gradients
            _run_and_exit(function)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        contents = [None, None]
        if capture_output:
            paths = map(Path, outputs)
            contents = [path.read_text() if text else path.read_bytes() for path in paths]
    done = subprocess.CompletedProcess(command, code, *contents)
    if check:
        done.check_returncode()
    return done


# For scripts that start `mixmo` several times, since new interpreters would take most of the time.
FORK_INSTEAD = """
import __main__, subprocess, sys, types
names = {**vars(subprocess), "run": __main__.fork_instead}
sys.modules["subprocess"] = types.SimpleNamespace(**names)
"""


@pytest.fixture(scope="session")
def server():
    shared_server = Server()
    yield shared_server
    shared_server.stop()


@pytest.fixture
def mixmo(server, tmp_path):
    """Return a function that starts `mixmo …` in a temporary folder; kill remaining processes.

    With `script` it starts that Python program, in one second instead of five.
    """
    started = []

    def start(*arguments, **options):
        started.append(server.start(arguments, tmp_path, **options))
        return started[-1]

    yield start
    for command in started:
        for pid in processes_in_session(command.pid):
            os.kill(pid, signal.SIGKILL)


def cache_digits():
    """Cache the digits in memory; scikit-learn parses a compressed text file at each call."""
    from sklearn import datasets

    datasets.load_digits = cache(datasets.load_digits)
    datasets.load_digits()


def _serve():
    # The first optimizer imports torch._dynamo, which takes longer than a short training.
    for module in ("torch._dynamo", "torchvision", "matplotlib.backends.backend_agg", "filelock"):
        importlib.import_module(module)
    import mixmo_fastai.training.ensemble
    import mixmo_fastai.training.lr_find  # noqa: F401
    from mixmo_fastai.cli.program import build_app, run

    build_app()
    with open(os.devnull, "w") as null, redirect_stdout(null):
        run(["recipes"])  # imports all modules that parsing a command line needs
    cache_digits()
    gc.collect()
    gc.freeze()  # otherwise each command traverses all imported objects at its end: 1.5 s
    received = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        if readable:
            chunk = os.read(0, 2**16)
            if not chunk:
                return
            received += chunk
            *requests, received = received.split(b"\n")
            for request in map(json.loads, requests):
                if request is None:
                    return
                child = os.fork()
                if not child:
                    _run_and_exit(lambda request=request: _run_request(request))
                _send(started=child)
        while (ended := _next_ended_child()) is not None:
            _send(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


def _next_ended_child():
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _run_and_exit(function):
    """Run a function, then exit like Python, but without the teardown of modules."""
    code = 0
    try:
        function()
    except SystemExit as error:
        code = error.code
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


def _run_request(request):
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):  # independent of how the tests were started
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _redirect(request["output"], request["output"])
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    exec(request["prelude"], {})
    if request["script"]:
        sys.argv, sys.path[0] = (
            [request["script"], *request["arguments"]],
            str(Path(request["script"]).parent),
        )
        runpy.run_path(request["script"], run_name="__main__")
        return
    _run_mixmo(request["arguments"])


def _drop_exit_handlers():
    """Do not delete the temporary folders of the parent process."""
    atexit._clear()
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False


def _redirect(output, errors):
    """Read from /dev/null, and append stdout and stderr to files."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)


def _run_mixmo(arguments):
    from mixmo_fastai.cli import main

    sys.argv = ["mixmo", *arguments]
    main()


def _send(**values):
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
