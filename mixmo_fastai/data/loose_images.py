"""Images for prediction and out-of-distribution detection: files, folders, other data sets.

Shapes: n images of C channels, H × W pixels, uint8.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mixmo_fastai.data.augment import normalize
from mixmo_fastai.data.decoding import decode_image
from mixmo_fastai.data.image_sets import cover
from mixmo_fastai.data.listing import Skipped, images_below
from mixmo_fastai.errors import InputError

Shape = tuple[int, int, int]
EVALUATION_BATCH = 256


def find_images(paths: Iterable[Path], skipped: Skipped | None = None) -> list[Path]:
    """List image files: the given files, and all images in the given folders, sorted by name.

    A given file is accepted whatever its name. In folders, images are recognised by name, and
    hidden and other files are skipped, as for training.

    Args:
        paths: files and folders.
        skipped: collects the skipped files.

    Raises:
        InputError: a path does not exist, or no image is found.
    """
    skipped = Skipped() if skipped is None else skipped
    found = [file for path in paths for file in files_of(path, skipped)]
    if not found:
        raise no_images_error(skipped)
    return found


def files_of(path: Path, skipped: Skipped) -> list[Path]:
    """List a given file, or the images in a folder; see `find_images`.

    Raises:
        InputError: the path does not exist.
    """
    if os.path.isdir(path):
        return sorted(path / name for name in images_below(path, skipped))
    if os.path.lexists(path):
        return [path]
    raise InputError(f"There is no image or folder {str(path)!r}.")


def no_images_error(skipped: Skipped) -> InputError:
    """Build the error for files and folders without any image, with what was skipped."""
    details = f" Skipped: {skipped.describe()}." if skipped.names else ""
    return InputError(
        f"No image was found.{details}\nGive image files, or folders that contain images."
    )


def decode_readable(
    paths: Iterable[Path], shape: Shape, unreadable: dict[Path, str]
) -> Iterator[tuple[Path, Tensor]]:
    """Decode images to one shape, skipping those that cannot be read.

    Args:
        paths: the files.
        shape: (C, H, W), with 1 or 3 channels.
        unreadable: collects the message for each file that cannot be read: the reason in the first
            line, then advice.
    """
    for path in paths:
        try:
            yield path, decode_image(path, shape[1:], channels=shape[0])
        except InputError as error:
            unreadable[path] = str(error)


def convert_shape(images: Tensor, shape: Shape) -> Tensor:
    """Convert decoded images (n, C', H', W') to (n, C, H, W): greyscale or RGB, antialiased.

    As in `decode_image`, images of another aspect ratio are cropped at the centre, not stretched.

    Raises:
        InputError: the number of channels is neither 1 nor 3.
    """
    channels = images.shape[1]
    if channels != shape[0]:
        if {channels, shape[0]} != {1, 3}:
            raise InputError(
                f"Images with {channels} channels cannot be converted to {shape[0]}; only 1 and 3 "
                "channels are supported."
            )
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = (
            images.expand(-1, 3, -1, -1)
            if channels == 1
            else (images.float() * luma).sum(1, keepdim=True).round().to(torch.uint8)
        )
    return cover(images, shape[1:])


class PixelLoader:
    """Loader of normalised images without labels, for evaluation.

    Args:
        pixels: (n, C, H, W) uint8.
        mean, std: per channel, of pixels in [0, 1].
        device: device of the batches.
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
        """Iterate over batches (n, C, H, W), with -1 for each image instead of labels."""
        for batch in self.pixels.split(EVALUATION_BATCH):
            x = normalize(batch.to(self.mean.device), self.mean, self.std)
            yield x, torch.full((len(batch),), -1, device=x.device)
