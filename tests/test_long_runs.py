"""Memory, open files and recorded steps do not grow with the number of epochs."""

import os
import time
from pathlib import Path

import pytest
from fastai.callback.core import Callback
from short_runs import STEPS, TINY

from mixmo_fastai.config.load import override
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow

_FIT = (
    "fit --arch wrn10_1 --limit 32 --valid-split 0.05 --batch-size 32 --epochs 60 --device cpu "
    "--threads 1 --set train.ema_decay=0.9 --set train.select=best --out"
)
LOADERS = {
    "resident": [],
    "streaming": ["--set", "data.loader=streaming", "--set", "data.num_workers=1"],
}
MEASURED_EPOCHS = (20, 60)  # epochs; libraries allocate their caches in the first ones
MAX_GROWTH = 2 * 2**20  # bytes: 50 kB an epoch


def memory_used_by(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def num_open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("loader", LOADERS)
def test_memory_and_open_files_do_not_grow(mixmo, tmp_path, loader):
    run, measured = tmp_path / "run", {}
    command = mixmo(*_FIT.split(), run, *LOADERS[loader], prelude=PAUSE)
    for epoch in MEASURED_EPOCHS:
        mark = tmp_path / f"epoch-{epoch}"
        command.wait_until(mark.exists, timeout=240)
        time.sleep(0.2)  # a worker of the previous epoch may still be exiting
        measured[epoch] = memory_used_by(command.pid), num_open_files(command.pid)
        mark.unlink()
    assert command.wait() == 0, command.printed
    assert len(open_run(run).history()) == 60
    (memory, num_files), (later_memory, later_num_files) = measured.values()
    assert later_memory - memory < MAX_GROWTH
    assert later_num_files <= num_files


PAUSE = f"""
import gc, os, time
from mixmo_fastai.training.checkpointing import CheckpointCallback
original = CheckpointCallback.after_trained_epoch
def pause(self):
    original(self)
    if self.learn.epoch + 1 in {MEASURED_EPOCHS}:
        gc.collect()
        mark = f"epoch-{{self.learn.epoch + 1}}"
        open(mark, "w").close()
        while os.path.exists(mark):
            time.sleep(0.01)
CheckpointCallback.after_trained_epoch = pause
"""


def test_recorded_steps_do_not_accumulate(tmp_path):
    lengths = []

    class RecordedLengths(Callback):
        order = 90

        def after_epoch(self):
            recorder, scheduler = self.learn.recorder, self.learn.param_scheduler
            recorded = [recorder.losses, recorder.lrs, *scheduler.hps.values()]
            lengths.append(max(map(len, recorded)))

    recipe = override(TINY, ["train.epochs=4"])
    train(prepare(recipe), create_run(recipe, tmp_path / "run"), cbs=[RecordedLengths()])
    assert len(lengths) == 4
    assert max(lengths) < STEPS
