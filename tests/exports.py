"""A finished run on three classes of images, to be exported."""

import pytest
from small_data import write_image_folder

from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(
        tmp_path_factory.mktemp("images") / "pets",
        classes=("cat", "dog", "fish"),
        num_train=12,
        num_test=5,
        size=(12, 12),
    )


def train_small_run(images, folder, **changes):
    settings = {
        "model.arch": "wrn10_1",
        "train.epochs": 1,
        "train.batch_size": 16,
        "train.device": "cpu",
        "data.valid_split": 0.1,
        **changes,
    }
    run = create_run(resolve_recipe(str(images), None, settings), folder)
    train_run(prepare(run.recipe(), folder.parent), run)
    return run


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return train_small_run(images, tmp_path_factory.mktemp("runs") / "mixmo")
