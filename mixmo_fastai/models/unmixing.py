"""Unmixing: in training, each head reads the core's maps mainly where its own member was seen.

Shapes: B batch, M members, F channels and a b size of the core's maps, D h w encoder's output.
Source: Sun, Ramé, Masson, Thome, Cord, "Towards efficient feature sharing in MIMO architectures",
CVPR workshops 2022, arXiv 2205.10139.
"""

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import check_fraction
from mixmo_fastai.models.readout import Readout, average, resize_masks


class Unmixing(Readout):
    """Average the maps with weights w_i + m (1 - w_i), where w_i is the mask of member i.

    m rises linearly from 0 to 1 in the first part of training ("fadeout"). Afterwards, and without
    masks, all heads read the plain average, so the network can be fused as without this readout.
    `MixMoCallback` calls `set_progress` before every step.

    Args:
        span: fraction of training in which m rises.
        normalized: whether the weighted sum is divided by the sum of the weights, instead of by the
            number of positions.

    Raises:
        InputError: `span` is outside [0, 1].

    Example:
        >>> maps = torch.tensor([[[[4.0, 0.0], [4.0, 0.0]]]])  # (1, 1, 2, 2)
        >>> left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> masks = torch.stack([left, 1 - left])[None, :, None]  # (1, 2, 1, 2, 2)
        >>> readout = Unmixing()
        >>> readout(maps, masks).flatten(), readout(maps, None).flatten()
        (tensor([2., 0.]), tensor([2.]))
        >>> readout.set_progress(1.0)
        >>> readout(maps, masks).flatten()
        tensor([2., 2.])
    """

    is_fusable = True
    fadeout: Tensor

    def __init__(self, span: float = 1 / 3, *, normalized: bool = False) -> None:
        super().__init__()
        check_fraction("span", span)
        self.span, self.normalized = span, normalized
        # A tensor, so that a compiled network is not compiled again when m changes.
        self.register_buffer("fadeout", torch.zeros(()), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set m for a completed fraction of training.

        Example:
            >>> readout = Unmixing(span=0.5)
            >>> readout.set_progress(0.25)
            >>> readout.fadeout
            tensor(0.5000)
        """
        self.fadeout.fill_(min(1.0, progress / self.span) if self.span else 1.0)

    def forward(self, maps: Tensor, masks: Tensor | None) -> Tensor:
        if masks is None:
            return average(maps)
        weights = resize_masks(masks, (maps.shape[-2], maps.shape[-1]))  # (B, M, a, b)
        weights = weights + self.fadeout * (1 - weights)
        positions = weights.flatten(2)
        total = positions.sum(dim=2, keepdim=True) if self.normalized else positions.shape[2]
        fractions = positions / total
        embedding: Tensor = fractions.to(maps.dtype) @ maps.flatten(2).transpose(1, 2)  # (B, M, F)
        return embedding


class NormalizedUnmixing(Unmixing):
    """Unmixing by weighted means: the weights of each member sum to one.

    Example:
        >>> NormalizedUnmixing().normalized
        True
    """

    def __init__(self, span: float = 1 / 3) -> None:
        super().__init__(span, normalized=True)


def set_readout_progress(network: nn.Module, progress: float) -> None:
    """Pass the completed fraction of training to a network's readout, if it has `set_progress`.

    Example:
        >>> network = nn.Module()
        >>> network.readout = Unmixing()
        >>> set_readout_progress(network, 1.0)
        >>> network.readout.fadeout
        tensor(1.)
    """
    set_progress = getattr(getattr(network, "readout", None), "set_progress", None)
    if set_progress is not None:
        set_progress(progress)
