"""Commands run on a system without the functions of POSIX, such as Windows."""

import subprocess
import sys

import pytest

WINDOWS = """
import os, signal, sys
sys.modules["fcntl"] = None  # importing it raises an ImportError
for module, names in (
    (signal, ("SIGHUP", "pthread_sigmask")), (os, ("setpgrp", "killpg", "getpgid", "setsid")),
):
    for name in names:
        delattr(module, name)
open_file = os.open
def open_no_folder(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return open_file(path, *args, **kwargs)
os.open = open_no_folder
"""
COMMANDS = [
    (["--help"], 0),
    (["recipes"], 0),
    (["fit", "--help"], 0),
    (["fit", "--mix", "unknown"], 2),
    (["lr-find", "--help"], 0),
]
TRAINING = ["fit", "--arch", "wrn10_1", "--limit", "64", "--epochs", "1", "--device", "cpu"]


def run(program, folder):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )


def test_commands_start(tmp_path):
    program = f"""{WINDOWS}
from mixmo_fastai.cli import run
for arguments, code in {COMMANDS!r}:
    assert run(arguments) == code, arguments
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_networks_are_trained_and_resumed(tmp_path):
    program = f"""
# These may use POSIX. On Windows, filelock uses other functions instead.
import fastai.vision.all, filelock, torch, mixmo_fastai.metrics.fastai
{WINDOWS}
from mixmo_fastai.runs import files
os.name = "nt"  # pathlib could not create paths in a whole command under this name
files.flush_folder(".")
os.name = "posix"
files.flush_folder = lambda path: None
from mixmo_fastai.cli import run
from mixmo_fastai.runs import lock
assert run({[*TRAINING, "--out", "run"]!r}) == 0
assert run(["fit", "--resume", "run"]) == 0
assert run({[*TRAINING, "--out", "streaming", "--set", "data.loader=streaming"]!r}) == 0
with lock.locked(lock.Path("run")):
    assert run(["fit", "--resume", "run"]) == 2
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
