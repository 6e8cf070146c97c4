"""Image sets and data sources: images and labels for training, validation and test.

Shapes: N images of C channels, H × W pixels, uint8.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.data.decoding import decode_batches, decode_image, image_sizes
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.source_checks import check_array_images, check_source

_SIZES_AT_ONCE = 256


class ImageSet(Protocol):
    """Images and labels of one split of a data set."""

    @property
    def labels(self) -> Tensor:
        """Class indices, (N,) int64; or (N, K) uint8, 1 for each of several labels of an image."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same for every image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return one image, (C, H, W) uint8."""

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Return all images, or those at `indices`: (N, C, H, W) uint8; do not modify."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages and reports: its file, or "train/123"."""

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each image in bytes, to detect changed files."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Decoded images, in memory or mapped from a file.

    Attributes:
        pixels: (N, C, H, W) uint8, contiguous.
        labels: (N,) int64, or (N, K) uint8.
        names: names of the images.
        files: the files the images were decoded from, if any.
        groups: (N,) int64, for images that belong together; None if each is on its own.

    Raises:
        InputError: an attribute has another type or shape.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    files: "FileImages | None" = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        check_array_images(self.pixels, self.labels, self.names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Return all images without a copy, or those at `indices`: (N, C, H, W) uint8."""
        return self.pixels if indices is None else self.pixels[indices]

    def name(self, index: int) -> str:
        """Return the name of an image for messages and reports."""
        return self.names[index]

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each image's file in bytes, or of its pixels if there are no files."""
        return self.files.sizes() if self.files else (math.prod(self.image_shape),) * len(self)


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files, decoded at each access to RGB images of one size.

    Attributes:
        root: the folder to which names are relative, or a `hub_dataset.DatasetRoot`.
        names: paths relative to the root, with forward slashes.
        labels: (N,) int64, or (N, K) uint8.
        size: (H, W) of the decoded images.
        groups: (N,) int64, for images that belong together; None if each is on its own.
    """

    root: Any
    names: tuple[str, ...]
    labels: Tensor
    size: tuple[int, int]
    groups: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return 3, *self.size

    @property
    def num_bytes(self) -> int:
        """Size of all decoded images in bytes."""
        return len(self) * 3 * self.size[0] * self.size[1]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        return decode_image(self.root / self.names[index], self.size)

    def batches(self) -> Iterator[Tensor]:
        """Iterate over batches (n, 3, H, W) of the decoded images, in order."""
        return decode_batches([self.root / name for name in self.names], self.size)

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Decode all images, or those at `indices`, in threads, to (N, 3, H, W) uint8."""
        if indices is not None:
            return self.chosen(indices).tensor()
        pixels = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        start = 0
        for batch in self.batches():
            pixels[start : start + len(batch)] = batch
            start += len(batch)
        return pixels

    def are_all_of_size(self, size: tuple[int, int]) -> bool:
        """Check whether every file has a size (H, W), upright, without decoding them.

        Raises:
            InputError: a file is missing or not an image; the message names it.
        """
        paths = [self.root / name for name in self.names]
        # In parts, since the first files of most sets of photographs already differ.
        parts = (
            paths[start : start + _SIZES_AT_ONCE] for start in range(0, len(paths), _SIZES_AT_ONCE)
        )
        return all(found == size for part in parts for found in image_sizes(part))

    def chosen(self, indices: Tensor) -> "FileImages":
        """Return the set of the images at `indices`."""
        names = tuple(self.names[i] for i in indices.tolist())
        groups = None if self.groups is None else self.groups[indices]
        return replace(self, names=names, labels=self.labels[indices], groups=groups)

    def without(self, names: Collection[str]) -> "FileImages":
        """Return the set without the images of these names."""
        if not names:
            return self
        kept = [index for index, name in enumerate(self.names) if name not in names]
        return self.chosen(torch.tensor(kept, dtype=torch.int64))

    def name(self, index: int) -> str:
        """Return the name of an image for messages and reports: its path relative to the root."""
        return self.names[index]

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each file in bytes; -1 if the file no longer exists."""
        paths = (self.root / name for name in self.names)
        return tuple(path.stat().st_size if path.is_file() else -1 for path in paths)


def resize_images(images: ImageSet, size: int) -> ImageSet:
    """Resize the images of a set to squares of `size` pixels; see `cover`."""
    if images.image_shape[1:] == (size, size):
        return images
    if isinstance(images, FileImages):
        return replace(images, size=(size, size))
    pixels = cover(images.tensor(), (size, size))
    names = tuple(map(images.name, range(len(images))))
    files = images.files if isinstance(images, ArrayImages) else None
    return ArrayImages(pixels, images.labels, names, files, groups_of(images))


def cover(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (N, C, H', W') with antialiasing to cover a size (H, W); crop the centre."""
    if pixels.shape[2:] == size:
        return pixels
    from torchvision.transforms.v2.functional import center_crop, resize  # takes 1.5 s

    scale = max(Fraction(new, old) for new, old in zip(size, pixels.shape[2:], strict=True))
    covering = [round(scale * side) for side in pixels.shape[2:]]
    cropped: Tensor = center_crop(resize(pixels, covering, antialias=True), list(size))
    return cropped


@dataclass(frozen=True, eq=False)
class Subset:
    """A subset of an image set, itself an image set.

    Attributes:
        images: the complete image set.
        indices: indices of the images in the subset, (n,) int64.
    """

    images: ImageSet
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        """Class indices, (n,) int64; or labels (n, K) uint8."""
        return self.images.labels[self.indices]

    @property
    def groups(self) -> Tensor | None:
        """Groups, (n,) int64, or None."""
        groups = groups_of(self.images)
        return None if groups is None else groups[self.indices]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.images.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[int(self.indices[index])]

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Return all images of the subset, or those at `indices`: (n, C, H, W) uint8."""
        return self.images.tensor(self.indices if indices is None else self.indices[indices])

    def name(self, index: int) -> str:
        """Return the name of an image in the complete set."""
        return self.images.name(int(self.indices[index]))

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each image in bytes, as in the complete set."""
        all_sizes = self.images.sizes()
        return tuple(all_sizes[index] for index in self.indices.tolist())


def groups_of(images: ImageSet) -> Tensor | None:
    """Return the group of each image, (N,) int64; None if an image set has no groups."""
    return getattr(images, "groups", None)


def files_of(images: ImageSet) -> FileImages | None:
    """Return the files of a set of images, in the same order; None if it has none."""
    if isinstance(images, Subset):
        files = files_of(images.images)
        return None if files is None else files.chosen(images.indices)
    return images if isinstance(images, FileImages) else getattr(images, "files", None)


def no_images(like: ImageSet) -> Subset:
    """Return an empty image set with the image shape of another set."""
    return Subset(like, torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set with its splits and normalisation.

    Attributes:
        name: name of the data set or of the folder.
        classes: class names, indexed by label.
        train, test: training and test split. The test split is used for the final metrics only; it
            is empty if there are no labelled test images.
        mean, std: per channel, of pixels in [0, 1].
        crop_padding: zero padding of the random crop, in pixels.
        flip: whether a mirrored image keeps its label.
        valid: validation split; None if it is drawn from the training split.
        parts: origin of the splits of an image folder; None for other data.
        notes: notes on how an image folder was read, for the plan of a run: labels and texts.
        left_out: skipped damaged files, with the reason for each.
        scaled_to: height and width to which all images of a folder were resized; 0 for the size
            chosen from the images.

    Raises:
        InputError: labels are not indices of `classes`, splits differ in their image shape, or
            `mean` or `std` do not fit the channels.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    valid: ImageSet | None = None
    parts: DataParts | None = None
    notes: tuple[tuple[str, str], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    scaled_to: int = 0

    def __post_init__(self) -> None:
        check_source(self)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.train.labels.ndim == 2


def named_source(
    name: str, classes: tuple[str, ...], train: ImageSet, test: ImageSet
) -> DataSource:
    """Build the source of a named data set, with its facts in `DATASETS`."""
    info = DATASETS[name]
    return DataSource(name, classes, train, test, info.mean, info.std, info.crop_padding, info.flip)


def numbered(part: str, count: int) -> tuple[str, ...]:
    """Return names for images without files: "train/0", "train/1", and so on."""
    return tuple(f"{part}/{index}" for index in range(count))
