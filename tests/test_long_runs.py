"""Nothing grows with the epochs of a run: no memory, no open files, nothing kept per step."""

import os
import time
from pathlib import Path

import pytest
from fastai.callback.core import Callback
from test_resuming import STEPS, TINY

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
WAYS = {
    "resident": [],
    "streaming": ["--set", "data.loader=streaming", "--set", "data.num_workers=1"],
}
MEASURED = (20, 60)  # epochs; libraries take what they keep in the first ones
MOST_GROWTH = 2 * 2**20  # bytes: 50 kB an epoch


def memory_of(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def files_of(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("way", WAYS)
def test_memory_and_open_files_do_not_grow_with_the_epochs(mixmo, tmp_path, way):
    run, measured = tmp_path / "run", {}
    command = mixmo(*_FIT.split(), run, *WAYS[way], prelude=PAUSE)
    for epoch in MEASURED:
        mark = tmp_path / f"epoch-{epoch}"
        command.until(mark.exists, patience=240)
        time.sleep(0.2)  # a worker of the epoch before may still be leaving
        measured[epoch] = memory_of(command.pid), files_of(command.pid)
        mark.unlink()
    assert command.wait() == 0, command.said
    assert len(open_run(run).history()) == 60
    (early, few), (late, many) = measured.values()
    assert late - early < MOST_GROWTH
    assert many <= few


PAUSE = f"""
import gc, os, time
from mixmo_fastai.training.recording import CheckpointCallback
own = CheckpointCallback.after_trained_epoch
def pause(self):
    own(self)
    if self.learn.epoch + 1 in {MEASURED}:
        gc.collect()
        mark = f"epoch-{{self.learn.epoch + 1}}"
        open(mark, "w").close()
        while os.path.exists(mark):
            time.sleep(0.01)
CheckpointCallback.after_trained_epoch = pause
"""


def test_nothing_is_kept_of_every_step(tmp_path):
    lengths = []

    class Watch(Callback):
        order = 90

        def after_epoch(self):
            recorder, scheduler = self.learn.recorder, self.learn.param_scheduler
            kept = [recorder.losses, recorder.lrs, *scheduler.hps.values()]
            lengths.append(max(map(len, kept)))

    recipe = override(TINY, ["train.epochs=4"])
    train(prepare(recipe), create_run(recipe, tmp_path / "run"), cbs=[Watch()])
    assert len(lengths) == 4
    assert max(lengths) < STEPS
