"""What a training starts from: device, network, data, warm-up."""

from dataclasses import replace

import pytest
import torch

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.config.recipe import default_valid_split
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runtime.devices import choose_device
from mixmo_fastai.training.prepare import images_of_warmup, prepare


def test_unavailable_device_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cpu"):
        choose_device("cuda")


def test_failed_download_of_pretrained_weights_is_reported(monkeypatch):
    def load(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    recipe = override(
        load_recipe("digits/cut-mixmo"), ["model.arch=resnet18", "model.pretrained=true"]
    )
    with pytest.raises(InputError, match="weights of resnet18 cannot be downloaded"):
        prepare(recipe)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vit_b_32", "cannot be built for images of 8x8"),
        ("timm/vit_tiny_patch16_224", "8x8"),
        ("densenet121", "DenseNet does not accept images of 8x8"),
    ],
)
def test_networks_that_do_not_accept_the_images(arch, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program(["fit", "digits", "--arch", arch]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]


def test_default_validation_split_is_stored_with_the_run(tmp_path):
    recipe = override(load_recipe("digits/vanilla"), ["model.arch=wrn10_1", "train.device=cpu"])
    recipe = replace(recipe, data=replace(recipe.data, valid_split=None))
    training = prepare(recipe)
    assert training.recipe.data.valid_split == 0.0693
    assert len(training.learn.dls.valid.images) == 100
    stored = create_run(training.recipe, tmp_path / "run").recipe()
    assert stored.data.valid_split == 0.0693


@pytest.mark.parametrize("name", ["cifar10/vanilla", "cifar100/cut-mixmo", "tinyimagenet/mimo"])
def test_shipped_recipes_validate_on_two_percent(name):
    recipe = load_recipe(name)
    count = DATASETS[recipe.data.dataset].num_images[0]
    assert recipe.data.valid_split in (None, 0.02)
    assert default_valid_split(count) == 0.02


@pytest.mark.parametrize(
    ("limit", "valid_split", "expected"), [(0, 0.1, 1442), (100, 0.1, 100), (1400, 0.5, 721)]
)
def test_warmup_is_measured_in_images_of_the_training_set(limit, valid_split, expected):
    values = [f"data.limit={limit}", f"data.valid_split={valid_split}", "schedule.kind=published"]
    recipe = override(load_recipe("digits/cut-mixmo"), values)
    training = prepare(recipe)
    train, valid = (len(training.learn.dls[i].images) for i in range(2))
    assert images_of_warmup(recipe, training.source) == expected
    assert expected == (train if limit else train + valid)
    assert training.warmup_steps == recipe.warmup_steps(expected)
