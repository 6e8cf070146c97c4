"""Load data sets by name or folder."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mixmo_fastai.config.choices import DATASETS, TABLE_SUFFIXES, is_table
from mixmo_fastai.data.archives import Archive, Unpacked, archive_damage, fetch
from mixmo_fastai.data.cifar import CIFAR10, CIFAR100, read_cifar10, read_cifar100
from mixmo_fastai.data.damage import LeftOut
from mixmo_fastai.data.digits import read_digits
from mixmo_fastai.data.hub_dataset import is_hub_dataset
from mixmo_fastai.data.image_folder import read_image_folder, read_image_table
from mixmo_fastai.data.image_sets import (
    ArrayImages,
    DataSource,
    FileImages,
    ImageSet,
    resize_images,
)
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.source_checks import check_against_facts
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.data.tiny_imagenet import TINY_IMAGENET, read_tiny_imagenet
from mixmo_fastai.errors import InputError, unknown_name_error

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
    """How to load a named data set.

    Attributes:
        read: builds the data source from the unpacked archive; without arguments if there is no
            archive.
        archive: the archive to download, verify and unpack; None for data included in a library.
        has_files: whether the images are separate files, some of which may be damaged.
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
        """Load the data set from a data folder; `fetch` first downloads or unpacks it if needed."""
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
"""All named data sets. `choices.DATASETS` holds the facts that are known without reading them."""


def load_source(
    dataset: str | Path,
    data_dir: Path | None = None,
    *,
    columns: TableColumns | None = None,
    image_size: int | None = None,
    chosen_size: tuple[int, ...] | None = None,
    largest_side: int | None = None,
    download: bool = True,
    test_split: float | None = None,
    parts: DataParts | None = None,
    classes: Sequence[str] | None = None,
    skip_damaged: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Load a data set, downloading it if necessary.

    Args:
        dataset: a name in `SOURCES`, or the path of an image folder or of a table of labels; a
            name has priority over a folder of the same name.
        data_dir: the data folder; see `data_home`.
        columns: columns of a table of labels, as far as they are not to be found.
        image_size: height and width to which images are resized; None for the original size of a
            named data set, or the size chosen for a folder by `choose_image_size`.
        chosen_size: the height and width that were chosen in an earlier run.
        largest_side: maximum for the size that is chosen; if a side is longer, images are resized
            to squares of this size.
        download: whether an archive may be downloaded.
        test_split: fraction of each class to hold out as the test set of an image folder without
            one; see `read_image_folder`.
        parts: the split of an image folder in an earlier run; see `read_image_folder`.
        classes: classes of that run.
        skip_damaged: whether to skip image files that cannot be decoded; otherwise an error lists
            all of them.
        left_out: image files skipped by an earlier run; exactly these are skipped again.

    Raises:
        InputError: the data set is unknown, missing, damaged or not in a supported layout.
    """
    home = data_home(data_dir)
    if home.exists() and not home.is_dir():
        raise InputError(f"The data folder {home} is a file.\nChoose another --data-dir.")
    _check_no_columns(dataset, columns)
    if dataset in SOURCES:
        _check_no_test_split(str(dataset), test_split)
        source = SOURCES[dataset].load(
            home, download=download, skip_damaged=skip_damaged, left_out=left_out
        )
        facts, has_files = DATASETS[str(dataset)], SOURCES[dataset].has_files
        check_against_facts(source, facts, may_have_fewer_classes=has_files)
        return source if image_size is None else _resized(source, image_size)
    if isinstance(dataset, str) and not _is_path(dataset) and not is_hub_dataset(dataset):
        raise InputError(
            f"{unknown_name_error('data set', dataset, SOURCES)}\n"
            "Or give the path of a folder of images, such as ./flowers, of a table of labels, or "
            "hf:NAME."
        )
    read = read_image_folder
    path: Path | str = Path(dataset).expanduser()
    if is_hub_dataset(dataset):
        path = str(dataset)
    if is_table(dataset) or is_hub_dataset(dataset):
        read = partial(read_image_table, columns=columns)
    return read(
        path,
        home,
        image_size=image_size,
        chosen_size=chosen_size,
        test_split=test_split,
        parts=parts,
        classes=classes,
        largest_side=largest_side,
        skip_damaged=skip_damaged,
        left_out=left_out,
    )


def data_home(data_dir: Path | None = None) -> Path:
    """Return the data folder: `data_dir`, else $MIXMO_DATA_DIR, else fastai's data folder."""
    chosen = data_dir or os.environ.get("MIXMO_DATA_DIR")
    fastai_home = os.environ.get("FASTAI_HOME") or "~/.fastai"
    # Unlike os.path.expanduser, Path.expanduser raises an error for an unknown user.
    return Path(os.path.expanduser(chosen or Path(fastai_home) / "data"))


@dataclass(frozen=True)
class DatasetStatus:
    """State of a named data set on disk.

    Attributes:
        name: name of the data set.
        place: the folder or file that was checked; None for data included in a library.
        state: whether the data set is present and intact.
        detail: explanation in one line.
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
        has_checksums = any(md5 is not None for md5 in archive.members.values())
        found = "intact" if has_checksums else "present; its files have no checksums to verify"
        return _status(name, unpacked.folder, problem, found)
    file = home / archive.file_name
    if file.is_file():
        return _status(name, file, archive_damage(archive, home), "unpacked on first use")
    return DatasetStatus(name, unpacked.folder, "absent", "downloaded on first use")


def _status(name: str, place: Path, problem: str | None, detail: str) -> DatasetStatus:
    if problem:
        return DatasetStatus(name, place, "damaged", problem)
    return DatasetStatus(name, place, "present", detail)


def _resized(source: DataSource, size: int) -> DataSource:
    """Resize the images of a named data set, and the padding of its random crop in proportion."""
    before = source.train.image_shape[-1]
    padding = source.crop_padding * size // before
    train, test = (resize_images(images, size) for images in (source.train, source.test))
    return replace(source, train=train, test=test, crop_padding=padding)


def _check_no_test_split(dataset: str, test_split: float | None) -> None:
    if test_split is not None:
        raise InputError(
            f"--test-split is for image folders without test images; {dataset!r} has a test set.\n"
            "Remove --test-split."
        )


def _check_no_columns(dataset: str | Path, columns: TableColumns | None) -> None:
    has_columns = is_table(dataset) or is_hub_dataset(dataset)
    if columns is not None and not columns.are_default and not has_columns:
        given = [name for name, value in vars(columns).items() if value]
        setting = {"folder": "image_folder", "delimiter": "label_delimiter", "fold": "fold"}
        name = setting.get(given[0], f"{given[0]}_column")
        raise InputError(
            f"Columns and data.{name} are for tables of labels; {str(dataset)!r} is "
            f"none.\nPass the path of a table: {', '.join(TABLE_SUFFIXES)}."
        )


def _is_path(dataset: str) -> bool:
    has_separator = "/" in dataset or os.sep in dataset
    return has_separator or dataset.startswith((".", "~")) or Path(dataset).exists()
