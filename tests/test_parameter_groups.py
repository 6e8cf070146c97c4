"""A converted Learner keeps its frozen parameters, parameter groups and hyperparameters."""

from functools import partial

import pytest
import torch
from fastai.imports import L
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import params, trainable_params
from fastai.vision.learner import model_meta, vision_learner
from networks import NarrowResNet18
from synthetic import fastai_dls
from torch import nn
from torchvision.models import resnet18

from mixmo_fastai import body_and_heads, create_model, to_mixmo
from mixmo_fastai.errors import InputError


def resnet_learner(**kwargs):
    torch.manual_seed(0)
    learn = vision_learner(
        fastai_dls(num_train=24), NarrowResNet18, pretrained=False, normalize=False,
        loss_func=CrossEntropyLossFlat(), splitter=model_meta[resnet18]["split"], **kwargs,
    )  # fmt: skip
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def small_network():
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    middle = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(first, middle, nn.Linear(8, 3))


def three_groups(model):
    return L(model[0], model[1], model[2]).map(params)


def user_learner(model=None, **kwargs):
    learn = Learner(fastai_dls(), model or small_network(), CrossEntropyLossFlat(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def parameters_changed_by(learn, fit):
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    fit(learn)
    return {n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])}


def mixmo_names(names, first, last):
    """Convert names of a plain network's parameters to those of its MixMo network."""
    converted = set()
    for name in names:
        layer, _, parameter = name.rpartition(".")
        part = {first: "encoders", last: "heads"}.get(layer)
        converted |= (
            {f"{part}.{i}.{parameter}" for i in range(2)} if part else {f"core.body.{name}"}
        )
    return converted


@pytest.mark.slow
@pytest.mark.parametrize("train_bn", [True, False])
@pytest.mark.parametrize("fit", ["fit_one_cycle", "fine_tune", "freeze_to", "unfreeze"])
def test_frozen_learner_trains_the_same_parameters_as_plain_fastai(train_bn, fit):
    def run(learn):
        if fit == "fine_tune":
            learn.fine_tune(0, freeze_epochs=1)
        else:
            if fit == "freeze_to":
                learn.freeze_to(-2)
            if fit == "unfreeze":
                learn.unfreeze()
            learn.fit_one_cycle(1, 1e-2)

    plain, mixmo = (resnet_learner(train_bn=train_bn) for _ in range(2))
    for learn in (plain, mixmo):
        learn.freeze()
    to_mixmo(mixmo, mix="linear", seed=0, batch_repetitions=1)
    trainable = {name for name, p in plain.model.named_parameters() if p.requires_grad}
    first_and_last = ("0.0", "1.8")  # ResNet's convolution, last layer of fastai's head
    mixmo_trainable = {name for name, p in mixmo.model.named_parameters() if p.requires_grad}
    assert mixmo_trainable == mixmo_names(trainable, *first_and_last)
    assert not any(name.startswith("encoders") for name in mixmo_trainable)
    assert mixmo.opt.frozen_idx == plain.opt.frozen_idx == 2
    assert parameters_changed_by(mixmo, run) == mixmo_names(
        parameters_changed_by(plain, run), *first_and_last
    )


def test_manually_frozen_parameters_stay_frozen():
    model = small_network()
    model[0].requires_grad_(False)
    learn = to_mixmo(user_learner(model), seed=0)
    changed = parameters_changed_by(learn, lambda learn: learn.fit(1, 1e-2))
    assert changed == {"core.body.1.0.weight", "core.body.1.0.bias"} | {
        f"heads.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")
    }
    learn.unfreeze()  # as in plain fastai, the frozen parameters are in no group
    assert not any(p.requires_grad for p in learn.model.encoders.parameters())


def test_frozen_convolution_with_other_channels_stays_frozen():
    model = small_network()
    model[0][0] = nn.Conv2d(1, 8, 3)
    model[0].requires_grad_(False)
    learn = to_mixmo(user_learner(model), seed=0)
    assert learn.model.in_channels == 3
    assert not any(p.requires_grad for p in learn.model.encoders.parameters())


def test_three_learning_rates_for_three_groups():
    learn = to_mixmo(user_learner(splitter=three_groups), seed=0)
    learn.fit(1, [1e-4, 1e-3, 1e-2])
    assert [group["lr"] for group in learn.opt.hypers] == [1e-4, 1e-3, 1e-2]
    first, _, last = ({id(p) for p in group} for group in learn.opt.param_lists)
    assert {id(p) for p in learn.model.encoders.parameters()} <= first
    assert last == {id(p) for p in learn.model.heads.parameters()}
    in_groups = [p for group in learn.opt.param_lists for p in group]
    assert len(in_groups) == len({*in_groups}) == len([*learn.model.parameters()])
    learn.freeze_to(-2)
    trainable = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "core.body.1" in name}
    assert not any(name.startswith("encoders") for name in trainable)


def test_single_group_is_kept():
    learn = to_mixmo(user_learner(), seed=0)
    assert learn.splitter is trainable_params
    learn.fit(1, slice(1e-3))
    assert [group["lr"] for group in learn.opt.hypers] == [1e-3]


def test_layers_outside_all_groups_are_not_trained():
    learn = to_mixmo(user_learner(splitter=lambda model: [params(model[2])]), seed=0)
    changed = parameters_changed_by(learn, lambda learn: learn.fit(1, 1e-2))
    assert changed == {f"heads.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}


def test_splitter_for_mixmo_networks_before_the_conversion():
    learn = to_mixmo(user_learner(splitter=body_and_heads), seed=0)
    learn.create_opt()
    assert len(learn.opt.param_lists) == 2


def test_mixmo_network_keeps_splitter_and_optimizer():
    learn = user_learner(create_model("wrn10_1", 3), splitter=body_and_heads)
    learn.freeze()
    optimizer = learn.opt
    assert to_mixmo(learn).opt is optimizer
    assert parameters_changed_by(learn, lambda learn: learn.fit(1, 1e-2)) >= {"heads.0.weight"}
    assert not learn.model.encoders[0].weight.requires_grad


@pytest.mark.parametrize("opt_func", [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_trained_learner_keeps_hyperparameters_but_not_moments(opt_func):
    learn = user_learner(splitter=three_groups, opt_func=opt_func)
    learn.fit_one_cycle(1, [1e-4, 1e-3, 1e-2])
    learn.opt.set_hyper("eps", 1e-3)
    before = [dict(group) for group in learn.opt.hypers]
    to_mixmo(learn, seed=0)
    assert [dict(group) for group in learn.opt.hypers] == before
    state = learn.opt.state_dict()["state"]
    states = state.values() if isinstance(state, dict) else state
    assert not any("grad_avg" in values or "exp_avg" in values for values in states)
    learn.fit_one_cycle(1, [1e-4, 1e-3, 1e-2])
    assert learn.opt.hypers[0]["eps"] == 1e-3


def test_learner_is_unchanged_if_the_splitter_fails():
    learn = user_learner(splitter=lambda model: model.nowhere)
    model = learn.model
    with pytest.raises(InputError, match="splitter fails on its network: AttributeError"):
        to_mixmo(learn)
    assert learn.model is model
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert not hasattr(learn, "mix_mo")


def test_learner_is_unchanged_if_the_optimizer_fails():
    created = []

    def create_only_once(groups, **kwargs):
        if created:
            raise RuntimeError("no second optimizer")
        created.append(Adam(groups, **kwargs))
        return created[0]

    learn = user_learner(splitter=three_groups, opt_func=create_only_once)
    learn.create_opt()
    model = learn.model
    with pytest.raises(RuntimeError, match="no second"):
        to_mixmo(learn)
    assert learn.model is model
    assert learn.opt is created[0]
    assert learn.splitter is three_groups


def test_splitter_works_for_the_fused_network():
    learn = to_mixmo(user_learner(splitter=three_groups), seed=0)
    assert [len(group) for group in learn.splitter(learn.model.fuse())] == [4, 2, 2]
    assert [len(group) for group in learn.splitter(learn.model)] == [6, 2, 4]
