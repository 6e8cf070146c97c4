"""Learners and networks for tests, and what their training does."""

import torch
from torch import nn


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def fit_and_list_changed_parameters(learn):
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    return [n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])]
