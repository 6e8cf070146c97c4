"""The lock of a run folder, held by and taken from real processes."""

import errno
import os
import platform
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.lock import LOCK, locked

OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from mixmo_fastai.runs.lock import locked
with locked(Path(sys.argv[1])):
    {}
    print(child, flush=True)
    sys.stdin.read()
"""
NO_CHILD = "child = 0"
CHILDREN = {
    "forked": "child = os.fork() or (os.close(1), time.sleep(60), os._exit(0))",
    "worker": (
        "import multiprocessing; "
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)); "
        "worker.start(); child = worker.pid"
    ),
    "program": "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid",
}


@contextmanager
def owner(folder, child=NO_CHILD):
    """Lock a folder in another process.

    Args:
        folder: the folder.
        child: statement by which that process starts a child process.

    Yields:
        The process and the number of its child process; 0 is none.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(child), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with ExitStack() as stack:
        stack.callback(process.communicate)
        child_number = int(process.stdout.readline())
        if child_number:
            stack.callback(os.kill, child_number, signal.SIGKILL)
        yield process, child_number


def test_message_names_the_process_that_holds_the_lock(tmp_path):
    with owner(tmp_path) as (process, _):
        for _ in range(2):  # a refused attempt leaves the name in the file
            with pytest.raises(InputError) as caught, locked(tmp_path):
                pass
            assert f"process {process.pid} on {platform.node()} is training" in str(caught.value)
    with locked(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


def test_one_process_cannot_lock_a_folder_twice(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with locked(tmp_path):
        for folder in (tmp_path, tmp_path / "link"):
            with pytest.raises(InputError, match="this process is training"), locked(folder):
                pass
        with pytest.raises(InputError, match="this process is training"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("child", CHILDREN)
def test_child_processes_do_not_hold_the_lock_of_a_killed_process(tmp_path, child):
    with owner(tmp_path, CHILDREN[child]) as (process, child_number):
        with pytest.raises(InputError), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(child_number, 0)  # raises if the child has ended
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            pass


@pytest.mark.slow
def test_end_of_a_child_process_does_not_release_the_lock(tmp_path):
    child = "child = os.fork() or os._exit(0); os.waitpid(child, 0); child = 0"
    with owner(tmp_path, child), pytest.raises(InputError), locked(tmp_path):
        pass


def test_text_of_a_former_owner_is_replaced(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on " + 100 * "x")
    with owner(tmp_path) as (process, _):
        with pytest.raises(InputError) as caught, locked(tmp_path):
            pass
        assert f"process {process.pid} on {platform.node()} is" in str(caught.value)
        assert "x" * 20 not in str(caught.value)


def test_removed_lock_file_is_created_again(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_of_processes_that_start_together_one_at_a_time_holds_the_lock(tmp_path):
    program = """
import os, sys
from pathlib import Path
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.lock import locked
folder, num_held = Path(sys.argv[1]), 0
for _ in range(30):
    try:
        with locked(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            num_held += 1
    except InputError:
        pass
print(num_held)
"""
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [command.communicate()[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0]
    assert all(int(output) >= 1 for output in outputs)
    assert not [*tmp_path.iterdir()]


def test_folder_that_does_not_exist_is_not_created(tmp_path):
    with pytest.raises(RunFailedError, match="no longer exists"), locked(tmp_path / "run"):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", fail)
    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]
