"""BatchNorm with training statistics over the batches of all processes.

Torch's SyncBatchNorm supports GPUs only.
"""

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmo_fastai.models.norms import Activated, check_norms, replace_norms, timm_norm


class _Synced:
    """Mixin of a BatchNorm: training statistics over the batches of all processes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Normalise by the statistics of all processes."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        other_axes = [axis for axis in range(x.ndim) if axis != 1]
        by_channel = (-1, *[1] * (x.ndim - 2))
        mean = _mean_over_processes(x.mean(dim=other_axes))  # (C,)
        centred = x - mean.view(by_channel)
        var = _mean_over_processes(centred.square().mean(dim=other_axes))
        self._update_running_statistics(mean, var, dist.get_world_size() * x.numel() // x.shape[1])
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
            out: Tensor = centred * scale.view(by_channel) + self.bias.view(by_channel)
        else:
            out = centred * scale.view(by_channel)
        return out

    @torch.no_grad()
    def _update_running_statistics(self: Any, mean: Tensor, var: Tensor, count: int) -> None:
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


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
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


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """The same for features (B, C), as in the head of fastai's `vision_learner`.

    Example:
        >>> y = SyncedBatchNorm1d(1)(torch.tensor([[1.0], [3.0]]))
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [-1.0, 1.0]
    """


class SyncedBatchNormAct2d(Activated, SyncedBatchNorm2d):
    """The same in place of timm's BatchNormAct2d.

    Example:
        >>> norm = SyncedBatchNormAct2d(1)
        >>> norm.drop, norm.act = nn.Identity(), nn.ReLU()
        >>> y = norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [0.0, 1.0]
    """


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """Convert every BatchNorm in a network to one over all processes, in place, with its state.

    Args:
        network: any module.

    Returns:
        The network.

    Raises:
        InputError: the network has layers derived from BatchNorm that are neither torch's nor
            timm's.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(sync_batch_norm(network)[1]) is SyncedBatchNorm2d
        True
    """
    check_norms(network, "the synchronisation over processes")
    kinds: dict[type[nn.Module] | None, Any] = {
        nn.BatchNorm1d: SyncedBatchNorm1d,
        nn.BatchNorm2d: SyncedBatchNorm2d,
        timm_norm(): SyncedBatchNormAct2d,
    }
    return replace_norms(network, kinds)


def sync_on_gpu(network: nn.Module) -> nn.Module:
    """Convert every BatchNorm in a network to torch's SyncBatchNorm, in place, with its state.

    timm's BatchNormAct2d keeps its activation.

    Raises:
        InputError: the network has layers derived from BatchNorm that are neither torch's nor
            timm's.

    Example:
        >>> type(sync_on_gpu(nn.Sequential(nn.BatchNorm2d(2)))[0]).__name__
        'SyncBatchNorm'
    """
    check_norms(network, "the synchronisation over processes")
    kinds: dict[type[nn.Module] | None, Any] = {
        nn.BatchNorm1d: nn.SyncBatchNorm,
        nn.BatchNorm2d: nn.SyncBatchNorm,
        nn.BatchNorm3d: nn.SyncBatchNorm,
    }
    if (norm := timm_norm()) is not None:
        kinds[norm] = import_module("timm.layers").SyncBatchNormAct
    return replace_norms(network, kinds)


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
