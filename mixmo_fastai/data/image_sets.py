"""Image sets and data sources: images and labels for training, validation and test.

Shapes: N images of C channels, H × W pixels, uint8.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mixmo_fastai.data.decoding import decode_batches, decode_image
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.names import DATASETS


class ImageSet(Protocol):
    """Images and labels of one split of a data set."""

    @property
    def labels(self) -> Tensor:
        """Class indices, (N,) int64."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same for every image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return one image, (C, H, W) uint8."""

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Return all or the selected images, (N, C, H, W) uint8; do not modify the result."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages and reports: its file, or e.g. "train/123"."""

    def sizes(self) -> tuple[int, ...]:
        """Return the size in bytes of each source image, which helps to detect changed images."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Decoded images, in memory or mapped from a file.

    Attributes:
        pixels: (N, C, H, W) uint8, contiguous.
        labels: (N,) int64.
        names: one per image.
        files: image files from which the pixels were decoded, if any.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    files: "FileImages | None" = None

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
        """Return all images, without a copy, or the selected ones: (N, C, H, W) uint8."""
        return self.pixels if indices is None else self.pixels[indices]

    def name(self, index: int) -> str:
        """Return the name of an image for messages and reports."""
        return self.names[index]

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each image's file, or of its pixels if it has none, in bytes."""
        return self.files.sizes() if self.files else (math.prod(self.image_shape),) * len(self)


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files, decoded at each access to RGB of one size.

    Attributes:
        root: folder to which the names are relative.
        names: paths below the root, one per image, with forward slashes.
        labels: (N,) int64.
        size: (H, W) of the decoded images.
    """

    root: Path
    names: tuple[str, ...]
    labels: Tensor
    size: tuple[int, int]

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
        """Decode all or the selected images, in threads: (N, 3, H, W) uint8."""
        if indices is not None:
            return self.chosen(indices).tensor()
        pixels = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        start = 0
        for batch in self.batches():
            pixels[start : start + len(batch)] = batch
            start += len(batch)
        return pixels

    def chosen(self, indices: Tensor) -> "FileImages":
        """Return the image set of the selected images."""
        names = tuple(self.names[i] for i in indices.tolist())
        return replace(self, names=names, labels=self.labels[indices])

    def without(self, names: Collection[str]) -> "FileImages":
        """Return the image set without the named images."""
        if not names:
            return self
        kept = [index for index, name in enumerate(self.names) if name not in names]
        return self.chosen(torch.tensor(kept, dtype=torch.int64))

    def name(self, index: int) -> str:
        """Return the name of an image for messages and reports: its path below the root."""
        return self.names[index]

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each file in bytes; -1 if it no longer exists."""
        paths = (self.root / name for name in self.names)
        return tuple(path.stat().st_size if path.is_file() else -1 for path in paths)


@dataclass(frozen=True, eq=False)
class Subset:
    """Selected images of an image set, as an image set.

    Attributes:
        images: the image set.
        indices: (n,) int64, indices of the selected images.
    """

    images: ImageSet
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        """Class indices, (n,) int64."""
        return self.images.labels[self.indices]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.images.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[int(self.indices[index])]

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Return all or the selected images of the subset: (n, C, H, W) uint8."""
        return self.images.tensor(self.indices if indices is None else self.indices[indices])

    def name(self, index: int) -> str:
        """Return the name of an image in the whole set."""
        return self.images.name(int(self.indices[index]))

    def sizes(self) -> tuple[int, ...]:
        """Return the size of each image in bytes, as in the whole set."""
        every = self.images.sizes()
        return tuple(every[index] for index in self.indices.tolist())


def no_images(like: ImageSet) -> Subset:
    """Return an empty image set with the image shape of another one."""
    return Subset(like, torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set, ready for a loader.

    Attributes:
        name: name of the data set or of the folder.
        classes: class names, indexed by label.
        train, test: training and test images. The test images are only for the final metrics; the
            set is empty if there are no labelled test images.
        mean, std: statistics per channel, of pixels in [0, 1].
        crop_padding: pixels of zero padding before the random crop.
        flip: whether a mirrored image keeps its label.
        valid: validation images of the data set; None if they are drawn from the training images.
        parts: sources of the splits of an image folder; None for other data.
        notes: labels and texts for the plan of a run on how an image folder was read.
        left_out: skipped damaged files, with the reason for each.
        scaled_to: height and width to which all images of a folder were scaled; 0 if not scaled.
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


def named_source(
    name: str, classes: tuple[str, ...], train: ImageSet, test: ImageSet
) -> DataSource:
    """Build the source of a named data set with its properties from `DATASETS`."""
    info = DATASETS[name]
    return DataSource(name, classes, train, test, info.mean, info.std, info.crop_padding, info.flip)


def numbered(part: str, count: int) -> tuple[str, ...]:
    """Return names for images without files: "train/0", "train/1", and so on."""
    return tuple(f"{part}/{index}" for index in range(count))
