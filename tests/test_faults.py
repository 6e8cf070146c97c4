"""Faults of disks, memory, data and processes cause readable errors and lose no checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import (
    ALL_STEPS_SLOW,
    FIT,
    SLOW_STEPS,
    STREAMED,
    check_failed,
    check_resumed,
    uninterrupted,
)
from short_runs import assert_same
from small_data import write_image_folder

from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.lock import locked

pytestmark = pytest.mark.slow

__all__ = ["uninterrupted"]
LARGE = "fit --arch wrn16_4 --batch-size 2048 --epochs 1 --device cpu --threads 1"
UNDECODED = """
from mixmo_fastai.data import image_folder
image_folder.read_image_folder.__kwdefaults__["cache_limit"] = 0
"""


def newest_checkpoint(run):
    return CheckpointStore(run / "checkpoint").newest()


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts or remounts a small file system."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()

    def mount(options, path=mount_point):
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            pytest.skip(f"no file system can be mounted: {result.stderr.strip()}")
        return path

    yield mount
    subprocess.run(["umount", "--lazy", str(mount_point)], capture_output=True, check=False)


def test_disk_becomes_full(mixmo, disk, uninterrupted):
    run = disk("size=2m") / "run"
    command = mixmo(*FIT, run)
    check_failed(command, 1, "Cannot write", "No space left on device", "--resume")
    assert newest_checkpoint(run) is not None
    assert not (run / "checkpoint" / ".unfinished").exists()
    disk("remount,size=64m")
    check_resumed(mixmo, run, uninterrupted())


def test_disk_is_full_from_the_start(mixmo, disk):
    folder = disk("size=4k")
    (folder / "filler").write_bytes(bytes(4096))
    check_failed(mixmo(*FIT, folder / "run"), 2, "No space left on device", "--out DIR")


def test_checkpoint_folder_becomes_read_only(mixmo, disk, tmp_path, uninterrupted):
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoint"
    command = mixmo(*FIT, run, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    disk("ro", checkpoints)  # hides the existing files
    check_failed(command, 1, "Cannot write", "Read-only file system", "--resume")
    subprocess.run(["umount", checkpoints], check=True)
    assert newest_checkpoint(run) is not None
    check_resumed(mixmo, run, uninterrupted())


def test_disk_is_read_only_from_the_start(mixmo, disk):
    folder = disk("size=1m")
    disk("remount,ro")
    check_failed(mixmo(*FIT, folder / "run"), 2, "cannot be written to", "--out DIR")
    assert not [*folder.iterdir()]


def test_lock_does_not_hide_disk_errors(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", fail)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(RunFailedError, match="first"), locked(tmp_path):
        raise RunFailedError("first")
    monkeypatch.undo()
    with locked(tmp_path), pytest.raises(InputError, match="this process"), locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_resume_on_a_read_only_disk_fails(mixmo, disk):
    run = disk("size=64m") / "run"
    command = mixmo(*FIT, run, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.signal(signal.SIGINT)
    assert command.wait() == 130
    disk("remount,ro")
    check_failed(mixmo("fit", "--resume", run), 1, "Cannot write", "Read-only file system")


def test_run_folder_is_removed_during_training(mixmo, tmp_path):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    shutil.rmtree(run)
    check_failed(command, 1, f"{run} no longer exists", "removed or renamed")
    assert not run.exists()


def test_run_folder_in_use_is_refused(mixmo, tmp_path, uninterrupted):
    run = tmp_path / "run"
    first = mixmo(*FIT, run, prelude=SLOW_STEPS)
    first.wait_until_printed("1/3 ")
    before = (run / "history.csv").read_bytes()
    check_failed(mixmo("fit", "--resume", run), 2, f"is in use: process {first.pid} on ")
    assert (run / "history.csv").read_bytes().startswith(before)
    assert first.wait() == 0
    assert not (run / ".lock").exists()
    assert_same(uninterrupted(), open_run(run))


def test_lock_of_a_killed_process_does_not_prevent_resuming(mixmo, tmp_path, uninterrupted):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *STREAMED, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.wait_until(command.other_processes)
    command.signal(signal.SIGKILL)  # its workers run for some more seconds
    assert command.wait() == -signal.SIGKILL
    assert (run / ".lock").exists()
    check_resumed(mixmo, run, uninterrupted(*STREAMED))


def test_simultaneous_runs_have_different_folders(mixmo, tmp_path):
    arguments = [argument for argument in FIT if argument != "--out"]
    arguments[arguments.index("--epochs") + 1] = "1"
    commands = [mixmo(*arguments, "--json") for _ in range(4)]
    assert [command.wait() for command in commands] == [0] * 4
    runs = {json.loads(c.printed[c.printed.index("\n{") :])["run"] for c in commands}
    assert len(runs) == 4
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        f"digits-cut-mixmo-{number}" for number in range(1, 5)
    }


def test_only_one_of_simultaneous_runs_uses_a_folder(mixmo, tmp_path, uninterrupted):
    run = tmp_path / "run"
    commands = [mixmo(*FIT, run, "--seed", seed) for seed in range(4)]
    codes = [command.wait() for command in commands]
    assert sorted(codes) == [0, 2, 2, 2]
    seed = codes.index(0)
    assert f"seed = {seed}\n" in (run / "recipe.toml").read_text()
    if seed == 0:
        assert_same(uninterrupted(), open_run(run))


def test_out_of_memory(mixmo, tmp_path):
    limit = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20,) * 2)
"""
    command = mixmo(*LARGE.split(), "--out", tmp_path / "run", prelude=limit)
    check_failed(
        command,
        1,
        "Out of memory with 2048 images per step in float32",
        "--batch-size 1024 or --precision bfloat16",
    )


def test_loss_becomes_not_finite(mixmo, tmp_path):
    """The checkpoint of the first epoch remains."""
    run = tmp_path / "run"
    fault = """
import torch
from mixmo_fastai.training.history import HistoryCallback
own = HistoryCallback.after_batch
def break_down(self):
    if (self.learn.epoch, self.learn.iter) == (1, 2):
        with torch.no_grad():
            next(self.learn.model.parameters()).fill_(float("inf"))
    own(self)
HistoryCallback.after_batch = break_down
"""
    command = mixmo(*FIT, run, prelude=fault)
    check_failed(command, 1, "not finite at step 4 of epoch 2", "--lr ", "mixmo lr-find")
    state = json.loads((newest_checkpoint(run).path / "state.json").read_text())
    assert (state["epoch"], state["step"]) == (1, 0)


def image_run(mixmo, folder, images, *options, prelude=SLOW_STEPS):
    return mixmo(
        *FIT, folder, images, "--data-dir", folder.parent / "data", *options,
        prelude=UNDECODED + prelude,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_image_is_removed_during_training(mixmo, tmp_path, workers):
    images = write_image_folder(tmp_path / "pets", num_train=24, num_test=4)
    streamed = [*STREAMED[:3], f"data.num_workers={workers}"]
    run = tmp_path / "run"
    command = image_run(mixmo, run, images, *streamed)
    command.wait_until_printed("1/3 ")
    image = sorted((images / "train").glob("*/*"))[5]
    content = image.read_bytes()
    image.unlink()
    check_failed(command, 2, image.name)
    assert not command.other_processes()
    before = newest_checkpoint(run).path.name
    resume = ["fit", "--resume", run, "--data-dir", tmp_path / "data"]
    message = check_failed(mixmo(*resume, prelude=UNDECODED), 2, "data.train is", "Undo the change")
    assert message.count("checksum") == 2
    assert newest_checkpoint(run).path.name == before
    image.write_bytes(content)
    command = mixmo(*resume, prelude=UNDECODED)
    assert command.wait() == 0, command.printed


def test_image_is_changed_before_resuming(mixmo, tmp_path):
    images = write_image_folder(tmp_path / "pets", num_train=24, num_test=4)
    run = tmp_path / "run"
    command = image_run(mixmo, run, images)
    command.wait_until_printed("1/3 ")
    command.signal(signal.SIGINT)
    assert command.wait() == 130
    image, other = sorted((images / "train").glob("*/*"))[:2]
    image.write_bytes(other.read_bytes() + b"more")
    resume = mixmo("fit", "--resume", run, "--data-dir", tmp_path / "data")
    message = check_failed(resume, 2, "data.train is", "Undo the change")
    assert message.count("checksum") == 2


@pytest.mark.parametrize("moment", ["training", "at the start"])
def test_worker_is_killed(mixmo, tmp_path, uninterrupted, moment):
    many_steps = [*STREAMED, "--limit", "320", "--epochs", "2"]
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *many_steps, prelude=ALL_STEPS_SLOW.replace("0.1", "0.02"))
    command.wait_until_printed("1/2 " if moment == "training" else "epoch")
    command.wait_until(command.other_processes)
    os.kill(command.other_processes()[0], signal.SIGKILL)
    start = time.monotonic()
    check_failed(command, 1, "Data loader worker", "--resume")
    assert time.monotonic() - start < 10
    assert not command.other_processes()
    check_resumed(mixmo, run, uninterrupted(*many_steps))


# Torch's workers store the ID of their parent here, too late if it has already ended.
LATE_WATCH = """
import time
from torch.utils.data._utils import worker
class LateWatchdog(worker.ManagerWatchdog):
    def __init__(self):
        time.sleep(1)
        super().__init__()
worker.ManagerWatchdog = LateWatchdog
"""


@pytest.mark.parametrize("prelude", [SLOW_STEPS, SLOW_STEPS + LATE_WATCH], ids=["torch", "late"])
def test_workers_end_with_their_parent(mixmo, tmp_path, prelude):
    command = mixmo(*FIT, tmp_path / "run", *STREAMED, prelude=prelude)
    command.wait_until_printed("1/3 ")
    command.wait_until(command.other_processes)
    command.signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while command.other_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not command.other_processes()
