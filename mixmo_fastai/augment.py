"""Augmentation of whole batches: crop, flip and normalise uint8 images where they lie.

Shapes: N stored images, n images of the batch, C channels, H W image size, p crop padding.

Offsets and flips are drawn by `draw_crops` and `draw_flips`; `crop`, `flip` and `normalize` apply
them and draw nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad(images: Tensor, padding: int) -> Tensor:
    """Surround images with black: (N, C, H, W) -> (N, C, H + 2p, W + 2p)."""
    return F.pad(images, (padding,) * 4) if padding else images


def draw_crops(
    count: int,
    padding: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the upper left corner of each window: (n, 2) int64, row and column, in [0, 2p]."""
    return torch.randint(2 * padding + 1, (count, 2), generator=generator, device=device)


def draw_flips(
    count: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw which images are mirrored: (n,) bool, each with probability one half."""
    return torch.rand(count, generator=generator, device=device) < 0.5


def crop(padded: Tensor, indices: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Cut one window out of each chosen image, all in one gather.

    Args:
        padded: (N, C, H + 2p, W + 2p), from `pad`.
        indices: (n,) int64, which stored image each window is of.
        corners: (n, 2) int64 in [0, 2p], from `draw_crops`; all p is the plain image.
        padding: p.

    Returns:
        windows (n, C, H, W) in the type of `padded`.
    """
    height, width = (side - 2 * padding for side in padded.shape[2:])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p+1, 2p+1, H, W), a view
    return windows[indices, :, corners[:, 0], corners[:, 1]]


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images whose flip is set: (n, C, H, W) and (n,) bool -> (n, C, H, W)."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 pixels into standardised floats.

    Args:
        images: (n, C, H, W) uint8.
        mean: (C,) float, of pixels in [0, 1].
        std: (C,) float, of pixels in [0, 1].

    Returns:
        (pixels / 255 - mean) / std, (n, C, H, W) in the type of `mean`.
    """
    scale = (1 / (255 * std))[:, None, None]
    shift = (-mean / std)[:, None, None]
    return images.to(mean.dtype).mul_(scale).add_(shift)
