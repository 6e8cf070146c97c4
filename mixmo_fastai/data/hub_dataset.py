"""Data sets of the library Hugging Face datasets: saved to disk, parquet files, or by name.

Their images stay in their files, and are decoded like image files. The name of an image is its
split and its row, such as "train/12".
"""

import errno
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unicodedata import normalize

from mixmo_fastai.config.choices import HUB_PREFIX
from mixmo_fastai.config.hub_names import local_path
from mixmo_fastai.data.class_files import Note
from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.class_names import check_no_measurements, class_order, similar_names
from mixmo_fastai.data.label_tables import LabelTable
from mixmo_fastai.data.layout import is_saved_dataset, role_of
from mixmo_fastai.data.multi_labels import ALL, MultiLabels, describe_labels
from mixmo_fastai.data.table_columns import (
    COLUMN_NAMES,
    NONE,
    SPLIT_WORDS,
    TableColumns,
    check_columns,
    missing_column,
)
from mixmo_fastai.errors import InputError, summarize_error

UNLABELLED = -1
"""The label that the library gives to images of test sets without labels."""


@dataclass(frozen=True, eq=False)
class DatasetRoot:
    """The images of a data set, in place of the folder to which files are relative.

    Attributes:
        name: its name or path.
        splits: its splits, whose column of images is not decoded.
        column: name of this column.
    """

    name: str
    splits: Mapping[str, Any]
    column: str

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.name}"

    def __truediv__(self, file: str) -> "EncodedImage":
        return EncodedImage(self, file)

    def state(self, file: str) -> str:
        """Return a text that changes with the content of an image."""
        return str(self.splits[file.partition("/")[0]]._fingerprint)

    def read(self, file: str) -> bytes:
        """Return the encoded image of a row.

        Raises:
            OSError: the row has no image, or its file cannot be read.
        """
        split, _, row = file.partition("/")
        entry = self.splits[split][int(row)][self.column]
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "the row has no image", file)
        content = entry["bytes"]
        return Path(entry["path"]).read_bytes() if content is None else content


@dataclass(frozen=True)
class EncodedImage:
    """An image of a row, with what reading an image file needs of a path.

    Attributes:
        root: its data set.
        file: its name, such as "train/12".
    """

    root: DatasetRoot
    file: str

    def __str__(self) -> str:
        return f"{self.root}, {self.file}"

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the encoded image."""
        return io.BytesIO(self.root.read(self.file))

    def stat(self) -> Any:
        """Return the size in bytes, as `st_size`."""
        return SimpleNamespace(st_size=len(self.root.read(self.file)))

    def is_file(self) -> bool:
        """Return whether the row has an image."""
        try:
            self.root.read(self.file)
        except OSError:
            return False
        return True


def is_hub_dataset(dataset: str | Path) -> bool:
    """Check whether the name of a data set is that of this library."""
    return str(dataset).startswith(HUB_PREFIX)


def read_hub_dataset(dataset: str, columns: TableColumns) -> LabelTable:
    """Read which images a data set has, and their labels.

    Args:
        dataset: "hf:PATH", of a folder written by `save_to_disk`, or a parquet file or a folder of
            them; or "hf:NAME", which the library downloads, or finds in its own cache.
        columns: columns that are not to be guessed.

    Returns:
        as for a table of labels; the root is a `DatasetRoot`.

    Raises:
        InputError: the data set or the library is missing, a column is missing or has another
            type, or there are fewer than two classes.
    """
    import datasets

    name = dataset.removeprefix(HUB_PREFIX)
    splits, notes = _by_role(_load(name), dataset)
    features = splits["train"].features
    found = _find_columns(features, columns, dataset)
    image = datasets.Image(decode=False)
    root = DatasetRoot(
        name, {role: split.cast_column(found.path, image) for role, split in splits.items()},
        found.path,
    )  # fmt: skip
    inner = _element(features[found.label])
    feature = features[found.label] if inner is None else inner
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    parts: dict[str, FilesByClass] = {}
    labels_of: dict[str, tuple[str, ...]] = {}
    groups: dict[str, str] = {}
    for role, split in splits.items():
        labels = split[found.label]
        if role != "train" and inner is not None and not any(labels):
            notes.append(("Not read", f"split {role}: its images have no labels"))
            continue
        if inner is not None:
            labels_of |= _labels_by_file(role, labels, names, f"{dataset}, split {role}")
            parts[role] = {ALL: [f"{role}/{row}" for row in range(len(labels))]}
        elif role != "train" and set(labels) <= {UNLABELLED, None}:
            notes.append(("Not read", f"split {role}: its images have no labels"))
            continue
        else:
            parts[role] = _files_by_class(role, labels, names, f"{dataset}, split {role}")
        if found.group != NONE:
            groups |= _groups(role, split[found.group], f"{dataset}, split {role}")
    multi = None
    if inner is None:
        parts = _with_all_classes(parts, names, dataset)
    else:
        multi = _multi_labels(parts, labels_of, names, dataset)
        notes.append(describe_labels(multi))
    notes += similar_names(parts["train"] if multi is None else multi.classes)
    _check_groups(parts, groups, found, dataset)
    text = f"images in {found.path!r}, labels in {found.label!r}"
    text += f", groups in {found.group!r}" * (found.group != NONE)
    notes.insert(0, ("Columns", f"{text}; change with --set data.label_column=NAME and others"))
    return LabelTable(root, found, parts, groups, tuple(notes), multi)


def _element(feature: Any) -> Any:
    """Return the type of the elements of a column of lists; None for another column."""
    inner = getattr(feature, "feature", None)
    return inner[0] if isinstance(inner, list) else inner


def _load(name: str) -> Any:
    """Load a data set with the library.

    Raises:
        InputError: it does not exist, cannot be read, or needs a configuration.
    """
    if find_spec("datasets") is None:
        raise InputError(
            f"{HUB_PREFIX}{name} needs the library datasets.\n"
            "Install: pip install 'mixmo-fastai[datasets]'"
        )
    import datasets

    datasets.disable_progress_bars()  # only the command prints
    path = local_path(name)
    try:
        if path is None:
            return datasets.load_dataset(name)
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path))
        load = datasets.load_from_disk if is_saved_dataset(path) else datasets.load_dataset
        return load(str(path))
    except Exception as error:  # the library raises many types, also those of other libraries
        advice = f"There is no local folder {name!r} either.\n" if path is None else ""
        raise InputError(
            f"{HUB_PREFIX}{name} cannot be loaded: {summarize_error(error, 300)}.\n{advice}"
            "Give a folder written by save_to_disk, parquet files, or the name of a data set."
        ) from error


def _by_role(loaded: Any, dataset: str) -> tuple[dict[str, Any], list[Note]]:
    """Return the splits by their role: train, valid and test.

    Raises:
        InputError: there is no training split.
    """
    named = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    found: dict[str, Any] = {}
    others = []
    for name, split in named.items():
        role = role_of(name) or SPLIT_WORDS.get(name.lower())
        if role is None or role in found or not len(split):
            others.append(name)
        else:
            found[role] = split
    if "train" not in found:
        raise InputError(
            f"{dataset} has no split train; its splits are {', '.join(named)}.\n"
            "Save it with a split of this name."
        )
    order = [role for role in ("train", "valid", "test") if role in found]
    notes = [("Not read", f"splits {', '.join(others)}")] if others else []
    return {role: found[role] for role in order}, notes


def _find_columns(features: Mapping[str, Any], columns: TableColumns, dataset: str) -> TableColumns:
    """Find the columns by their types and names.

    Raises:
        InputError: a column is missing or has another type.
    """
    import datasets

    if columns.delimiter not in ("", NONE):
        raise InputError(
            "data.label_delimiter is for tables of labels; for several labels per image, "
            f"{dataset} needs a column of lists."
        )
    settings = {"split_column": columns.split, "fold": columns.fold, "image_folder": columns.folder}
    for name, value in settings.items():
        if value not in ("", NONE):
            raise InputError(
                f"data.{name} is for tables of labels; {dataset} holds its splits and images "
                f"itself.\nRemove {name}, or save the data set with other splits."
            )
    given = {"path": columns.path, "label": columns.label, "group": columns.group}
    check_columns(given.items(), features, dataset)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = given["path"] or next(iter(images), "")
    if image not in images:
        raise InputError(
            f"{dataset} has no column of images{f' {image!r}' if image else ''}; its columns are "
            f"{', '.join(features)}.\nCast it with datasets.Image() and save the data set again."
        )
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = given["label"] or _first_named(classes, "label") or _first_named(features, "label")
    label = label or next(iter(classes), "")
    if not label:
        raise missing_column("label", features, dataset)
    kind = features[label]
    if not isinstance(_element(kind) or kind, datasets.ClassLabel | datasets.Value):
        raise InputError(
            f"{dataset}: the column {label!r} holds {type(kind).__name__}, not one class per "
            "image or a list of classes."
        )
    group = given["group"] or _first_named(features, "group") or NONE
    return TableColumns(image, label, NONE, group)


def _first_named(names: Sequence[str] | Mapping[str, Any], meaning: str) -> str:
    return next((name for name in COLUMN_NAMES[meaning] if name in names), "")


def _files_by_class(
    role: str, labels: Sequence[Any], names: Sequence[str] | None, where: str
) -> FilesByClass:
    """Group the images of a split by the name of their class.

    Raises:
        InputError: an image has no label.
    """
    files: FilesByClass = {}
    for row, label in enumerate(labels):
        if label is None or (names is not None and not 0 <= label < len(names)):
            raise InputError(f"{where}, row {row}: the label is {label}.")
        text = str(label) if names is None else names[label]
        files.setdefault(normalize("NFC", text), []).append(f"{role}/{row}")
    return files


def _labels_by_file(
    role: str, labels: Sequence[Any], names: Sequence[str] | None, where: str
) -> dict[str, tuple[str, ...]]:
    """Return the names of the labels of each image of a split; an image may have none.

    Raises:
        InputError: a label is missing or out of range.
    """
    found = {}
    for row, values in enumerate(labels):
        if values is None:
            raise InputError(f"{where}, row {row}: the labels are missing; for none, use [].")
        for value in values:
            if value is None or (names is not None and not 0 <= value < len(names)):
                raise InputError(f"{where}, row {row}: a label is {value}.")
        texts = (str(value) if names is None else names[value] for value in values)
        found[f"{role}/{row}"] = tuple(dict.fromkeys(normalize("NFC", text) for text in texts))
    return found


def _multi_labels(
    parts: Mapping[str, FilesByClass],
    labels_of: Mapping[str, tuple[str, ...]],
    names: Sequence[str] | None,
    dataset: str,
) -> MultiLabels:
    """Put the labels of the training images into the order of the data set or `class_order`.

    Raises:
        InputError: there are fewer than two, or another split has other ones.
    """
    train = {label for file in parts["train"][ALL] for label in labels_of[file]}
    ordered = class_order(train) if names is None else [name for name in names if name in train]
    if len(ordered) < 2:
        raise InputError(f"{dataset}: the training images have {len(ordered)} label, not several.")
    for file, labels in labels_of.items():
        if unknown := [label for label in labels if label not in train]:
            raise InputError(f"{dataset}, {file}: no training image has the label {unknown[0]!r}.")
    return MultiLabels(tuple(ordered), labels_of)


def _groups(role: str, values: Sequence[Any], where: str) -> dict[str, str]:
    """Return the group of each image of a split.

    Raises:
        InputError: an image has none.
    """
    groups = {}
    for row, value in enumerate(values):
        if value is None:
            raise InputError(f"{where}, row {row}: the group is empty.")
        groups[f"{role}/{row}"] = str(value)
    return groups


def _with_all_classes(
    parts: Mapping[str, FilesByClass], names: Sequence[str] | None, dataset: str
) -> dict[str, FilesByClass]:
    """Put classes into one order, that of the data set or `class_order`.

    Raises:
        InputError: there are fewer than two classes, they are measurements, or a class has no
            training images.
    """
    train = parts["train"]
    check_no_measurements(train, sum(map(len, train.values())), dataset)
    ordered = class_order(set(train)) if names is None else [n for n in names if n in train]
    if len(ordered) < 2:
        raise InputError(f"{dataset}: the training images have one class only, {ordered[0]!r}.")
    for role, files in parts.items():
        if unknown := [name for name in files if name not in train]:
            raise InputError(
                f"{dataset}: split {role} has the class {unknown[0]!r}, which has no training "
                "image."
            )
    return {role: {name: files.get(name, []) for name in ordered} for role, files in parts.items()}


def _check_groups(
    parts: Mapping[str, FilesByClass],
    groups: Mapping[str, str],
    columns: TableColumns,
    dataset: str,
) -> None:
    """Raise InputError if the images of a group are in two splits."""
    role_of_group: dict[str, str] = {}
    for role, files in parts.items():
        for file in (file for class_files in files.values() for file in class_files):
            if not groups:
                return
            if (other := role_of_group.setdefault(groups[file], role)) != role:
                raise InputError(
                    f"{dataset}: {columns.group} {groups[file]!r} is in the splits {other} and "
                    f"{role}.\nIgnore groups: --set data.group_column=none"
                )
