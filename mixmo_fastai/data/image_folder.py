"""Any folder of images: `train/<class>/*` beside `test/<class>/*`, or `val/` or `valid/`."""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import median_low

import torch

from mixmo_fastai.data.cache import CACHE_LIMIT, cache_entry
from mixmo_fastai.data.damage import LeftOut, read_intact
from mixmo_fastai.data.decoding import image_sizes, is_image, list_images
from mixmo_fastai.data.image_sets import DataSource, FileImages, ImageSet
from mixmo_fastai.data.statistics import channel_statistics
from mixmo_fastai.errors import InputError

TEST_FOLDERS = ("test", "val", "valid")
LARGEST_OWN_SIZE = 224
"""Height and width above which images are scaled down where no size is asked for."""

_STATISTICS_SAMPLE = 2048  # images that give mean and deviation where not all are kept decoded
_LAYOUT = "An image folder holds train/<class>/*.jpg beside test/, val/ or valid/ of the same form."

_NamesByClass = dict[str, list[str]]


def read_image_folder(
    folder: Path,
    home: Path,
    *,
    image_size: int | None = None,
    largest_side: int | None = None,
    cache_limit: int = CACHE_LIMIT,
    skip_damaged: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Read a folder of images, decoded to RGB of one size once and kept in the cache.

    The padding of the random crop is an eighth of the shorter side, as 4 pixels are for CIFAR's 32,
    and a mirrored image is taken to keep its label.

    Args:
        folder: holds `train/` and one of `TEST_FOLDERS`; of several the first counts.
        home: the data folder, for the cache.
        image_size: height and width of all images, whatever their proportions were. None takes
            those that `own_size` chooses.
        largest_side: where `image_size` is None and a side of their own size is longer than this,
            it becomes the image size.
        cache_limit: bytes of decoded images above which they are decoded at each access instead.
        skip_damaged: whether images that cannot be decoded are left out; otherwise an error names
            all of them.
        left_out: images that an earlier run has left out; no others are then.

    Raises:
        InputError: the folder is not of that form, or an image cannot be decoded.
    """

    def read(files_left_out: Collection[str]) -> DataSource:
        return _read(
            folder,
            home,
            image_size,
            files_left_out,
            largest_side=largest_side,
            cache_limit=cache_limit,
        )

    _require_size(image_size)
    return read_intact(read, skip=skip_damaged, left_out=left_out)


def _read(
    folder: Path,
    home: Path,
    image_size: int | None,
    left_out: Collection[str],
    *,
    largest_side: int | None = None,
    cache_limit: int,
) -> DataSource:
    train, test = (_without(part, left_out) for part in _list_parts(folder))
    name = folder.resolve().name
    entry = cache_entry(home, name, folder, [*_all(train), *_all(test)], image_size)
    if image_size is None:
        height, width = entry.fact("size", lambda: own_size(folder / file for file in _all(train)))
        if largest_side is not None and max(height, width) > largest_side:
            return _read(folder, home, largest_side, left_out, cache_limit=cache_limit)
    else:
        height = width = image_size
    parts = {
        part: _file_images(folder, files, (height, width))
        for part, files in (("train", train), ("test", test))
    }
    decoded = entry.decoded(parts, limit=cache_limit)
    mean, std = entry.fact("mean, std", lambda: _statistics(decoded["train"]))
    return DataSource(
        name=name,
        classes=tuple(train),
        train=decoded["train"],
        test=decoded["test"],
        mean=tuple(mean),
        std=tuple(std),
        crop_padding=min(height, width) // 8,
        flip=True,
        scaled_to=image_size or 0,
    )


def own_size(paths: Iterable[Path]) -> tuple[int, int]:
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


def _list_parts(folder: Path) -> tuple[_NamesByClass, _NamesByClass]:
    """List the image files of both parts by class, and check the form of the folder."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"Image folder {folder} {problem}.\n{_LAYOUT}")
    if not (folder / "train").is_dir():
        raise InputError(f"Image folder {folder} has no folder train/.\n{_LAYOUT}")
    test_name = next((name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if test_name is None:
        raise InputError(f"Image folder {folder} has neither test/ nor val/ nor valid/.\n{_LAYOUT}")
    train, test = _list_part(folder, "train"), _list_part(folder, test_name)
    if len(train) < 2:
        raise InputError(
            f"{folder / 'train'} has only one class, {next(iter(train))!r}.\n"
            "Put the images of each class into a folder of its own, two classes or more."
        )
    _require_same_classes(folder / "train", train, folder / test_name, test)
    return train, test


def _list_part(folder: Path, part: str) -> _NamesByClass:
    root = folder / part
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    loose = [path.name for path in visible if is_image(path.name) and path.is_file()]
    if loose:
        raise InputError(
            f"{root} has images outside of class folders, such as {loose[0]}.\n"
            f"Move each into the folder of its class, {part}/<class>/, or remove it."
        )
    classes = [path.name for path in visible if path.is_dir()]
    if not classes:
        raise InputError(f"{root} is empty: it has no class folders.\n{_LAYOUT}")
    return {name: _list_class(folder, f"{part}/{name}") for name in classes}


def _list_class(folder: Path, class_folder: str) -> list[str]:
    nested = sorted(
        path.name
        for path in (folder / class_folder).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )
    if nested:
        raise InputError(
            f"The class folder {folder / class_folder} has a folder in it: {nested[0]}.\n"
            "Put the images directly into the class folder, and take the inner folders away."
        )
    names = list_images(folder / class_folder)
    if not names:
        raise InputError(
            f"The class folder {folder / class_folder} has no images.\n"
            "Put images directly into it, or remove it."
        )
    return [f"{class_folder}/{name}" for name in names]


def _require_same_classes(
    train_root: Path, train: _NamesByClass, test_root: Path, test: _NamesByClass
) -> None:
    for here, there, root, other in (
        (test, train, test_root, train_root),
        (train, test, train_root, test_root),
    ):
        if missing := sorted(here.keys() - there.keys()):
            raise InputError(
                f"{root} has the class {missing[0]!r}, which {other} does not have.\n"
                "Both must have the same classes: rename, add or remove a class folder."
            )


def _without(part: _NamesByClass, left_out: Collection[str]) -> _NamesByClass:
    return {
        label: [name for name in names if name not in left_out] for label, names in part.items()
    }


def _all(names_by_class: _NamesByClass) -> list[str]:
    return [name for names in names_by_class.values() for name in names]


def _file_images(folder: Path, part: _NamesByClass, size: tuple[int, int]) -> FileImages:
    counts = torch.tensor([len(names) for names in part.values()])
    labels = torch.arange(len(part)).repeat_interleave(counts)
    return FileImages(folder, tuple(_all(part)), labels, size)


def _statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(images, FileImages):
        step = -(-len(images) // _STATISTICS_SAMPLE)
        images = images.chosen(torch.arange(0, len(images), step))
    return channel_statistics(images.tensor())
