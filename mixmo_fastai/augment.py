"""Augmentation of whole batches: crop, flip and normalise uint8 images where they lie.

Shapes: N stored images, n images of the batch, C channels, H W image size, p crop padding.

Offsets and flips are drawn by `draw_crops` and `draw_flips`; `StoredImages.windows` and `normalize`
apply them and draw nothing.
"""

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError

_FLIPPED_AT_ONCE = 4096


class StoredImages:
    """Padded images, laid out so that any window of any of them is H runs of bytes.

    A batch of windows is one gather of rows, whatever the crops and flips are: pixels lie channels
    last, so that a row of a window is contiguous, and every image is there mirrored as well where
    flips are asked for. Windows come out channels last, as convolutions like them.

    Args:
        images: (N, C, H, W) uint8.
        padding: p, of black, on each side.
        mirrored: whether flips will be asked for; takes the memory twice.
    """

    def __init__(self, images: Tensor, padding: int = 0, *, mirrored: bool = False) -> None:
        self.image_shape, self.padding, self.num_images = images.shape[1:], padding, len(images)
        channels, height, width = self.image_shape
        padded = (height + 2 * padding, width + 2 * padding, channels)
        copies = 2 if mirrored else 1
        self.pixels = images.new_zeros((copies * self.num_images, *padded))
        inner = self.pixels[:, padding : padding + height, padding : padding + width]
        inner[: self.num_images] = images.permute(0, 2, 3, 1)
        if mirrored:  # some at a time: a flip is a copy
            for start in range(0, self.num_images, _FLIPPED_AT_ONCE):
                part = images[start : start + _FLIPPED_AT_ONCE].permute(0, 2, 3, 1).flip(2)
                inner[self.num_images + start :][: len(part)] = part

    @staticmethod
    def num_bytes(num_images: int, shape: torch.Size, padding: int, mirrored: bool) -> int:
        """Tell what so many images of (C, H, W) take."""
        channels, height, width = shape
        padded = channels * (height + 2 * padding) * (width + 2 * padding)
        return num_images * padded * (2 if mirrored else 1)

    def to(self, device: torch.device | str) -> "StoredImages":
        """Move the images."""
        self.pixels = self.pixels.to(device)
        return self

    def windows(
        self, indices: Tensor, corners: Tensor | None = None, flips: Tensor | None = None
    ) -> Tensor:
        """Cut one window out of each chosen image.

        Args:
            indices: (n,) int64, which stored image each window is of.
            corners: (n, 2) int64 in [0, 2p], row and column, from `draw_crops`; the plain image
                where not given.
            flips: (n,) bool, which windows are mirrored; none where not given.

        Returns:
            (n, C, H, W) uint8, channels last in memory.
        """
        channels, height, width = self.image_shape
        row_bytes = self.pixels.shape[2] * channels
        if corners is None:
            corners = indices.new_full((len(indices), 2), self.padding)
        rows, columns = corners.unbind(1)
        if flips is not None:
            # A window of the mirrored image, counted from its other side.
            indices = indices + self.num_images * flips
            columns = torch.where(flips, 2 * self.padding - columns, columns)
        start = (indices * self.pixels.shape[1] + rows) * row_bytes + columns * channels
        offsets = start[:, None] + row_bytes * torch.arange(height, device=start.device)
        # Every place at which a row may begin, as a view: row r starts at byte r.
        size = width * channels
        runs = self.pixels.view(-1).as_strided((self.pixels.numel() - size + 1, size), (1, 1))
        gathered = runs.index_select(0, offsets.flatten())
        return gathered.view(-1, height, width, channels).permute(0, 3, 1, 2)


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


def draw_alternating_flips(
    count: int,
    copies: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw which copies are mirrored, every second one of an image: (copies · n,) bool.

    Chance decides only whether an image's first copy is; copy s // n of image s mod n lies at s.
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, there from epoch to
    epoch.
    """
    first = draw_flips(count, generator=generator, device=device)
    odd = torch.arange(copies, device=device)[:, None] % 2 == 1
    return (first ^ odd).flatten()


class Normalizer:
    """Turns uint8 pixels into standardised floats: (pixels / 255 - mean) / std.

    Args:
        mean: (C,) float, of pixels in [0, 1].
        std: (C,) float, of pixels in [0, 1].
        width: W of the images to come.
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        # Whole rows at a time: an inner loop over three channels would be slow.
        self.scale, self.shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)

    def to(self, device: torch.device | str) -> "Normalizer":
        """Move what pixels are multiplied with."""
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8, channels last for speed -> the same in float, channels last."""
        if images.dtype != torch.uint8:
            raise InputError(f"Pixels to be normalised must be uint8; got {images.dtype}.")
        rows = images.permute(0, 2, 3, 1).flatten(2).to(self.scale.dtype)  # (n, H, W·C)
        values = torch.addcmul(self.shift, rows, self.scale, out=rows)
        return values.view(*values.shape[:2], images.shape[3], -1).permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardise pixels once; see `Normalizer`.

    Args:
        images: (n, C, H, W) uint8.
        mean: (C,) float, of pixels in [0, 1].
        std: (C,) float, of pixels in [0, 1].

    Returns:
        (pixels / 255 - mean) / std, (n, C, H, W) in the type of `mean`, channels last.
    """
    return Normalizer(mean, std, images.shape[3])(images)
