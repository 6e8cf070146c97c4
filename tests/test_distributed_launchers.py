"""torchrun and accelerate start training in several processes."""

import os
import signal
from importlib.util import find_spec

import pytest
from launches import FIT, SHORT, assert_close, train_alone
from processes import TIMEOUT

from mixmo_fastai.cli import run
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.processes import launched_processes

pytestmark = pytest.mark.slow

__all__ = ["train_alone"]  # fixtures

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = [
    *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
]
LAUNCHERS = pytest.mark.parametrize("launcher", [TORCHRUN, LAUNCH], ids=["torchrun", "accelerate"])


@pytest.fixture
def start_launcher(mixmo):
    """Return a function that starts `mixmo` with a launcher, which starts new interpreters."""

    def start(launcher, *words):
        module, *options = launcher
        script = find_spec(module).origin
        return mixmo(*options, "-m", "mixmo_fastai", *words, script=script)

    return start


@LAUNCHERS
def test_launchers_start_training(start_launcher, train_alone, tmp_path, launcher):
    run = tmp_path / "run"
    command = start_launcher(launcher, *FIT, run, *SHORT)
    assert command.wait(timeout=3 * TIMEOUT) == 0, command.printed
    assert "in 2 processes" in command.printed
    assert_close(open_run(run), train_alone(*SHORT))


def test_launcher_fails_if_a_process_is_killed(start_launcher, tmp_path):
    run = tmp_path / "run"
    command = start_launcher(TORCHRUN, *FIT, run, "--epochs", "100000")
    command.wait_until_printed("2/100000")
    children = [int(pid) for pid in child_pids(command.pid)]
    os.kill(children[-1], signal.SIGKILL)
    assert command.wait() != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children), command.printed
    assert CheckpointStore(run / "checkpoint").newest() is not None


def child_pids(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_processes() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_processes() == (2, 4)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK must be a number; it is 'first'"):
        launched_processes()


@pytest.mark.parametrize("command", ["recipes", "fit"])
def test_wrong_number_of_a_launcher_is_refused(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert run([command]) == 2
    assert "WORLD_SIZE must be a number; it is 'two'" in capsys.readouterr().err
