"""Mean and standard deviation of pixels, per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

_BATCH = 512


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation per channel, for pixels scaled to [0, 1].

    The result is exact, since it is computed from histograms; batches avoid loading a memory-mapped
    array at once. The standard deviation is at least 1/255, so that images of a single colour can
    be normalised.

    Args:
        pixels: (N, C, H, W) uint8.
    """
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.float64)
    for start in range(0, len(pixels), _BATCH):
        counts += _level_counts(pixels[start : start + _BATCH])
    levels = torch.arange(256, dtype=torch.float64) / 255
    fractions = counts / counts.sum(1, keepdim=True)
    mean = fractions @ levels  # (C,)
    variance = (fractions * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel: the given ones or, if their number differs, their mean.

    Args:
        values: means or standard deviations, one per channel of other images.
        channels: C.
    """
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _level_counts(pixels: Tensor) -> Tensor:
    channels = pixels.transpose(0, 1).flatten(1)  # (C, N·H·W)
    return torch.stack([channel.bincount(minlength=256).double() for channel in channels])
