"""Filter use: how much of its width a network puts to work, and where its encoders specialise.

Shapes: L convolutions of the core, T thresholds, M members, D feature channels after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, poster and supplementary material.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import MixMoModel

THRESHOLDS = (0.2, 0.3, 0.4, 0.5)
"""Shares of the largest norm of a layer above which a filter counts as active, as published."""


@dataclass(frozen=True, eq=False)
class FilterUse:
    """Which share of each layer's filters is active.

    Attributes:
        layers: L module names of convolutions of the core, as core.groups.0.0.conv1, in its order.
        shares: (L, T) in (0, 1].
        thresholds: T shares of the largest norm.
    """

    layers: tuple[str, ...]
    shares: Tensor
    thresholds: tuple[float, ...]

    @property
    def average(self) -> Tensor:
        """The mean over layers, each counting alike: (T,)."""
        return self.shares.mean(dim=0)


def filter_use(model: MixMoModel, thresholds: tuple[float, ...] = THRESHOLDS) -> FilterUse:
    """Measure the filters of the core by their L1 norm.

    A filter is the part of a convolution that makes one output channel. It is active where its norm
    exceeds a share of the largest one of its layer; a layer whose weights are all zero has none.

    Args:
        model: trained.
        thresholds: those shares, each in [0, 1).

    Raises:
        InputError: the core has no convolution, or a threshold is out of range.
    """
    if not thresholds or not all(0 <= t < 1 for t in thresholds):
        raise InputError(f"thresholds must be at least 0 and below 1; got {thresholds}.")
    layers = {n: m for n, m in model.core.named_modules() if isinstance(m, nn.Conv2d)}
    if not layers:
        raise InputError("The core has no convolution whose filters could be measured.")
    limits = torch.tensor(thresholds, dtype=torch.float64)
    rows = []
    for layer in layers.values():
        norms = _l1_norms(layer.weight)
        rows.append((norms[:, None] > limits * norms.max()).double().mean(dim=0))
    return FilterUse(tuple(f"core.{name}" for name in layers), torch.stack(rows), thresholds)


def encoder_norms(model: MixMoModel) -> Tensor:
    """Compute the L1 norm of each encoder's filter for each feature channel: (M, D).

    Where one member's norm is large and the others' small, the channel belongs to that member.

    Raises:
        InputError: an encoder has no convolution.
    """
    norms = []
    for encoder in model.encoders:
        layer = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d)), None)
        if layer is None:
            raise InputError(f"The encoder {type(encoder).__name__} has no convolution.")
        norms.append(_l1_norms(layer.weight))
    return torch.stack(norms)


def _l1_norms(weight: Tensor) -> Tensor:
    """(out, in, kh, kw) -> (out,)."""
    return weight.detach().cpu().double().abs().flatten(1).sum(dim=1)
