"""Load image folders: one folder per class, with or without train/, valid/ and test/."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import median_low

import torch

from mixmo_fastai.data.cache import CACHE_LIMIT, cache_entry
from mixmo_fastai.data.chosen_images import ChosenImages, choose_images, reopen_images
from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.damage import LeftOut, read_intact
from mixmo_fastai.data.decoding import image_sizes
from mixmo_fastai.data.image_sets import DataSource, FileImages, ImageSet, no_images
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.statistics import channel_statistics
from mixmo_fastai.errors import InputError

MAX_DEFAULT_SIZE = 224
"""Maximum height and width of images if no size is requested."""

_STATISTICS_SAMPLE = 2048  # number of images for mean and std if decoded images are not cached


def read_image_folder(
    folder: Path,
    home: Path,
    *,
    image_size: int | None = None,
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

    def read(files_left_out: Collection[str]) -> DataSource:
        return _read(
            folder,
            home,
            chosen,
            image_size,
            files_left_out,
            largest_side=largest_side,
            cache_limit=cache_limit,
        )

    _check_image_size(image_size)
    chosen = (
        choose_images(folder, test_split)
        if parts is None
        else reopen_images(folder, parts, classes, left_out or ())
    )
    return read_intact(read, skip=skip_damaged, left_out=left_out)


def _read(
    folder: Path,
    home: Path,
    chosen: ChosenImages,
    image_size: int | None,
    left_out: Collection[str],
    *,
    largest_side: int | None = None,
    cache_limit: int,
) -> DataSource:
    files = {name: _without(part, left_out) for name, part in _parts(chosen)}
    train = _all(files["train"])
    name = folder.resolve().name
    # Different splits of a folder may list the same files in the same order.
    cache_name = name if chosen.parts.drawn is None else f"{name}-split-{len(train)}"
    entry = cache_entry(
        home,
        cache_name,
        folder,
        [file for part in files.values() for file in _all(part)],
        image_size,
    )
    if image_size is None:
        height, width = entry.fact(
            "size", lambda: choose_image_size(folder / file for file in train)
        )
        if largest_side is not None and max(height, width) > largest_side:
            return _read(folder, home, chosen, largest_side, left_out, cache_limit=cache_limit)
    else:
        height = width = image_size
    decoded = entry.decoded(
        {name: _file_images(folder, part, (height, width)) for name, part in files.items()},
        limit=cache_limit,
    )
    mean, std = entry.fact("mean, std", lambda: _statistics(decoded["train"]))
    return DataSource(
        name=name,
        classes=tuple(chosen.train),
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


def _file_images(folder: Path, part: FilesByClass, size: tuple[int, int]) -> FileImages:
    counts = torch.tensor([len(names) for names in part.values()])
    labels = torch.arange(len(part)).repeat_interleave(counts)
    return FileImages(folder, tuple(_all(part)), labels, size)


def _statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(images, FileImages):
        step = -(-len(images) // _STATISTICS_SAMPLE)
        images = images.chosen(torch.arange(0, len(images), step))
    return channel_statistics(images.tensor())
