"""BatchNorm over groups of a batch ("ghost" batches).

A GPU needs large batches for full utilisation, but BatchNorm statistics over a large batch have
less noise, which lowers accuracy. Statistics over a group are as noisy as those of a small batch.
Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", NeurIPS 2017.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import check_count
from mixmo_fastai.models.norms import Activated, check_norms, replace_norms, timm_norm


class _Ghost:
    """Mixin of a BatchNorm: training statistics per group of consecutive images."""

    training: bool

    def __init__(self, num_features: int, group_size: int, **kwargs: object) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[call-arg]
        check_count("group_size", group_size, minimum=2)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each group by its own statistics."""
        normalize: Any = super().forward  # type: ignore[misc]
        num_groups = -(-len(x) // self.group_size)
        if not self.training or num_groups < 2:
            out: Tensor = normalize(x)
            return out
        small, num_larger = divmod(len(x), num_groups)
        sizes = [small + 1] * num_larger + [small] * (num_groups - num_larger)
        # The backward pass of `split` allocates one gradient; that of each slice would allocate a
        # gradient of the whole batch.
        return torch.cat([normalize(group) for group in torch.split(x, sizes)])

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        inherited: str = super().extra_repr()  # type: ignore[misc]
        return f"{inherited}, group_size={self.group_size}"


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """BatchNorm with training statistics per group of consecutive images in the batch.

    Running statistics are updated once per group, as if each group were a batch. Parameters,
    buffers and evaluation are those of `nn.BatchNorm2d`, so state dicts are interchangeable.

    Args:
        num_features: C.
        group_size: maximum number of images per group; a batch is split into the smallest possible
            number of groups, whose sizes differ by at most one image.
        kwargs: passed to `nn.BatchNorm2d`.

    With fastai's `distrib_ctx`, pass `sync_bn=False`; otherwise fastai replaces this layer by
    BatchNorm over all processes.

    Shapes: (B, C, H, W) -> (B, C, H, W).

    Raises:
        InputError: group_size is below 2.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 10.0, 14.0]).view(4, 1, 1, 1)
        >>> y = GhostBatchNorm2d(1, group_size=2)(x)  # means 2 and 12, standard deviations 1 and 2
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [-1.0, 1.0, -1.0, 1.0]
    """


class GhostBatchNormAct2d(Activated, GhostBatchNorm2d):
    """The same in place of timm's BatchNormAct2d.

    Example:
        >>> norm = GhostBatchNormAct2d(1, group_size=2)
        >>> norm.drop, norm.act = nn.Identity(), nn.ReLU()
        >>> y = norm(torch.tensor([1.0, 3.0, 10.0, 14.0]).view(4, 1, 1, 1))
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [0.0, 1.0, 0.0, 1.0]
    """


def use_ghost_batches(network: nn.Module, group_size: int) -> nn.Module:
    """Replace every BatchNorm of maps in a network by one over groups, in place, with its state.

    `nn.BatchNorm1d`, as in the head of fastai's `vision_learner`, stays: its rows may be parts of
    images.

    Args:
        network: any module.
        group_size: images per group; 0 leaves the network unchanged.

    Returns:
        The network.

    Raises:
        InputError: group_size is neither 0 nor at least 2, or the network has layers derived from
            BatchNorm that are neither torch's nor timm's.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> use_ghost_batches(network, group_size=16)[1].group_size
        16
    """
    if group_size == 0:
        return network
    check_norms(network, "ghost batches")
    kinds = {
        nn.BatchNorm2d: GhostBatchNorm2d,
        timm_norm(): GhostBatchNormAct2d,
    }
    return replace_norms(
        network, {old: partial(new, group_size=group_size) for old, new in kinds.items()}
    )


def use_full_batches(network: nn.Module) -> nn.Module:
    """Replace every BatchNorm over groups in a network by the original one, with its state.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), GhostBatchNorm2d(8, group_size=16))
        >>> type(use_full_batches(network)[1]) is nn.BatchNorm2d
        True
    """
    return replace_norms(
        network,
        {
            GhostBatchNorm2d: nn.BatchNorm2d,
            GhostBatchNormAct2d: _new_timm_norm,
        },
    )


def _new_timm_norm(*args: Any, **kwargs: Any) -> nn.Module:
    layers = import_module("timm.layers")  # an optional dependency, which the network needs
    norm: nn.Module = layers.BatchNormAct2d(*args, **kwargs)
    return norm
