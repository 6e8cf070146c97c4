"""A short training in this process: train, stop and resume it, and compare two runs."""

import json
import signal

from fastai.callback.core import Callback
from PIL import Image

from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

TINY = recipe_from_mapping(
    {
        "name": "tiny",
        "data": {"dataset": "digits", "limit": 48, "valid_split": 0.05},
        "model": {"arch": "wrn10_1"},
        "train": {"epochs": 3, "batch_size": 32, "device": "cpu"},
        # The published schedule drops after the first and the second epoch.
        "schedule": {"milestones": [0.3, 0.6]},
    },
    "here",
)
STEPS = 6  # per epoch
EVERYTHING = ("train.ema_decay=0.9", "train.select=best")
TIMING_COLUMNS = ("seconds", "images_per_second")


def train_for_calibration(folder, *assignments):
    """Train three epochs on the digits into a folder, with a calibration, and return the run."""
    recipe = resolve_recipe(
        "digits",
        "digits/cut-mixmo",
        {"model.arch": "wrn10_1", "train.epochs": 3, "train.device": "cpu"},
        assignments=[*assignments, "train.precision=float32"],
    )
    training = prepare(recipe)
    run = create_run(training.recipe, folder)
    train_run(training, run)
    return run


def write_digits(folder, count):
    """Write the first test images of the digits as 00.png, 01.png and so on."""
    test = load_source("digits").test
    for index in range(count):
        Image.fromarray(test[index][0].numpy()).save(folder / f"{index:02d}.png")
    return test


class Watch(Callback):
    """Record the hyperparameters of each step; request a stop after a step or in validation."""

    order = 64  # before CheckpointCallback

    def __init__(self, stop, stop_at=None, *, validating=False):
        super().__init__()
        self.stop, self.stop_at, self.validating, self.steps = stop, stop_at, validating, []

    def after_batch(self):
        position = self.learn.epoch, self.learn.iter + 1
        if self.learn.training:
            hypers = self.learn.opt.hypers[-1]
            self.steps.append((position, hypers["lr"], hypers.get("mom"), self.learn.pct_train))
        if position == self.stop_at and self.learn.training != self.validating:
            self.stop.number = signal.SIGINT


def fit(run, stop_at=None, *, resume=False, validating=False, prepare=prepare):
    """Train to the end or up to `stop_at`; return the hyperparameters of each step."""
    stop = StopRequest()
    watch = Watch(stop, stop_at, validating=validating)
    try:
        train(prepare(run.recipe()), run, cbs=[watch], resume=resume, stop=stop)
    except InterruptedBySignal:
        assert stop_at is not None
    else:
        assert stop_at is None or stop_at == (2, STEPS)
    return watch.steps


def checkpoint_content(run):
    """Return the files of a run's newest checkpoint and its history without timings."""
    saved = CheckpointStore(run.checkpoint).newest()
    files = {name: (saved.path / name).read_bytes() for name in saved.files}
    history = json.loads(files.pop("history.json"))
    del history["seconds"]
    history["rows"] = without_timings(history["rows"])
    return files, history


def without_timings(rows):
    return [
        {name: value for name, value in row.items() if name not in TIMING_COLUMNS} for row in rows
    ]


def assert_same(first, second):
    """Check that two runs have the same checkpoint, weights, metrics and history."""
    (files, history), (other_files, other_history) = map(checkpoint_content, (first, second))
    assert history == other_history
    assert files.keys() == other_files.keys()
    for name in files:
        assert files[name] == other_files[name], name
    assert first.weights.read_bytes() == second.weights.read_bytes()
    assert without_timings([first.metrics()]) == without_timings([second.metrics()])
    assert without_timings(first.history()) == without_timings(second.history())
