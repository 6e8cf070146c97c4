"""Random resized crops of whole batches, on their device.

Shapes: P positions of a batch, C channels, H W image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from mixmo_fastai.data.transforms import BatchTransform, OriginalCrop
from mixmo_fastai.errors import InputError


@dataclass(frozen=True)
class ResizedCrop(BatchTransform):
    """Random resized crops of images that have the size of the result.

    Attributes:
        scale: see `random_resized_crop`.
        ratio: see `random_resized_crop`.
    """

    scale: Sequence[float] | None = None
    ratio: Sequence[float] = (3 / 4, 4 / 3)

    def from_original(self) -> OriginalCrop:
        """Return the same crops, but of the image files at their own size.

        They require the streaming loader and images that are files.
        """
        # A function that can be sent to workers, unlike that of this object.
        return OriginalCrop(partial(_draw_boxes, self.scale, self.ratio))


def random_resized_crop(
    scale: Sequence[float] | None = None, ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> ResizedCrop:
    """Return random crops that are resized to the image size, as in training on ImageNet.

    Boxes are drawn as by torchvision's `RandomResizedCrop`, and resized with bilinear
    interpolation. They are boxes of images that already have the size of the result, so
    antialiasing would have no effect; `ResizedCrop.from_original` crops the files instead.

    Args:
        scale: smallest and largest fraction of the image's area; None for 0.08 and 1, as on
            ImageNet, but at least 25 pixels: of an image of 8 x 8 pixels, 0.39.
        ratio: smallest and largest ratio of width to height.

    Raises:
        InputError: a range is empty, or not positive.
    """
    for name, bounds, highest in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
        if bounds is None:
            continue
        is_pair = isinstance(bounds, Sequence) and len(bounds) == 2
        if not is_pair or not 0 < bounds[0] <= bounds[1] <= highest:
            limit = " and at most 1" if name == "scale" else ""
            raise InputError(
                f"{name} must be two numbers in ascending order, above 0{limit}; got {bounds!r}."
            )

    def crop(images: Tensor, generator: Generator) -> Tensor:
        height, width = images.shape[-2:]
        boxes = _draw_boxes(scale, ratio, len(images), (height, width), generator)
        return resize_boxes(images, boxes)

    return ResizedCrop(crop, scale, ratio)


def _draw_boxes(
    scale: Sequence[float] | None,
    ratio: Sequence[float],
    count: int,
    size: tuple[int, int],
    generator: Generator,
) -> Tensor:
    """Draw boxes (P, 4) for images of one size (H, W), with the default areas for None."""
    areas = default_scale(*size) if scale is None else scale
    return draw_boxes(count, size, areas, ratio, generator)


def default_scale(height: int, width: int) -> tuple[float, float]:
    """Return the default areas of crops, as fractions of the image's area."""
    return min(1.0, max(0.08, MIN_PIXELS / (height * width))), 1.0


MIN_PIXELS = 25
_ATTEMPTS = 10


def draw_boxes(
    count: int,
    size: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    generator: Generator,
) -> Tensor:
    """Draw boxes of random area and shape, distributed as in torchvision's `RandomResizedCrop`.

    Up to ten pairs of area and ratio are drawn per box, until the box fits into the image.
    Otherwise the box is the largest centred box with the nearest permitted ratio.

    Args:
        count: P, number of boxes.
        size: (H, W) of the images.
        scale: see `random_resized_crop`.
        ratio: see `random_resized_crop`.
        generator: generator on the device of the result.

    Returns:
        (P, 4) int64: top, left, height, width.
    """
    height, width = size
    uniform = torch.rand(4, count, _ATTEMPTS, generator=generator, device=generator.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = torch.exp(low + (high - low) * uniform[1])
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    tops = (uniform[2] * (height - heights + 1)).floor()
    lefts = (uniform[3] * (width - widths + 1)).floor()
    candidates = torch.stack([tops, lefts, heights, widths], dim=2)  # (P, attempts, 4)
    first = fits.to(torch.uint8).argmax(dim=1)  # the first that fits
    chosen = candidates[torch.arange(count, device=first.device), first]
    fallback_width, fallback_height = width, height
    if width / height < ratio[0]:
        fallback_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        fallback_width = round(height * ratio[1])
    top, left = (height - fallback_height) // 2, (width - fallback_width) // 2
    fallback = chosen.new_tensor([top, left, fallback_height, fallback_width])
    return torch.where(fits.any(dim=1)[:, None], chosen, fallback).long()


def resize_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Resize a box of each image to the image size, with bilinear interpolation.

    Args:
        images: (P, C, H, W) uint8.
        boxes: (P, 4) int64: top, left, height, width.

    Returns:
        (P, C, H, W) uint8, rounded.
    """
    height, width = images.shape[-2:]
    rows = _interpolation(boxes[:, 0], boxes[:, 2], height)  # (P, H, H)
    columns = _interpolation(boxes[:, 1], boxes[:, 3], width)  # (P, W, W)
    values = rows[:, None] @ images.float() @ columns[:, None].transpose(2, 3)
    return values.round().clamp(0, 255).to(torch.uint8)


def _interpolation(starts: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Return the weights of linear interpolation from an interval to the whole axis.

    Args:
        starts: (P,) int64, first position of each interval.
        lengths: (P,) int64.
        size: number of positions of the axis.

    Returns:
        (P, size, size): the weight of each input position for each output position.
    """
    positions = torch.arange(size, device=starts.device, dtype=torch.float32)
    lengths = lengths[:, None]
    inside = (positions + 0.5) * (lengths / size) - 0.5  # in the interval, as with half pixels
    inside = torch.minimum(inside.clamp(min=0), lengths - 1.0)
    sources = starts[:, None] + inside  # (P, size)
    return (1 - (sources[:, :, None] - positions).abs()).clamp(min=0)
