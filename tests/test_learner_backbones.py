"""`mixmo_learner` with what fastai users have: names, functions, networks of their own."""

import pytest
import torch
from fastai.vision.learner import create_vision_model
from fastai.vision.models import xresnet
from synthetic import foreign_dls, mixmo_dls
from torch import nn
from torchvision.models import resnet18

from mixmo_fastai import MixMoModel, create_model, mixmo_learner
from mixmo_fastai.errors import InputError


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def trained(learn):
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    return [n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])]


@pytest.mark.parametrize("dls", [mixmo_dls, foreign_dls])
def test_a_network_of_ones_own_trains(dls):
    learn = mixmo_learner(dls(), small(), seed=0)
    assert len(trained(learn)) == len([*learn.model.parameters()])
    assert learn.get_preds()[0].shape == (len(learn.dls.valid_ds), 3)


@pytest.mark.parametrize("function", [resnet18, xresnet.xresnet18])
def test_a_function_makes_the_network(function):
    learn = mixmo_learner(mixmo_dls(), function, seed=0)
    assert isinstance(learn.model, MixMoModel)
    assert learn.model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_a_model_of_a_vision_learner_is_converted():
    model = create_vision_model(resnet18, 3, pretrained=False).eval()
    learn = mixmo_learner(mixmo_dls(), model, seed=0)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(learn.model.eval()(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_mixmo_model_is_taken_as_it_is():
    model = create_model("wrn10_1", 3)
    assert mixmo_learner(mixmo_dls(), model).model is model


def test_other_classes_get_heads_of_their_own():
    model = nn.Sequential(*small()[:-1], nn.Linear(8, 1000))
    learn = mixmo_learner(mixmo_dls(), model, seed=0)
    assert learn.model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_fine_tuning_freezes_all_but_the_heads_first():
    learn = mixmo_learner(mixmo_dls(), small(), seed=0)
    learn.freeze()
    moved = trained(learn)
    assert moved
    assert all(name.startswith("heads") for name in moved)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-2)
    assert len(learn.opt.hypers) == 2


def test_weights_of_a_function_are_not_guessed():
    with pytest.raises(InputError, match="goes with names"):
        mixmo_learner(mixmo_dls(), xresnet.xresnet18, pretrained=True)
