"""BatchNorm with training statistics over the batches of all processes.

Torch's SyncBatchNorm supports GPUs only.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmo_fastai.models.norms import replace_norms


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes of a group, on any device.

    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`. The batch size must be the
    same in all processes.

    Shapes: (B, C, H, W) -> (B, C, H, W).

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        >>> y = SyncedBatchNorm2d(1)(x)  # one process
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [-1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        mean = _mean_over_processes(x.mean(dim=(0, 2, 3)))  # (C,)
        centred = x - mean[:, None, None]
        var = _mean_over_processes(centred.square().mean(dim=(0, 2, 3)))
        self._update_running_statistics(mean, var, dist.get_world_size() * x.numel() // x.shape[1])
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
            return centred * scale[:, None, None] + self.bias[:, None, None]
        return centred * scale[:, None, None]

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # torch's convention for a cumulative average
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = var.to(self.running_var.dtype) * (count / max(1, count - 1))
        self.running_var.lerp_(unbiased, momentum)


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """Convert every `nn.BatchNorm2d` in a network to `SyncedBatchNorm2d`, in place, with its state.

    Args:
        network: any module; subclasses of `nn.BatchNorm2d` in it are not changed.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(sync_batch_norm(network)[1]) is SyncedBatchNorm2d
        True
    """
    return replace_norms(network, nn.BatchNorm2d, SyncedBatchNorm2d)


def _mean_over_processes(local: Tensor) -> Tensor:
    summed: Tensor = _SumOverProcesses.apply(local)
    return summed / dist.get_world_size()


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce sum whose backward pass sums the gradients over all processes."""

    @staticmethod
    def forward(ctx: object, local: Tensor) -> Tensor:
        return _all_reduce_sum(local)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return _all_reduce_sum(gradients[0])


def _all_reduce_sum(local: Tensor) -> Tensor:
    total = local.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
