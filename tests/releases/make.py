"""Train the run of this version that later versions must resume; execute once per release.

    python tests/releases/make.py

The run is stopped in its second epoch. The losses of the complete run are stored in end.json.
"""

import json
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from fastai.callback.core import Callback

import mixmo_fastai
from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

HERE = Path(__file__).parent
RECIPE = {
    "name": "release",
    "data": {"dataset": "digits", "limit": 64, "valid_split": 0.05},
    "model": {"arch": "wrn10_1"},
    "train": {"epochs": 3, "batch_size": 32, "device": "cpu", "threads": 1},
}
FILES = ("recipe.toml", "data.json", "history.csv")


class StopWithin(Callback):
    """Request a stop in the middle of the second epoch."""

    order = 64

    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def after_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 3):
            self.stop.number = signal.SIGINT


def make(folder):
    """Write the stopped run and the losses of the complete run to a folder."""
    recipe = recipe_from_mapping(RECIPE, "release")
    with TemporaryDirectory() as temporary:
        run, stop = create_run(recipe, Path(temporary) / "run"), StopRequest()
        with suppress(InterruptedBySignal):
            train(prepare(recipe), run, cbs=[StopWithin(stop)], stop=stop)
        newest = CheckpointStore(run.checkpoint).newest()
        folder.mkdir()
        for name in FILES:
            shutil.copy(run.path / name, folder / name)
        shutil.copytree(newest.path, folder / "checkpoint" / newest.path.name)
        train(prepare(recipe), run, resume=True)
        rows = open_run(run.path).history()
    losses = [float(row["train_loss"]) for row in rows]
    (folder / "end.json").write_text(json.dumps({"train_losses": losses}) + "\n")


if __name__ == "__main__":
    make(HERE / mixmo_fastai.__version__)
