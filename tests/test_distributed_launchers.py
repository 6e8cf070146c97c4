"""torchrun and accelerate start training in several processes."""

import os
import signal
import subprocess
import sys

import pytest
from launches import FIT, assert_close, train_alone
from processes import TIMEOUT

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


def start_launcher(launcher, *words):
    module = ["-m", "mixmo_fastai"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *module, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@LAUNCHERS
def test_launchers_start_training(train_alone, tmp_path, launcher):
    run = tmp_path / "run"
    process = start_launcher(launcher, *FIT, run)
    output, _ = process.communicate(timeout=3 * TIMEOUT)
    assert process.returncode == 0, output
    assert "in 2 processes" in output
    assert_close(open_run(run), train_alone())


def test_launcher_fails_if_a_process_is_killed(tmp_path):
    run = tmp_path / "run"
    process = start_launcher(TORCHRUN, *FIT, run, "--epochs", "100000")
    for line in process.stdout:
        if "2/100000" in line:
            break
    children = [int(pid) for pid in child_pids(process.pid)]
    os.kill(children[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children), output
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
