"""Unmixing: a readout of your own, in any command of `mixmo`.

python examples/unmixing.py fit cifar10 --recipe small-cifar10/cut-mixmo \
    --set model.readout=unmixing --set mix.mix_prob=1

In training, each head reads the core's maps mainly where its own member was seen. The settings of
the paper; in this project's trainings it helped nowhere, see docs/results.md.

Shapes: B batch, M members, F channels and a b size of the core's maps, D h w encoder's output.
Source: Sun, Ramé, Masson, Thome, Cord, "Towards efficient feature sharing in MIMO architectures",
CVPR workshops 2022, arXiv 2205.10139.
"""

import torch

from mixmo_fastai.cli import main
from mixmo_fastai.config.choices import READOUTS
from mixmo_fastai.errors import check_fraction
from mixmo_fastai.models.readout import Readout, average, resize_masks


class Unmixing(Readout):
    """Average the maps with weights w_i + m (1 - w_i), where w_i is the mask of member i.

    m rises linearly from 0 to 1 in the first part of training ("fadeout"). Afterwards, and without
    masks, all heads read the plain average, so the network can be fused as without this readout.

    Args:
        span: fraction of training in which m rises.
        normalized: whether the weighted sum is divided by the sum of the weights, instead of by the
            number of positions.

    Raises:
        InputError: `span` is outside [0, 1].
    """

    is_fusable = True

    def __init__(self, span=1 / 3, *, normalized=False):
        super().__init__()
        check_fraction("span", span)
        self.span, self.normalized = span, normalized
        # A tensor, so that a compiled network is not compiled again when m changes.
        self.register_buffer("fadeout", torch.zeros(()), persistent=False)

    def set_progress(self, progress):
        """Set m for a completed fraction of training."""
        self.fadeout.fill_(min(1.0, progress / self.span) if self.span else 1.0)

    def forward(self, maps, masks):
        """Compute one embedding per member: (B, F, a, b), (B, M, 1 or D, h, w) -> (B, M, F)."""
        if masks is None:
            return average(maps)
        weights = resize_masks(masks, maps.shape[-2:])  # (B, M, a, b)
        weights = (weights + self.fadeout * (1 - weights)).flatten(2)
        total = weights.sum(dim=2, keepdim=True) if self.normalized else weights.shape[2]
        return (weights / total).to(maps.dtype) @ maps.flatten(2).transpose(1, 2)


class NormalizedUnmixing(Unmixing):
    """Unmixing by weighted means: the weights of each member sum to one."""

    def __init__(self, span=1 / 3):
        super().__init__(span, normalized=True)


# Registered in every process that imports this file, also in the workers of a loader.
READOUTS["unmixing"] = f"{__name__}:Unmixing"
READOUTS["unmixing-normalized"] = f"{__name__}:NormalizedUnmixing"

if __name__ == "__main__":
    main(__file__)
