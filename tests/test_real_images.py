"""Training on real images; skipped if they are not available."""

import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException

from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.evaluation.runs import evaluate_run
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow

IMAGES = Path(__file__).resolve().parents[2] / "shared" / "data"


def unpack(archive, folder, per_folder=None):
    """Unpack an archive, or only `per_folder` files of each of its folders."""
    path = IMAGES / archive
    if not path.is_file():
        pytest.skip(f"real images not available: {archive}")
    unpacked = Counter()
    with tarfile.open(path) as tar:
        for member in tar:
            parent = member.name.rpartition("/")[0]
            if member.isfile() and (per_folder is None or unpacked[parent] < per_folder):
                unpacked[parent] += 1
                tar.extract(member, folder, filter="data")


class StopAfter(Callback):
    """End the fit after a number of steps, and record their losses."""

    run_valid = False

    def __init__(self, steps):
        super().__init__()
        self.steps, self.losses = steps, []

    def after_step(self):
        self.losses.append(self.learn.loss.item())
        if len(self.losses) == self.steps:
            raise CancelFitException


def test_tiny_imagenet_trains_for_a_few_steps(tmp_path):
    unpack("tiny-imagenet-200-small.tar.xz", tmp_path)
    recipe = recipe_from_mapping(
        {
            "data": {"dataset": "tinyimagenet"},
            "model": {"arch": "preact_resnet18_1"},
            "train": {"batch_size": 8, "epochs": 1},
            "mix": {"batch_repetitions": 2},
        },
        "test",
    )
    training = prepare(recipe, tmp_path)
    sizes = [len(loader.images) for loader in training.learn.dls.loaders]
    assert sizes == [200 * 49, 200, 2000]
    assert training.source.train.image_shape == (3, 64, 64)
    before = training.learn.model.encoders[1].weight.clone()
    stop_after = StopAfter(4)
    with training.learn.no_logging():
        training.learn.fit(1, 0.01, cbs=stop_after)
    assert len(stop_after.losses) == 4
    assert all(3 < loss < 13 for loss in stop_after.losses)  # per member; ln 200 is 5.3
    assert not torch.equal(training.learn.model.encoders[1].weight, before)


def test_cifar10_as_image_folder_is_trained_and_evaluated(tmp_path, monkeypatch):
    unpack("cifar10-images.tar.xz", tmp_path, per_folder=30)
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "home"))
    recipe = recipe_from_mapping(
        {
            "data": {"dataset": str(tmp_path / "cifar10-images"), "valid_split": 0.1},
            "model": {"arch": "wrn10_1"},
            "train": {"batch_size": 32, "epochs": 2},
            "optimizer": {"lr": 0.05},
        },
        "test",
    )
    training = prepare(recipe)
    assert training.source.classes[:2] == ("airplane", "automobile")
    assert 0.4 < training.source.mean[0] < 0.6
    run = create_run(recipe, tmp_path / "run")
    metrics = train(training, run)
    rows = run.history()
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"]) < 2.6
    assert metrics["test"]["accuracy"] > 0.12
    assert evaluate_run(run)["test"] == metrics["test"]
