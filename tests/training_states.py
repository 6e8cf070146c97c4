"""A tiny training and its complete state, to check that timing its steps changes nothing."""

import random

import numpy as np
import torch

from mixmo_fastai.config.load import recipe_from_mapping

TINY = recipe_from_mapping(
    {
        "data": {"dataset": "digits", "limit": 48, "valid_split": 0.1},
        "model": {"arch": "wrn10_1"},
        "train": {"epochs": 2, "batch_size": 32, "device": "cpu"},
    },
    "here",
)


def state_of(training):
    """Return the complete state of a training as comparable values."""
    learn, loader = training.learn, training.learn.dls.train
    callback = next(cb for cb in learn.cbs if type(cb).__name__ == "MixMoCallback")
    numpy_state = np.random.get_state()
    return {
        "weights": {k: v.clone() for k, v in learn.model.state_dict().items()},
        "gradients": [p.grad for p in learn.model.parameters()],
        "is_training": [m.training for m in learn.model.modules()],
        "draws": (random.getstate(), numpy_state[1].tolist(), numpy_state[2]),
        "torch": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "loader": (loader.epoch, loader.bs, loader.seed, len(loader), id(loader)),
        "order": loader.rng.getstate(),
        "learn": {name: id(value) for name, value in vars(learn).items()},
        "callbacks": [id(cb) for cb in learn.cbs],
        "callback": (callback.epochs_trained, callback.fit_seed, id(callback.learn)),
        "forward": learn.model.forward.__func__,
    }


def assert_unchanged(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name == "weights":
            assert all(torch.equal(v, after[name][k]) for k, v in value.items())
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name
