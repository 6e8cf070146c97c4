"""The view of a user's loader whose batches have several copies of each image."""

import pickle
from typing import NamedTuple

import torch
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fasttransform import Transform
from synthetic import fastai_dls
from torch import nn

from mixmo_fastai import mixmo_learner
from mixmo_fastai.data.repeat import expand, repeat_batch

COPIES = 3


class OwnLoader(TfmdDL):
    """A loader of a user."""


class AddPosition(Transform):
    """Add the position in the batch to every image."""

    def encodes(self, x: torch.Tensor):
        if x.ndim < 2:
            return x
        return x + torch.arange(len(x), device=x.device).view(-1, 1)


def make_loader(**kwargs):
    items = [(torch.full((2,), 100.0 * i), torch.tensor(i)) for i in range(6)]
    return OwnLoader(items, bs=2, num_workers=0, device="cpu", **kwargs)


def test_copies_are_transformed_separately():
    loader = make_loader(after_batch=AddPosition())
    view = expand(loader, COPIES).loader
    batches = [*view]
    assert len(batches) == len(view) == 3
    x, y = batches[1]
    assert y.tolist() == [2, 3] * COPIES
    assert x[:, 0].tolist() == [200, 301, 202, 303, 204, 305]
    assert [len(x) for x, _ in loader] == [2, 2, 2]  # the loader itself is unchanged


def test_it_is_an_instance_of_the_loaders_class_with_the_same_attributes():
    loader = make_loader()
    view = expand(loader, COPIES).loader
    assert isinstance(view, OwnLoader)
    assert type(loader) is OwnLoader
    view.of_user = 1
    assert loader.of_user == 1
    loader.bs = 3
    assert [len(x) for x, _ in view] == [3 * COPIES] * 2
    assert "copies" not in vars(loader)


def test_its_order_is_that_of_the_loader():
    def labels(loaders):
        return [y.tolist()[:2] for loader in loaders for _, y in loader]

    def make():
        torch.manual_seed(0)
        loader = make_loader(shuffle=True)
        loader.rng.seed(1)
        return loader

    plain, other = make(), make()
    found = labels([expand(other, COPIES).loader, other, expand(other, 2).loader])
    assert found == labels([plain, plain, plain])
    assert found[:3] != found[3:6]


class Sample(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_named_tuples_are_repeated():
    batch = repeat_batch(Sample(torch.arange(2.0)[:, None], torch.arange(2)), 3)
    assert isinstance(batch, Sample)
    assert batch.x[:, 0].tolist() == [0, 1] * 3
    assert batch.y.tolist() == [0, 1] * 3


def test_it_can_be_pickled():
    view = pickle.loads(pickle.dumps(expand(make_loader(), COPIES).loader))
    assert isinstance(view, OwnLoader)
    assert next(y.tolist() for _, y in view) == [0, 1] * COPIES


def test_callbacks_see_a_loader_of_the_users_class():
    kinds = set()

    class Seen(Callback):
        run_valid = False

        def before_batch(self):
            kinds.add(isinstance(self.learn.dl, TfmdDL))
            kinds.add(self.learn.dl.n == len(self.learn.dls.train_ds))

    learn = mixmo_learner(fastai_dls(), "wrn10_1", loss_func=nn.CrossEntropyLoss(), cbs=Seen())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    assert kinds == {True}
    assert type(learn.dls.train) is TfmdDL
