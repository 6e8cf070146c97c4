"""BatchNorm whose statistics in training are those of the batches of all processes.

Torch's own SyncBatchNorm does this on GPUs alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes of a group, on any device.

    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`. All processes must have
    batches of one size.

    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        mean = _mean_over_processes(x.mean(dim=(0, 2, 3)))  # (C,)
        centred = x - mean[:, None, None]
        var = _mean_over_processes(centred.square().mean(dim=(0, 2, 3)))
        self._move_running_statistics(mean, var, dist.get_world_size() * x.numel() // x.shape[1])
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
            return centred * scale[:, None, None] + self.bias[:, None, None]
        return centred * scale[:, None, None]

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # torch's sign for a plain average
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        unbiased = var.to(self.running_var.dtype) * (count / max(1, count - 1))
        self.running_var.lerp_(unbiased, share)


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """Make every BatchNorm of a network one over all processes, in place; weights stay.

    Args:
        network: any module; subclasses of `nn.BatchNorm2d` in it stay as they are.

    Returns:
        the network.
    """
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # its state is the same to the last name
    return network


def _mean_over_processes(local: Tensor) -> Tensor:
    summed: Tensor = _SumOverProcesses.apply(local)
    return summed / dist.get_world_size()


class _SumOverProcesses(torch.autograd.Function):
    """A sum that all processes get; what it is used for in each of them flows back to all."""

    @staticmethod
    def forward(ctx: object, local: Tensor) -> Tensor:
        return _summed(local)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(local: Tensor) -> Tensor:
    total = local.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
