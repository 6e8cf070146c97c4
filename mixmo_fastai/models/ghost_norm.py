"""BatchNorm over groups of a batch ("ghost" batches).

A GPU needs large batches for full utilisation, but BatchNorm statistics over a large batch have
less noise, which lowers accuracy. Statistics over a group are as noisy as those of a small batch.
Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", NeurIPS 2017.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import check_count
from mixmo_fastai.models.norms import replace_norms


class GhostBatchNorm2d(nn.BatchNorm2d):
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

    def __init__(self, num_features: int, group_size: int, **kwargs: object) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[arg-type]
        check_count("group_size", group_size, minimum=2)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        num_groups = -(-len(x) // self.group_size)
        if not self.training or num_groups < 2:
            return super().forward(x)
        small, num_larger = divmod(len(x), num_groups)
        sizes = [small + 1] * num_larger + [small] * (num_groups - num_larger)
        # The backward pass of `split` allocates one gradient; that of each slice would allocate a
        # gradient of the whole batch.
        groups = torch.split(x, sizes)
        return torch.cat([super(GhostBatchNorm2d, self).forward(group) for group in groups])

    def extra_repr(self) -> str:
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, group_size={self.group_size}"


def use_ghost_batches(network: nn.Module, group_size: int) -> nn.Module:
    """Replace every `nn.BatchNorm2d` in a network by `GhostBatchNorm2d`, in place, with its state.

    Args:
        network: any module; subclasses of `nn.BatchNorm2d` in it are not replaced.
        group_size: images per group; 0 leaves the network unchanged.

    Returns:
        The network.

    Raises:
        InputError: group_size is neither 0 nor at least 2.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> use_ghost_batches(network, group_size=16)[1].group_size
        16
    """
    if group_size == 0:
        return network
    return replace_norms(network, nn.BatchNorm2d, partial(GhostBatchNorm2d, group_size=group_size))


def use_full_batches(network: nn.Module) -> nn.Module:
    """Replace every `GhostBatchNorm2d` in a network by `nn.BatchNorm2d`, in place, with its state.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), GhostBatchNorm2d(8, group_size=16))
        >>> type(use_full_batches(network)[1]) is nn.BatchNorm2d
        True
    """
    return replace_norms(network, GhostBatchNorm2d, nn.BatchNorm2d)
