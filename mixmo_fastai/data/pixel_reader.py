"""Read the pixels of a batch in a worker of the streaming loader.

Shapes: n distinct images of a batch, k windows per image, C channels, H W image size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmo_fastai.data.decoding import decode_boxes
from mixmo_fastai.data.image_sets import FileImages, ImageSet, files_of
from mixmo_fastai.data.transforms import (
    ImageTransform,
    OriginalCrop,
    SeededTransform,
    Transform,
)
from mixmo_fastai.errors import InputError
from mixmo_fastai.rng import make_generator

PixelReader = Callable[[Sequence[int]], Tensor]
"""Maps the indices of n images to (k · n, C, H, W) uint8; position s has image s mod n."""


def pixel_reader(
    images: ImageSet, transform: Transform | None, copies: int, seed: int, epoch: int
) -> PixelReader:
    """Return the function that reads the images of a batch.

    Args:
        images: the images.
        transform: transform of the training images; a `BatchTransform` is not applied.
        copies: number of copies of each image in a batch; k with an `OriginalCrop`, otherwise one
            window is read for all of them.
        seed: seed of the transform.
        epoch: epoch of the transform.

    Raises:
        InputError: the transform needs files, and the images have none.
    """
    if isinstance(transform, OriginalCrop):
        files = required_files(images)
        return FileCrops(files, images.image_shape[1:], transform, copies, seed, epoch)
    is_per_image = isinstance(transform, ImageTransform)
    return WholeImages(images, transform.seeded(seed, epoch) if is_per_image else None)


def required_files(images: ImageSet) -> FileImages:
    """Return the files of a set of images.

    Raises:
        InputError: it has none.
    """
    files = files_of(images)
    if files is None:
        raise InputError(
            "Crops of image files at their own size need images that are files.\n"
            "Crop the loaded images instead: random_resized_crop() without from_original()."
        )
    return files


@dataclass(frozen=True)
class WholeImages:
    """Whole images at the size of the set, transformed one by one if there is a transform.

    Attributes:
        images: the images.
        transform: their transform.
    """

    images: ImageSet
    transform: SeededTransform | None

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Read n images: (n, C, H, W) uint8.

        Raises:
            InputError: an image cannot be decoded; the message names it.
        """
        return torch.stack([self._image(index) for index in indices])

    def _image(self, index: int) -> Tensor:
        pixels = self.images[index]
        return pixels if self.transform is None else self.transform(pixels, index)


@dataclass(frozen=True)
class FileCrops:
    """Random boxes of image files, whose draws are a function of (seed, epoch, image).

    Attributes:
        files: the image files.
        size: (H, W) of the windows.
        transform: draws the boxes.
        copies: k, number of boxes per image.
        seed: seed of the draws.
        epoch: epoch of the draws.
    """

    files: FileImages
    size: tuple[int, int]
    transform: OriginalCrop
    copies: int
    seed: int
    epoch: int

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Read boxes of n images: (k · n, 3, H, W) uint8, channels last in memory.

        Raises:
            InputError: an image cannot be decoded; the message names it.
        """
        windows = torch.stack([self._windows(index) for index in indices], dim=1)
        return windows.flatten(0, 1).permute(0, 3, 1, 2)

    def _windows(self, index: int) -> Tensor:
        """Read the boxes of one image: (k, H, W, 3) uint8."""
        generator = make_generator(self.seed, "transform", self.epoch, index)

        def choose(height: int, width: int) -> Tensor:
            return self.transform.draw(self.copies, (height, width), generator)

        return decode_boxes(self.files.root / self.files.names[index], choose, self.size)
