"""Load images from files: folders with one folder per class, and tables of labels."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from mixmo_fastai.config.choices import HUB_PREFIX
from mixmo_fastai.data.cache import CACHE_LIMIT, cache_entry
from mixmo_fastai.data.chosen_images import ChosenImages, choose_images, reopen_images
from mixmo_fastai.data.class_files import group_indices
from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.damage import LeftOut, read_intact
from mixmo_fastai.data.decoding import image_sizes
from mixmo_fastai.data.image_sets import DataSource, FileImages, ImageSet, no_images
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.statistics import channel_statistics
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.data.table_images import choose_table_images, reopen_table_images
from mixmo_fastai.errors import InputError

MAX_DEFAULT_SIZE = 224
"""Maximum height and width of images if no size is requested."""

_STATISTICS_SAMPLE = 2048  # number of images for mean and std if decoded images are not cached


def read_image_folder(
    folder: Path,
    home: Path,
    *,
    image_size: int | None = None,
    chosen_size: tuple[int, ...] | None = None,
    largest_side: int | None = None,
    cache_limit: int = CACHE_LIMIT,
    test_split: float | None = None,
    parts: DataParts | None = None,
    classes: Sequence[str] | None = None,
    skip_damaged: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Load a folder of images, decoded once to RGB images of one size and cached.

    The padding of the random crop is one eighth of the shorter side, the ratio used for CIFAR (4 of
    32 pixels). Mirrored images are assumed to keep their label.

    Args:
        folder: a folder with one folder per class, or with `train/<class>/` and others; see
            `layout`.
        home: the data folder, for the cache.
        image_size: height and width of all images, whatever their aspect ratio; None for the size
            chosen by `choose_image_size`.
        chosen_size: the height and width that were chosen in an earlier run; None to choose them.
        largest_side: if `image_size` is None and a side of the chosen size is longer than this, it
            becomes the image size.
        cache_limit: bytes of decoded images above which they are decoded at each access instead.
        test_split: fraction of each class to hold out as the test set of a folder without one;
            None for `DEFAULT_TEST_SPLIT`, or for no test set if there is a validation folder.
        parts: the splits of an earlier run; None to find them.
        classes: class names in the label order of that run; None for alphabetical order.
        skip_damaged: whether to skip images that cannot be decoded; otherwise an error lists all of
            them.
        left_out: images skipped by an earlier run; exactly these are skipped again.

    Raises:
        InputError: the folder has another layout, no longer matches `parts` and `classes`, or an
            image cannot be decoded.
    """
    _check_image_size(image_size)
    chosen = (
        choose_images(folder, test_split)
        if parts is None
        else reopen_images(folder, parts, classes, left_out or ())
    )
    files = ChosenFiles(
        folder.resolve().name, folder, home, chosen, chosen_size, largest_side, cache_limit
    )
    return files.read_intact(image_size, skip_damaged=skip_damaged, left_out=left_out)


def read_image_table(
    path: Path | str,
    home: Path,
    *,
    columns: TableColumns | None = None,
    image_size: int | None = None,
    chosen_size: tuple[int, ...] | None = None,
    largest_side: int | None = None,
    cache_limit: int = CACHE_LIMIT,
    test_split: float | None = None,
    parts: DataParts | None = None,
    classes: Sequence[str] | None = None,
    skip_damaged: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Load the images of a table of labels; otherwise like `read_image_folder`.

    Args:
        path: the table, see `label_tables`; or the name of a `hub_dataset`.
        home: as for `read_image_folder`, and so are the other arguments.
        columns: its columns, as far as they are not to be found; None to find all. Not used with
            `parts`, which holds them.
        image_size: see `read_image_folder`.
        chosen_size: see `read_image_folder`.
        largest_side: see `read_image_folder`.
        cache_limit: see `read_image_folder`.
        test_split: fraction of each class to hold out as the test set of a table without one.
        parts: the splits of an earlier run; None to find them.
        classes: see `read_image_folder`.
        skip_damaged: see `read_image_folder`.
        left_out: see `read_image_folder`.

    Raises:
        InputError: as for `label_tables.read_label_table`, the table no longer matches `parts` and
            `classes`, or an image cannot be decoded.
    """
    _check_image_size(image_size)
    root, chosen = (
        choose_table_images(path, columns or TableColumns(), test_split)
        if parts is None
        else reopen_table_images(path, parts, classes, left_out or ())
    )
    name = Path(str(path).removeprefix(HUB_PREFIX)).stem
    files = ChosenFiles(name, root, home, chosen, chosen_size, largest_side, cache_limit)
    return files.read_intact(image_size, skip_damaged=skip_damaged, left_out=left_out)


@dataclass(frozen=True)
class ChosenFiles:
    """Image files with their labels, to be decoded to one size.

    Attributes:
        name: name of the data set.
        root: the folder to which the files are relative, or a `hub_dataset.DatasetRoot`.
        home: the data folder, for the cache.
        chosen: the files.
        chosen_size: see `read_image_folder`.
        largest_side: see `read_image_folder`.
        cache_limit: see `read_image_folder`.
    """

    name: str
    root: Any
    home: Path
    chosen: ChosenImages
    chosen_size: tuple[int, ...] | None
    largest_side: int | None
    cache_limit: int

    def read_intact(
        self, image_size: int | None, *, skip_damaged: bool, left_out: LeftOut | None
    ) -> DataSource:
        """Read the images, with or without damaged ones; see `read_image_folder`."""
        return read_intact(partial(self._read, image_size), skip=skip_damaged, left_out=left_out)

    def _read(self, image_size: int | None, left_out: Collection[str]) -> DataSource:
        chosen = self.chosen
        files = {name: _without(part, left_out) for name, part in _parts(chosen)}
        train = _all(files["train"])
        if not (num := len(train)):
            raise InputError(
                f"{self.root}: no training image can be decoded.\n"
                "Restore the images, such as by `git lfs pull` if these are pointers of Git LFS."
            )
        # Different splits of a folder may list the same files in the same order, so the number of
        # the first ones, for training, is part of the names.
        drawn = chosen.parts.drawn
        cache_name = self.name if drawn is None else f"{self.name}-split-{num}"
        all_files = [file for part in files.values() for file in _all(part)]
        entry_for = partial(cache_entry, self.home, cache_name, self.root, all_files)
        entry = entry_for(image_size)
        if image_size is not None:
            height = width = image_size
        else:
            paths = (self.root / file for file in train)
            size = tuple(entry.fact(f"size of {num}", lambda: choose_image_size(paths)))
            if self.chosen_size not in (None, size):
                size = self.chosen_size
                entry = entry_for(size)
            elif self.chosen_size is None and self._is_too_large(size):
                return self._read(self.largest_side, left_out)
            height, width = size
        decoded = entry.decoded(
            {name: self._images(part, (height, width)) for name, part in files.items()},
            limit=self.cache_limit,
        )
        mean, std = entry.fact(f"mean, std of {num}", lambda: _statistics(decoded["train"]))
        return DataSource(
            name=self.name,
            classes=chosen.classes,
            train=decoded["train"],
            test=decoded.get("test", no_images(decoded["train"])),
            mean=tuple(mean),
            std=tuple(std),
            crop_padding=min(height, width) // 8,
            flip=True,
            valid=decoded.get("valid"),
            parts=chosen.parts,
            notes=chosen.notes,
            scaled_to=image_size or 0,
        )

    def _is_too_large(self, size: tuple[int, ...]) -> bool:
        return self.largest_side is not None and max(size) > self.largest_side

    def _images(self, part: FilesByClass, size: tuple[int, int]) -> FileImages:
        counts = torch.tensor([len(names) for names in part.values()])
        labels, names = torch.arange(len(part)).repeat_interleave(counts), tuple(_all(part))
        if self.chosen.multi is not None:
            labels = self.chosen.multi.targets(names)
        return FileImages(self.root, names, labels, size, group_indices(names, self.chosen.groups))


def choose_image_size(paths: Iterable[Path]) -> tuple[int, int]:
    """Choose the size (H, W) to which image files are decoded, each at most `MAX_DEFAULT_SIZE`.

    This is the size of more than half of the images, or otherwise the median height and width.

    Raises:
        InputError: a file is not an image; the message names it.
    """
    sizes = [*image_sizes(list(paths))]
    (height, width), times = Counter(sizes).most_common(1)[0]
    if 2 * times <= len(sizes):
        height, width = (median_low(sides) for sides in zip(*sizes, strict=True))
    return min(height, MAX_DEFAULT_SIZE), min(width, MAX_DEFAULT_SIZE)


def _check_image_size(image_size: int | None) -> None:
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size is {image_size}; it must be 1 pixel or more.")


def _parts(chosen: ChosenImages) -> list[tuple[str, FilesByClass]]:
    """Return the splits that have images, by name."""
    parts = (("train", chosen.train), ("valid", chosen.valid), ("test", chosen.test))
    return [(name, files) for name, files in parts if files and any(files.values())]


def _all(files: FilesByClass) -> list[str]:
    return [name for names in files.values() for name in names]


def _without(part: FilesByClass, left_out: Collection[str]) -> FilesByClass:
    return {
        label: [name for name in names if name not in left_out] for label, names in part.items()
    }


def _statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(images, FileImages):
        step = -(-len(images) // _STATISTICS_SAMPLE)
        images = images.chosen(torch.arange(0, len(images), step))
    return channel_statistics(images.tensor())
