"""Images outside of any data set: single files, folders without classes, other data sets.

Shapes: n images of C channels, H × W pixels, uint8.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mixmo_fastai.augment import normalize
from mixmo_fastai.data.decoding import decode_image
from mixmo_fastai.data.listing import Skipped, images_below
from mixmo_fastai.errors import InputError

Shape = tuple[int, int, int]
EVALUATION_BATCH = 256


def find_images(places: Iterable[Path], skipped: Skipped | None = None) -> list[Path]:
    """List image files: those given, and all below the folders given, in order of their names.

    A file is taken whatever its name is; in folders, images are told by their names, and hidden and
    other files are skipped as in training.

    Args:
        places: files and folders.
        skipped: receives what was skipped.

    Raises:
        InputError: a place does not exist, or no image is found.
    """
    found: list[Path] = []
    skipped = Skipped() if skipped is None else skipped
    for place in places:
        if os.path.isdir(place):
            found += sorted(place / name for name in images_below(place, skipped))
        elif os.path.lexists(place):
            found.append(place)
        else:
            raise InputError(f"There is no image or folder {str(place)!r}.")
    if not found:
        told = f" Skipped: {skipped.describe()}." if skipped.names else ""
        raise InputError(f"No image was found.{told}\nGive image files, or folders that hold some.")
    return found


def decode_readable(
    paths: Iterable[Path], shape: Shape, unreadable: dict[Path, str]
) -> Iterator[tuple[Path, Tensor]]:
    """Decode images to one shape, going on where one cannot be read.

    Args:
        paths: the files.
        shape: (C, H, W), with 1 or 3 channels.
        unreadable: filled with the message for each file that cannot be read: the reason on the
            first line, then what to do.
    """
    for path in paths:
        try:
            yield path, decode_image(path, shape[1:], channels=shape[0])
        except InputError as error:
            unreadable[path] = str(error)


def as_shape(images: Tensor, shape: Shape) -> Tensor:
    """Bring decoded images (n, C', H', W') to another shape (n, C, H, W): grey or RGB, antialiased.

    Raises:
        InputError: the channels are neither one nor three.
    """
    channels = images.shape[1]
    if channels != shape[0]:
        if {channels, shape[0]} != {1, 3}:
            raise InputError(f"Images of {channels} channels cannot become ones of {shape[0]}.")
        grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = (
            images.expand(-1, 3, -1, -1)
            if channels == 1
            else (images.float() * grey).sum(1, keepdim=True).round().to(torch.uint8)
        )
    if images.shape[2:] == shape[1:]:
        return images
    from torchvision.transforms.v2.functional import resize  # a second and a half to load

    resized: Tensor = resize(images, list(shape[1:]), antialias=True)
    return resized


class PixelLoader:
    """Batches of standardised images without labels, for evaluation.

    Args:
        pixels: (n, C, H, W) uint8.
        mean, std: per channel, of pixels in [0, 1].
        device: where batches are made.
    """

    def __init__(
        self,
        pixels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str = "cpu",
    ) -> None:
        self.pixels = pixels
        self.mean, self.std = (torch.tensor(v, device=device) for v in (mean, std))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give batches (n, C, H, W) and, in place of labels, -1 for each image."""
        for batch in self.pixels.split(EVALUATION_BATCH):
            x = normalize(batch.to(self.mean.device), self.mean, self.std)
            yield x, torch.full((len(batch),), -1, device=x.device)
