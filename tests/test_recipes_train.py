"""Every shipped recipe trains with a small network, on generated data in the official formats."""

import dataclasses

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from small_data import write_cifar10, write_cifar100, write_tiny_imagenet

from mixmo_fastai.config.load import recipe_names
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.sources import SOURCES
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import schedules

WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tinyimagenet": write_tiny_imagenet,
}
NUM_STEPS = 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for name, write in WRITERS.items():
            changed = dataclasses.replace(SOURCES[name], archive=write(folder))
            patch.setitem(SOURCES, name, changed)
        yield folder


class FewSteps(Callback):
    """End the fit after a few steps, and record their losses."""

    run_valid = False

    def __init__(self):
        super().__init__()
        self.losses = []

    def after_step(self):
        self.losses.append(self.learn.loss.item())
        if len(self.losses) == NUM_STEPS:
            raise CancelFitException


def small_recipe(name):
    """Return a recipe with a small network and small batches, otherwise unchanged.

    Recipes for fine-tuning get data, and their networks start from random weights.
    """
    flags = {"model.arch": "wrn10_1", "train.batch_size": 4, "train.device": "cpu"}
    if name.startswith("fine-tune"):
        settings = ["model.pretrained=false", "train.epochs=1"]
        return resolve_recipe("digits", name, flags, settings)
    return resolve_recipe(recipe=name, flags=flags)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("kind", ["one-cycle", "published"])
def test_recipe_trains_for_a_few_steps(name, kind, data_folder):
    recipe = small_recipe(name)
    schedule = dataclasses.replace(recipe.schedule, kind=kind)
    training = prepare(dataclasses.replace(recipe, schedule=schedule), data_folder)
    learn, steps = training.learn, FewSteps()
    before = [parameter.clone() for parameter in learn.model.parameters()]
    assert set(schedules(training.recipe, training.steps_per_epoch, training.warmup_steps)) >= {
        "lr"
    }
    with learn.no_logging():
        learn.fit(1, recipe.lr, cbs=steps)
    assert len(steps.losses) == NUM_STEPS
    assert all(torch.tensor(steps.losses).isfinite())
    assert learn.model.num_members == recipe.model.num_members
    after = learn.model.parameters()
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
