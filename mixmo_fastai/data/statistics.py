"""Mean and deviation of pixels, per channel."""

import torch
from torch import Tensor

_BATCH = 512


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and the standard deviation per channel, of pixels scaled to [0, 1].

    Exact, since it counts levels; the batches keep a mapped array out of memory. The deviation is
    at least one level, so that an image of one colour can be divided by it.

    Args:
        pixels: (N, C, H, W) uint8.
    """
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.float64)
    for start in range(0, len(pixels), _BATCH):
        counts += _level_counts(pixels[start : start + _BATCH])
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels  # (C,)
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())


def _level_counts(pixels: Tensor) -> Tensor:
    channels = pixels.transpose(0, 1).flatten(1)  # (C, N·H·W)
    return torch.stack([channel.bincount(minlength=256).double() for channel in channels])
