"""Optimizers that are selected by name."""

import pytest
import torch
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.learner.muon import Muon, orthogonalize
from mixmo_fastai.learner.optimizers import build_optimizer_factory, from_torch, sgd

NAMES = ["sgd", "adamw", "muon", "torch/RAdam", "torch/Adagrad", "fastai/Adam", "fastai/ranger"]


def learner(opt_func, lr=1e-3):
    return mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, opt_func=opt_func, lr=lr)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains(name):
    learn = learner(build_optimizer_factory(name, 1e-4))
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert all(loss.isfinite() for loss in learn.recorder.losses)
    assert all(not torch.equal(v, before[k]) for k, v in learn.model.named_parameters())


def test_options_are_passed_to_the_optimizer():
    learn = learner(build_optimizer_factory("adamw", 0.3, betas=[0.8, 0.9]))
    learn.create_opt()
    assert learn.opt.hypers[0]["wd"] == 0.3
    assert (learn.opt.hypers[0]["mom"], learn.opt.hypers[0]["sqr_mom"]) == (0.8, 0.9)


def test_default_is_the_published_optimizer():
    learn = learner(build_optimizer_factory("sgd", 6e-4, momentum=0.9, nesterov=True))
    published = learner(sgd())
    for learner_ in (learn, published):
        learner_.create_opt()
    assert type(learn.opt.opt) is torch.optim.SGD
    assert learn.opt.hypers == published.opt.hypers


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {}, "Unknown optimizer 'adam'"),
        ("radam", {}, "If a library has it: torch/radam or fastai/radam"),
        ("adamw", {"ep": 1}, "Did you mean 'eps'"),
        ("torch/Adm", {}, "Did you mean 'torch/Adam'"),
        ("fastai/Rangr", {}, "Did you mean 'fastai/ranger'"),
        ("torch/", {}, "Unknown optimizer"),
        ("adamw", {"beta": 1}, r"no option 'beta'\. Did you mean 'betas'\?\nAllowed: betas, eps"),
        ("torch/RAdam", {"k": 1}, "no option 'k'"),
        ("torch/LBFGS", {}, "needs a closure"),
        (
            "torch/Rprop",
            {"weight_decay": 1e-4},
            r"has no weight decay\.\nSet optimizer\.weight_decay=0",
        ),
        ("torch/Rprop", {"lr_decay": 1}, "no option 'lr_decay'"),
    ],
)
def test_invalid_names_and_options_are_rejected(name, options, message):
    with pytest.raises(InputError, match=message):
        build_optimizer_factory(name, **{"weight_decay": 0.0, **options})


def test_optimizer_with_two_passes_is_rejected():
    class TwoPassOptimizer(torch.optim.SGD):
        def step(self, closure):
            """Evaluate the gradient twice."""

    with pytest.raises(InputError, match="several forward passes"):
        from_torch(TwoPassOptimizer)


def test_values_rejected_by_torch_raise_input_error():
    with pytest.raises(InputError, match="Invalid beta"):
        learner(build_optimizer_factory("adamw", 0.0, betas=[1.5, 0.9])).create_opt()


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (12, 3)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    overlap = (orthogonalize(matrix) * (u @ v)).sum() / min(shape)
    assert overlap > 0.8


def test_muon_updates_convolutions_as_matrices():
    """One step without momentum equals the formula for the flattened weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False)
    before = conv.weight.detach().clone()
    conv.weight.grad = torch.randn_like(conv.weight)
    Muon(conv.parameters(), lr=0.1, momentum=0.0, weight_decay=0.5).step()
    update = orthogonalize(conv.weight.grad.reshape(4, -1)).reshape(before.shape)
    torch.testing.assert_close(conv.weight.detach(), before * (1 - 0.05) - 0.1 * update)


def test_muon_updates_vectors_like_adam():
    torch.manual_seed(0)
    parameter, reference = (nn.Parameter(torch.ones(6)) for _ in range(2))
    muon = Muon([parameter], lr=0.1, weight_decay=0.0, adam_ratio=0.5)
    adam = torch.optim.Adam([reference], lr=0.05, betas=(0.9, 0.95))
    for _ in range(4):
        parameter.grad = torch.randn(6)
        reference.grad = parameter.grad.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(parameter, reference)
