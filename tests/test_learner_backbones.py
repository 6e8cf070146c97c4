"""`mixmo_learner` and `to_mixmo` with names, functions and networks of a fastai user."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders
from fastai.imports import L
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import RandomErasing
from fastai.vision.learner import create_vision_model
from fastai.vision.models import xresnet
from learners import fit_and_list_changed_parameters, small_network
from synthetic import fastai_dls, mixmo_dls
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from mixmo_fastai import MixMoModel, convert_to_mixmo, create_model, mixmo_learner, to_mixmo
from mixmo_fastai.errors import InputError


@pytest.mark.parametrize("dls", [mixmo_dls, fastai_dls])
def test_custom_network_trains(dls):
    learn = mixmo_learner(dls(), small_network(), seed=0)
    assert len(fit_and_list_changed_parameters(learn)) == len([*learn.model.parameters()])
    assert learn.get_preds()[0].shape == (len(learn.dls.valid_ds), 3)


@pytest.mark.slow
@pytest.mark.parametrize("function", [resnet18, xresnet.xresnet18])
def test_network_is_created_by_a_function(function):
    learn = mixmo_learner(mixmo_dls(), function, seed=0)
    assert isinstance(learn.model, MixMoModel)
    assert learn.model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.slow
def test_model_of_vision_learner_is_converted():
    model = create_vision_model(resnet18, 3, pretrained=False).eval()
    learn = mixmo_learner(mixmo_dls(), model, seed=0)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(learn.model.eval()(x), model(x), rtol=1e-3, atol=1e-4)


def test_mixmo_model_is_used_unchanged():
    model = create_model("wrn10_1", 3)
    assert mixmo_learner(mixmo_dls(), model).model is model


def test_new_heads_if_the_number_of_classes_differs():
    model = nn.Sequential(*small_network()[:-1], nn.Linear(8, 1000))
    learn = mixmo_learner(mixmo_dls(), model, seed=0)
    assert learn.model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_freeze_trains_only_the_heads():
    learn = mixmo_learner(mixmo_dls(), small_network(), seed=0)
    learn.freeze()
    changed = fit_and_list_changed_parameters(learn)
    assert changed
    assert all(name.startswith("heads") for name in changed)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-2)
    assert len(learn.opt.hypers) == 2


def test_custom_function_with_the_name_of_a_known_network():
    def resnet18(n_classes):
        return nn.Sequential(*small_network()[:-1], nn.Linear(8, n_classes))

    learn = mixmo_learner(mixmo_dls(), resnet18, seed=0)
    assert [encoder.out_channels for encoder in learn.model.encoders] == [8, 8]


@pytest.mark.parametrize("is_trained", [True, False])
def test_only_trained_networks_keep_their_weights(is_trained):
    weights = small_network().state_dict()

    def make():
        model = small_network()
        if is_trained:
            model.load_state_dict(weights)
        return model

    encoders = mixmo_learner(mixmo_dls(), make, seed=0).model.encoders
    total = sum(encoder.weight for encoder in encoders)
    assert torch.allclose(total, weights["0.weight"], atol=1e-6) == is_trained
    both = torch.stack([encoder.weight.flatten() for encoder in encoders])
    assert (abs(torch.corrcoef(both)[0, 1]) > 0.9) == is_trained


def test_trained_body_with_a_new_head():
    """The weights of the body are loaded, and only the head is initialised."""
    weights = resnet18().state_dict()

    def make(num_classes):
        model = resnet18()
        model.load_state_dict(weights)
        model.fc = nn.Linear(512, num_classes)
        return model

    model = mixmo_learner(mixmo_dls(), make, seed=0).model
    total = sum(encoder.weight for encoder in model.encoders)
    torch.testing.assert_close(total, weights["conv1.weight"])
    heads = torch.stack([head.weight.flatten() for head in model.heads]).detach()
    assert torch.corrcoef(heads)[0, 1].abs() < 0.2


def test_independent_members_of_a_custom_network():
    model = small_network()
    encoders = mixmo_learner(mixmo_dls(), model, seed=0, independent=True).model.encoders
    assert torch.equal(
        encoders[0].weight.flatten().sort().values, model[0].weight.flatten().sort().values
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        partial(xresnet.xresnet18, act_cls=nn.SiLU),
        partial(xresnet.xresnet18, n_out=3),
        lambda n: nn.Sequential(*small_network()[:-1], nn.Linear(8, n)),
        partial(resnet18, weights=None),
        lambda: small_network(),  # noqa: PLW0108
    ],
)
def test_functions_with_bound_arguments(make):
    assert mixmo_learner(mixmo_dls(), make, seed=0).model.heads[0].out_features == 3


def test_functions_do_not_change_the_global_generator():
    state = torch.get_rng_state()
    mixmo_learner(mixmo_dls(), small_network, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parameters_of_vision_learner_are_unfrozen():
    model = create_vision_model(resnet18, 3, pretrained=False)
    model[0].requires_grad_(False)  # as vision_learner does with pretrained weights
    learn = mixmo_learner(mixmo_dls(), model, seed=0)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_whole_head_of_vision_learner_trains_first():
    """All layers of the head train in the first phase of `fine_tune`, not only the last layer."""
    model = create_vision_model(resnet18, 3, pretrained=False)
    learn = mixmo_learner(mixmo_dls(), model, seed=0)
    learn.freeze()
    trainable = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    assert "core.body.1.4.weight" in trainable  # the linear layer before the last
    assert "heads.0.weight" in trainable
    # fastai always trains normalisation layers.
    assert not [n for n in trainable if n.startswith("encoders") or n.endswith("conv2.weight")]
    body, head = learn.opt.param_lists
    all_parameters = {*learn.model.parameters()}
    assert {*body} | {*head} == all_parameters
    assert len(body) + len(head) == len(all_parameters)


def test_network_with_another_number_of_channels():
    learn = mixmo_learner(
        fastai_dls(), nn.Sequential(nn.Conv2d(1, 8, 3), *small_network()[1:]), seed=0
    )
    assert learn.model.in_channels == 3
    fit_and_list_changed_parameters(learn)


def test_network_is_probed_at_the_image_size():
    class FixedSizeNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small_network()

        def forward(self, x):
            assert x.shape[2:] == (8, 8)
            return self.layers(x)

    learn = mixmo_learner(mixmo_dls(), FixedSizeNetwork(), seed=0)
    fit_and_list_changed_parameters(learn)
    assert learn.model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (lambda: mixmo_learner(mixmo_dls(), small_network()), r"got Learner.\n.*learn.model"),
        (lambda: 18, "got int"),
        (lambda: create_model("wrn10_1", 5), "has 5 classes, the data 3"),
        (lambda: create_model("wrn10_1", 3, in_channels=1), "expects images of 1 channels"),
        (lambda: lambda: "resnet18", "must return a network.*returned str"),
        (lambda: lambda width: small_network(), "requires width; only the number of classes"),
        (lambda: lambda width, depth: small_network(), "requires width, depth; only"),
        (lambda: dict, "'dict' (has no signature|must return a network)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "has no convolution"),
    ],
)
def test_unsuitable_networks_are_rejected(arch, message):
    with pytest.raises(InputError, match=message):
        mixmo_learner(mixmo_dls(), arch())


def test_number_of_classes_is_not_passed_with_pretrained_weights():
    """Functions of torchvision reject another number of classes than that of their weights."""

    def make(weights=None, num_classes=1000):
        assert weights is None or num_classes == 1000
        return nn.Sequential(*small_network()[:-1], nn.Linear(8, num_classes))

    for bound in (partial(make, weights="IMAGENET1K_V1"), partial(make, num_classes=3)):
        assert mixmo_learner(mixmo_dls(), bound, seed=0).model.heads[0].out_features == 3


def dls_with_three_classes():
    dls = fastai_dls()
    dls.c = 3
    return dls


def dls_with_pixel_targets():
    data = TensorDataset(torch.rand(32, 3, 8, 8), torch.randint(3, (32, 8, 8)))
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    dls.train.dataset.loss_func = CrossEntropyLossFlat(axis=1)
    return dls


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixmo_learner("cifar10", small_network()), "dls must be.*got str"),
        (lambda: mixmo_learner(small_network(), mixmo_dls()), "dls must be.*got Sequential"),
        (lambda: mixmo_learner(mixmo_dls(), small_network(), loss_func="ce"), "must be a loss"),
        (lambda: mixmo_learner(mixmo_dls(), small_network(), alpha="a"), "alpha must be"),
        (lambda: mixmo_learner(mixmo_dls(), small_network(), mix_prob=None), "mix_prob must be"),
        (
            lambda: mixmo_learner(fastai_dls(batch_size=1000), small_network()),
            "The loader has no batch",
        ),
        (lambda: to_mixmo(small_network()), "learn must be a Learner; got Sequential"),
        (
            lambda: mixmo_learner(mixmo_dls(), small_network(), num_members=2.5),
            "num_members must be",
        ),
        (
            lambda: mixmo_learner(dls_with_three_classes(), small_network(), num_classes=2),
            "num_classes must be at least 3",
        ),
        (
            lambda: mixmo_learner(dls_with_pixel_targets(), small_network(), num_classes=3),
            "targets have shape",
        ),
        (lambda: create_model("squeezenet1_1", 3), "does not end with a linear layer"),
        (lambda: convert_to_mixmo(resnet18), "got function; call it"),
        (lambda: convert_to_mixmo(torch.jit.script(small_network())), "scripted network cannot"),
        (lambda: convert_to_mixmo(small_network(), head="nope"), "Available: 4."),
        (lambda: create_model(18, 10), "arch must be the name"),
        (lambda: create_model("resnet18", "10"), "num_classes must be an integer"),
        (lambda: create_model("wrn10_1", 10, 2.5), "num_members must be an integer"),
    ],
)
def test_invalid_arguments_are_explained(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3


def test_callbacks_in_a_fastai_list():
    learn = mixmo_learner(mixmo_dls(), small_network(), cbs=L(CSVLogger()))
    assert learn.csv_logger
    assert learn.mix_mo


def test_pretrained_is_rejected_for_a_function():
    with pytest.raises(InputError, match=r"pretrained=True needs.*got a function"):
        mixmo_learner(mixmo_dls(), xresnet.xresnet18, pretrained=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True}, "pretrained=True needs.*got a network"),
        ({"n_out": 3}, "Did you mean 'num_classes'"),
        ({"alpa": 2.0}, "Did you mean 'alpha'"),
    ],
)
def test_arguments_not_supported_for_a_network(arguments, message):
    with pytest.raises(InputError, match=message):
        mixmo_learner(mixmo_dls(), small_network(), **arguments)


def test_number_of_members_must_match_the_mixmo_model():
    model = create_model("wrn10_1", 3, num_members=3).requires_grad_(False)
    learn = mixmo_learner(mixmo_dls(), model)
    assert not any(p.requires_grad for p in learn.model.parameters())
    with pytest.raises(InputError, match=r"num_members must be 3.*got 2"):
        mixmo_learner(mixmo_dls(), model, num_members=2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["wrn10_1", small_network, xresnet.xresnet18, "resnet18"])
def test_freeze_with_every_kind_of_network(arch):
    learn = mixmo_learner(mixmo_dls(), arch, seed=0)
    body, head = learn.splitter(learn.model)
    heads = {*learn.model.heads.parameters()}
    assert heads <= {*head}
    assert {*learn.model.encoders.parameters()} <= {*body}
    learn.freeze()
    trainable = {p for p in learn.model.parameters() if p.requires_grad}
    norms = {
        p for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    assert trainable - norms == {*head}


@pytest.mark.parametrize("transforms", [None, [RandomErasing(p=1.0)]])
def test_creating_a_learner_keeps_random_states(transforms):
    dls = fastai_dls(after_batch=transforms)

    def states():
        numpy = np.random.get_state()[1].tolist()
        return random.getstate(), numpy, torch.get_rng_state().tolist(), dls.train.rng.getstate()

    before = states()
    mixmo_learner(dls, "wrn10_1", seed=0)
    assert states() == before
