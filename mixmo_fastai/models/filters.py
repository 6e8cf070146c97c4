"""Filter use: the fraction of active filters per layer, and the norms of the encoders' filters.

Shapes: L convolutions of the core, T thresholds, M members, D feature channels after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, poster and supplementary material.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import MixMoModel

THRESHOLDS = (0.2, 0.3, 0.4, 0.5)
"""Published thresholds: a filter is active above this fraction of its layer's largest norm."""


@dataclass(frozen=True, eq=False)
class FilterUse:
    """Fraction of active filters in each layer.

    Attributes:
        layers: module names of the core's L convolutions, in order, such as core.groups.0.0.conv1.
        fractions: (L, T) in [0, 1]; 0 only for a layer whose weights are all zero.
        thresholds: T fractions of the largest norm.

    Example:
        >>> fractions = torch.tensor([[1.0, 0.75], [0.5, 0.25]])
        >>> FilterUse(("core.conv1", "core.conv2"), fractions, thresholds=(0.2, 0.4)).average
        tensor([0.7500, 0.5000])
    """

    layers: tuple[str, ...]
    fractions: Tensor
    thresholds: tuple[float, ...]

    @property
    def average(self) -> Tensor:
        """Unweighted mean over layers: (T,)."""
        return self.fractions.mean(dim=0)


def filter_use(model: MixMoModel, thresholds: tuple[float, ...] = THRESHOLDS) -> FilterUse:
    """Compute the fraction of active filters in each convolution of the core, by L1 norm.

    A filter consists of the weights of one output channel. It is active if its norm exceeds a
    threshold times the largest norm in its layer. A layer whose weights are all zero has no active
    filters.

    Args:
        model: a trained network.
        thresholds: fractions of the largest norm, each in [0, 1).

    Raises:
        InputError: the core has no convolution, or a threshold is out of range.

    Example:
        >>> convolution = nn.Conv2d(1, 4, kernel_size=1)
        >>> convolution.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
        >>> core = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = MixMoModel([nn.Conv2d(3, 1, 3)], core, [nn.Linear(4, 10)])
        >>> filter_use(model, thresholds=(0.3, 0.6)).fractions  # norms above 1.2 and above 2.4
        tensor([[0.7500, 0.5000]], dtype=torch.float64)
    """
    if not thresholds or not all(0 <= t < 1 for t in thresholds):
        raise InputError(f"thresholds must be at least 0 and below 1; got {thresholds}.")
    layers = {n: m for n, m in model.core.named_modules() if isinstance(m, nn.Conv2d)}
    if not layers:
        raise InputError("The core has no convolution (nn.Conv2d); cannot compute filter use.")
    fractions_of_max = torch.tensor(thresholds, dtype=torch.float64)
    rows = []
    for layer in layers.values():
        norms = _l1_norms(layer.weight)
        rows.append((norms[:, None] > fractions_of_max * norms.max()).double().mean(dim=0))
    return FilterUse(tuple(f"core.{name}" for name in layers), torch.stack(rows), thresholds)


def encoder_norms(model: MixMoModel) -> Tensor:
    """Compute the L1 norm of each encoder's filter for each feature channel: (M, D).

    A channel with a large norm for one member and small norms for the others is specific to that
    member.

    Raises:
        InputError: an encoder has no convolution.

    Example:
        >>> encoder = nn.Conv2d(3, 2, kernel_size=1)
        >>> encoder.weight.data = torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.5, 0.0]]).view(2, 3, 1, 1)
        >>> encoder_norms(MixMoModel([encoder], nn.Flatten(), [nn.Linear(2, 10)]))
        tensor([[3.0000, 0.5000]], dtype=torch.float64)
    """
    norms = []
    for encoder in model.encoders:
        layer = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d)), None)
        if layer is None:
            raise InputError(f"The encoder {type(encoder).__name__} has no convolution.")
        norms.append(_l1_norms(layer.weight))
    return torch.stack(norms)


def _l1_norms(weight: Tensor) -> Tensor:
    """Compute the L1 norm of each filter: (out, in, kh, kw) -> (out,)."""
    return weight.detach().cpu().double().abs().flatten(1).sum(dim=1)
