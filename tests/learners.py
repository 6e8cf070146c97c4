"""Learners and networks for tests, and what their training does."""

import fastai.callback.progress  # noqa: F401  # adds a progress display to each Learner
import torch
from fastai.callback.core import Callback, CancelBackwardException
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.models import create_model


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def fit_and_list_changed_parameters(learn):
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    return [n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])]


def make_learner(dls=None, *, cbs=(), callback=None, num_members=2, seed=0, **kwargs):
    """Build a Learner as a user does, with the callback added."""
    dls = dls or mixmo_dls()
    random = torch.Generator().manual_seed(3)
    model = create_model("wrn10_1", dls.c, num_members, generator=random)
    callback = callback or MixMoCallback(seed=seed)
    kwargs.setdefault("loss_func", CrossEntropyLossFlat())
    return quiet(Learner(dls, model, cbs=[callback, *cbs], metrics=[accuracy], **kwargs))


def quiet(learn):
    """Make a Learner print nothing."""
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


class BatchRecorder(Callback):
    """Record the inputs and outputs of the network and the targets of the loss."""

    order, run_valid = 1000, False

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_pred(self):
        self.seen.append((*self.learn.xb, *self.learn.yb, self.learn.pred.detach()))


class SkipBackward(Callback):
    """Skip the backward pass, which takes most of the time, where weights do not matter."""

    run_valid = False

    def before_backward(self):
        raise CancelBackwardException


class RaiseAt(Callback):
    """Raise an error in the middle of an epoch."""

    run_valid = False

    def __init__(self, error, step=2):
        super().__init__()
        self.error, self.step = error, step

    def after_pred(self):
        if self.learn.train_iter == self.step:
            raise self.error


def state(learn):
    return {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
