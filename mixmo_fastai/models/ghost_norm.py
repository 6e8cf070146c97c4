"""BatchNorm over groups of a batch ("ghost" batches).

A large batch keeps a GPU busy; BatchNorm over all of it normalises with less noise, which costs
accuracy. In groups, each image is normalised among as many others as in a small batch.
Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", NeurIPS 2017.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of consecutive groups of the batch.

    Running statistics take in one group after the other, as if each had been a batch. Parameters,
    buffers and evaluation are those of `nn.BatchNorm2d`, so that weights go either way.

    Args:
        num_features: C.
        group_size: images per group; a batch is cut into as few groups of equal size, give or take
            one image, as make none larger.
        kwargs: of `nn.BatchNorm2d`.

    Under fastai's `distrib_ctx` say `sync_bn=False`, or each becomes one over all processes.

    Shapes: (B, C, H, W) -> (B, C, H, W).

    Raises:
        InputError: the size is below 2.
    """

    def __init__(self, num_features: int, group_size: int, **kwargs: object) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[arg-type]
        if group_size < 2:
            raise InputError(f"group_size must be 2 or more; got {group_size}.")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        num_groups = -(-len(x) // self.group_size)
        if not self.training or num_groups < 2:
            return super().forward(x)
        small, num_larger = divmod(len(x), num_groups)
        sizes = [small + 1] * num_larger + [small] * (num_groups - num_larger)
        # One split has one backward pass; slices would each fill a gradient of the whole batch.
        groups = torch.split(x, sizes)
        return torch.cat([super(GhostBatchNorm2d, self).forward(group) for group in groups])

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{own}, group_size={self.group_size}"


def use_ghost_batches(network: nn.Module, group_size: int) -> nn.Module:
    """Make every BatchNorm of a network one over groups, in place; weights stay.

    Args:
        network: any module; subclasses of `nn.BatchNorm2d` in it stay as they are.
        group_size: images per group; 0 leaves the network as it is.

    Returns:
        the network.

    Raises:
        InputError: the size is neither 0 nor 2 or more.
    """
    if group_size == 0:
        return network
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                ghost = partial(GhostBatchNorm2d, group_size=group_size)
                setattr(module, name, _with_weights_of(child, ghost))
    return network


def use_whole_batches(network: nn.Module) -> nn.Module:
    """Make every BatchNorm over groups torch's own, over the whole batch, in place; weights stay.

    Returns:
        the network.
    """
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, GhostBatchNorm2d):
                setattr(module, name, _with_weights_of(child, nn.BatchNorm2d))
    return network


def _with_weights_of(norm: nn.BatchNorm2d, make: Callable[..., nn.BatchNorm2d]) -> nn.BatchNorm2d:
    made = make(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    made.train(norm.training)
    # The very parameters, for optimizers that hold them already.
    made._parameters.update(norm._parameters)
    made._buffers.update(norm._buffers)
    return made
