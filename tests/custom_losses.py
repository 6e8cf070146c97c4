"""Losses with class weights and losses of a user's own, for tests of `MixMoLoss`."""

from functools import partial

import torch
import torch.nn.functional as F
from fastai.losses import (
    FocalLoss,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
)
from torch import nn

from mixmo_fastai.mixing import draw_lam, loss_weights

CLASS_WEIGHTS = torch.tensor([1.0, 9.0, 4.0, 1.0, 7.0])
FASTAI_LOSSES_WITH_CLASS_WEIGHTS = [
    LabelSmoothingCrossEntropy(weight=CLASS_WEIGHTS),
    LabelSmoothingCrossEntropy(weight=CLASS_WEIGHTS, reduction="sum"),
    LabelSmoothingCrossEntropyFlat(eps=0.3, weight=CLASS_WEIGHTS),
    FocalLoss(weight=CLASS_WEIGHTS),
    FocalLossFlat(weight=CLASS_WEIGHTS, gamma=1.0),
]


def draw_batch():
    """Draw logits (6, 3, 5), targets (6, 3) and weights (6, 3) of three members."""
    random = torch.Generator().manual_seed(0)
    pred = torch.randn(6, 3, 5, generator=random)
    targets = torch.randint(5, (6, 3), generator=random)
    return pred, targets, loss_weights(draw_lam(6, 3, 2.0, generator=random), 3)


class FixedReductionLoss(nn.Module):
    """A custom loss without a `reduction` attribute."""

    def forward(self, pred, targets):
        return F.cross_entropy(pred, targets, label_smoothing=0.2)


class IgnoredReductionLoss(FixedReductionLoss):
    """A custom loss that ignores its `reduction` attribute."""

    reduction = "mean"


class DataDependentLoss(nn.Module):
    def forward(self, pred, targets):
        selected = pred[targets >= 0]  # its shape depends on the values
        return F.cross_entropy(selected, targets) if float(selected.detach().sum()) else pred.sum()


class CustomCrossEntropy(nn.CrossEntropyLoss):
    """A custom subclass of a torch loss."""

    def forward(self, pred, targets):
        return super().forward(pred, targets.long())


class ElementwiseLoss(nn.Module):
    """A custom loss with reduction, which yields one value per element."""

    def __init__(self):
        super().__init__()
        self.reduction = "mean"

    def forward(self, pred, targets):
        values = pred.exp() * F.one_hot(targets, pred.shape[1])
        return values if self.reduction == "none" else values.mean()


def power(pred, targets, exponent=2.0):
    return (1 - pred.softmax(1).gather(1, targets[:, None])).pow(exponent).mean()


CUSTOM_LOSSES = [
    lambda pred, targets: F.cross_entropy(pred, targets.long()),
    lambda pred, targets: F.cross_entropy(pred, targets, reduction="sum"),
    partial(power, exponent=3.0),
    FixedReductionLoss(),
    IgnoredReductionLoss(),
    DataDependentLoss(),
    CustomCrossEntropy(weight=CLASS_WEIGHTS),
    ElementwiseLoss(),
    partial(F.cross_entropy, reduction="sum"),
]
