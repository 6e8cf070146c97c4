"""Data sets by name or folder: where they are stored and how they are read."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixmo_fastai.data.archives import Archive, Unpacked, archive_damage, fetch
from mixmo_fastai.data.cifar import CIFAR10, CIFAR100, read_cifar10, read_cifar100
from mixmo_fastai.data.damage import LeftOut
from mixmo_fastai.data.digits import read_digits
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.image_sets import ArrayImages, DataSource, FileImages, ImageSet
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.tiny_imagenet import TINY_IMAGENET, read_tiny_imagenet
from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.names import DATASETS

__all__ = [
    "SOURCES",
    "ArrayImages",
    "DataSource",
    "DatasetStatus",
    "FileImages",
    "ImageSet",
    "NamedSource",
    "data_home",
    "dataset_status",
    "load_source",
]


@dataclass(frozen=True)
class NamedSource:
    """A named data set.

    Attributes:
        read: function that reads it from its unpacked archive, or without arguments if it has none.
        archive: archive that is downloaded, verified and unpacked first; None for data that comes
            with a library.
        has_files: whether its images are separate files, some of which may be damaged.
    """

    read: Callable[..., DataSource]
    archive: Archive | None = None
    has_files: bool = False

    def load(
        self,
        home: Path,
        *,
        download: bool,
        skip_damaged: bool = False,
        left_out: LeftOut | None = None,
    ) -> DataSource:
        """Read the data set from a data folder, after `fetch` has made sure that it is there."""
        if self.archive is None:
            return self.read()
        unpacked = fetch(self.archive, home, download=download)
        if self.has_files:
            return self.read(unpacked, skip_damaged=skip_damaged, left_out=left_out)
        return self.read(unpacked)


SOURCES = {
    "digits": NamedSource(read_digits),
    "cifar10": NamedSource(read_cifar10, CIFAR10),
    "cifar100": NamedSource(read_cifar100, CIFAR100),
    "tinyimagenet": NamedSource(read_tiny_imagenet, TINY_IMAGENET, has_files=True),
}
"""Named data sets. Properties that are known before reading are in `names.DATASETS`."""


def load_source(
    dataset: str | Path,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    largest_side: int | None = None,
    download: bool = True,
    test_split: float | None = None,
    parts: DataParts | None = None,
    classes: Sequence[str] | None = None,
    skip_damaged: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Read a data set, downloading it if it is missing.

    Args:
        dataset: a name in `SOURCES`, or the path of an image folder; a name takes precedence over a
            folder of the same name.
        data_dir: the data folder; see `data_home`.
        image_size: height and width to which an image folder is scaled; None for its own size.
        largest_side: maximum side of an image folder's own size; larger images are scaled down.
        download: whether an archive may be downloaded.
        test_split: fraction of each class to set aside as the test set of an image folder without
            one; see `read_image_folder`.
        parts: images of an image folder that an earlier run used; see `read_image_folder`.
        classes: class names of that run.
        skip_damaged: whether to skip image files that cannot be decoded; otherwise an error names
            all of them.
        left_out: image files that an earlier run skipped; no others are skipped then.

    Raises:
        InputError: the data set is unknown, missing, damaged or malformed.
    """
    home = data_home(data_dir)
    if home.exists() and not home.is_dir():
        raise InputError(f"The data folder {home} is a file.\nChoose another --data-dir.")
    if dataset in SOURCES:
        _require_own_size(str(dataset), image_size)
        _refuse_test_split(str(dataset), test_split)
        return SOURCES[dataset].load(
            home, download=download, skip_damaged=skip_damaged, left_out=left_out
        )
    if isinstance(dataset, str) and not _is_path(dataset):
        raise InputError(
            f"{unknown_name_error('data set', dataset, SOURCES)}\n"
            "Or the path of a folder of images, as in ./flowers."
        )
    return read_image_folder(
        Path(dataset).expanduser(),
        home,
        image_size=image_size,
        test_split=test_split,
        parts=parts,
        classes=classes,
        largest_side=largest_side,
        skip_damaged=skip_damaged,
        left_out=left_out,
    )


def data_home(data_dir: Path | None = None) -> Path:
    """Return the data folder: the argument, $MIXMO_DATA_DIR, or fastai's data folder."""
    chosen = data_dir or os.environ.get("MIXMO_DATA_DIR")
    fastai_home = os.environ.get("FASTAI_HOME") or "~/.fastai"
    # Unlike os.path.expanduser, pathlib raises an error for an unknown user.
    return Path(os.path.expanduser(chosen or Path(fastai_home) / "data"))


@dataclass(frozen=True)
class DatasetStatus:
    """Availability of a named data set.

    Attributes:
        name: name of the data set.
        place: the folder or file that was checked; None for data that comes with a library.
        state: whether it is present and intact.
        detail: one line of explanation.
    """

    name: str
    place: Path | None
    state: Literal["present", "absent", "damaged"]
    detail: str


def dataset_status(name: str, data_dir: Path | None = None) -> DatasetStatus:
    """Check whether a named data set is present and its checksums match; nothing is changed.

    Raises:
        InputError: the name is unknown.
    """
    if name not in SOURCES:
        raise unknown_name_error("data set", name, SOURCES)
    archive, home = SOURCES[name].archive, data_home(data_dir)
    if archive is None:
        return DatasetStatus(name, None, "present", "nothing to download")
    unpacked = Unpacked(archive, home)
    if unpacked.folder.is_dir():
        problem = unpacked.damage()
        checked = any(md5 is not None for md5 in archive.members.values())
        found = "intact" if checked else "there; its files have no checksums to compare"
        return _status(name, unpacked.folder, problem, found)
    file = home / archive.file_name
    if file.is_file():
        return _status(name, file, archive_damage(archive, home), "unpacked at the first use")
    return DatasetStatus(name, unpacked.folder, "absent", "downloaded at the first use")


def _status(name: str, place: Path, problem: str | None, detail: str) -> DatasetStatus:
    if problem:
        return DatasetStatus(name, place, "damaged", problem)
    return DatasetStatus(name, place, "present", detail)


def _require_own_size(dataset: str, image_size: int | None) -> None:
    own = DATASETS[dataset].image_shape[-1]
    if image_size not in (None, own):
        raise InputError(
            f"image_size is {image_size}, but images of {dataset!r} are {own} x {own} pixels.\n"
            "Leave image_size out; it is for image folders."
        )


def _refuse_test_split(dataset: str, test_split: float | None) -> None:
    if test_split is not None:
        raise InputError(
            f"--test-split is for image folders without test images; {dataset!r} has a test set.\n"
            "Leave --test-split out."
        )


def _is_path(dataset: str) -> bool:
    has_separator = "/" in dataset or os.sep in dataset
    return has_separator or dataset.startswith((".", "~")) or Path(dataset).exists()
