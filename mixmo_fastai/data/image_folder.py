"""Any folder of images: one folder per class, with or without train/, valid/ and test/."""

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

LARGEST_OWN_SIZE = 224
"""Height and width above which images are scaled down where no size is asked for."""

_STATISTICS_SAMPLE = 2048  # images that give mean and deviation where not all are kept decoded


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
    """Read a folder of images, decoded to RGB of one size once and kept in the cache.

    The padding of the random crop is an eighth of the shorter side, as 4 pixels are for CIFAR's 32,
    and a mirrored image is taken to keep its label.

    Args:
        folder: holds one folder per class, or `train/<class>/` and others; see `layout`.
        home: the data folder, for the cache.
        image_size: height and width of all images, whatever their proportions were. None takes
            those that `choose_image_size` chooses.
        largest_side: where `image_size` is None and a side of their own size is longer than this,
            it becomes the image size.
        cache_limit: bytes of decoded images above which they are decoded at each access instead.
        test_split: fraction of each class to set aside as the test set of a folder without one;
            None for `DEFAULT_TEST_SPLIT`, or for nothing beside a validation folder.
        parts: what an earlier run trained and tested on; None to find it.
        classes: in the order of that run's network; None for the order of their names.
        skip_damaged: whether images that cannot be decoded are left out; otherwise an error names
            all of them.
        left_out: images that an earlier run has left out; no others are then.

    Raises:
        InputError: the folder is not of that form, is no longer what `parts` and `classes` say, or
            an image cannot be decoded.
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

    _require_size(image_size)
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
    # Two splits of a folder may list the same files in the same order.
    kept_as = name if chosen.parts.drawn is None else f"{name}-split-{len(train)}"
    entry = cache_entry(
        home, kept_as, folder, [file for part in files.values() for file in _all(part)], image_size
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
    """Choose (H, W) for image files, each at most `LARGEST_OWN_SIZE`.

    The size of more than half of them, or where there is none, the median height and width.

    Raises:
        InputError: a file is not an image; the message names it.
    """
    sizes = [*image_sizes(list(paths))]
    (height, width), times = Counter(sizes).most_common(1)[0]
    if 2 * times <= len(sizes):
        height, width = (median_low(sides) for sides in zip(*sizes, strict=True))
    return min(height, LARGEST_OWN_SIZE), min(width, LARGEST_OWN_SIZE)


def _require_size(image_size: int | None) -> None:
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size is {image_size}; it must be 1 pixel or more.")


def _parts(chosen: ChosenImages) -> list[tuple[str, FilesByClass]]:
    """List the parts that have images, by name."""
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
