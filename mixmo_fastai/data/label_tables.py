"""Tables of labels: one row per image, with its path, its label, and optionally split and group.

Paths are relative to the folder of the table, or to another folder; a name without folder or suffix
is found if only one image below that folder has it. Positions of rows are those of `text_tables`.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from mixmo_fastai.config.choices import TABLE_SUFFIXES
from mixmo_fastai.data.class_files import Note, examples
from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.class_names import (
    case_notes,
    check_no_measurements,
    class_order,
    whole_numbers,
)
from mixmo_fastai.data.file_finder import FileFinder, is_named
from mixmo_fastai.data.flag_columns import are_flags, flagged_labels, split_names
from mixmo_fastai.data.multi_labels import ALL, MultiLabels, describe_labels, split_labels
from mixmo_fastai.data.table_columns import (
    COLUMN_NAMES,
    NONE,
    TableColumns,
    find_columns,
    split_of,
)
from mixmo_fastai.data.text_tables import TextTable, filled, read_text_table
from mixmo_fastai.errors import InputError, nearest

ADVICE = "Use one row per image, with a column for its path and a column for its label."
_NUM_SHOWN, _NUM_COLUMNS = 3, 6


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The images of a table.

    Attributes:
        root: folder to which the files are relative, or a `hub_dataset.DatasetRoot`.
        columns: the columns that were used; several columns of labels with one label per image have
            the delimiter "none".
        parts: files by class, for each split in the table: "train", "valid" and "test"; without a
            column for the split, all are in "train". Files with several labels are all in the
            class `multi_labels.ALL`.
        groups: group of each file; empty without groups.
        notes: remarks, for the plan of a run: labels and texts.
        multi: the labels of images that may have several; None if each has one.
    """

    root: Any
    columns: TableColumns
    parts: Mapping[str, FilesByClass]
    groups: Mapping[str, str]
    notes: tuple[Note, ...]
    multi: MultiLabels | None = None


@dataclass(frozen=True)
class _Row:
    where: str
    file: str
    labels: tuple[str, ...]
    split: str
    group: str


def is_table(dataset: str | Path) -> bool:
    """Check whether the name of a data set is that of a table."""
    return str(dataset).lower().endswith(TABLE_SUFFIXES)


def read_label_table(
    path: Path, columns: TableColumns | None = None, left_out: Collection[str] = ()
) -> LabelTable:
    """Read a table of labels.

    Args:
        path: a file that `read_text_table` reads.
        columns: columns that are not to be guessed; None to guess all.
        left_out: images that may be missing.

    Raises:
        InputError: a column is missing, a row has an empty or impossible field, no image or the
            image of another row, a group is in two splits, there are fewer than two classes, or
            the labels are measurements.
    """
    if not path.is_file():
        raise InputError(f"There is no table {str(path)!r}.")
    columns = columns or TableColumns()
    table = read_text_table(path, ADVICE)
    root = path.parent / os.path.expanduser(columns.folder)
    if not root.is_dir():
        raise InputError(f"data.image_folder: there is no folder {root}.")
    finder = FileFinder(root)
    found = find_columns(table, columns, finder)
    rows = _read_rows(table, found, finder, left_out)
    _check_groups(rows, found)
    _check_no_flags(rows, found, table)
    rows, numbers = _with_whole_numbers(rows, found, table)
    rows, unlabelled = _without_unlabelled_splits(rows)
    found = _with_delimiter(found, rows)
    names = class_order({name for row in rows if row.split == "train" for name in row.labels})
    if found.delimiter == NONE:
        check_no_measurements({row.labels[0] for row in rows}, len(rows), str(path))
    _check_classes(rows, names, table)
    multi = None
    if found.delimiter != NONE:
        multi = MultiLabels(tuple(names), {row.file: row.labels for row in rows})
    keys = names if multi is None else [ALL]
    parts = {split: {name: list[str]() for name in keys} for split in ("train", "valid", "test")}
    for row in rows:
        parts[row.split][row.labels[0] if multi is None else ALL].append(row.file)
    for files in parts.values():
        for found_files in files.values():
            found_files.sort()  # so that drawn images do not depend on the order of the rows
    used = {split: files for split, files in parts.items() if any(files.values())}
    groups = {row.file: row.group for row in rows if row.group}
    notes = (
        ("Table", _describe(found, table)),
        *_label_notes(found, table, multi, names),
        *numbers,
        *unlabelled,
        *_unused_split_column(table, found),
        *case_notes(names),
        *_rare_labels(rows, names if len(_label_columns(found, table)) == 1 else ()),
    )
    return LabelTable(root, found, used, groups, notes, multi)


def _read_rows(
    table: TextTable, columns: TableColumns, finder: FileFinder, left_out: Collection[str]
) -> list[_Row]:
    positions = {
        meaning: table.header.index(name)
        for meaning in ("path", "split", "group")
        if (name := getattr(columns, meaning)) != NONE
    }
    label_positions = {name: table.header.index(name) for name in _label_columns(columns, table)}
    rows: list[_Row] = []
    first_rows: dict[str, str] = {}
    missing: list[tuple[str, str]] = []
    for position, fields in table.rows:
        where = table.where(position)
        values = {name: filled(fields[index], name, where) for name, index in positions.items()}
        labels = _labels(fields, label_positions, columns.delimiter, where)
        if (file := finder.find(values["path"], where)) is None:
            if not is_named(values["path"], left_out):
                missing.append((where, values["path"]))
            continue
        real = os.path.normcase(os.path.realpath(finder.root / file))
        if (earlier := first_rows.setdefault(real, where)) != where:
            raise InputError(
                f"{where}: the image {values['path']!r} is already in "
                f"{earlier.rpartition(', ')[2]}.\nKeep one row per image."
            )
        split = split_of(values["split"], columns.split) if "split" in values else "train"
        if split is None:
            raise InputError(
                f"{where}: {values['split']!r} is not a split.\n"
                "Splits are train, valid and test; data.split_column=none ignores the column."
            )
        rows.append(_Row(where, file, labels, split, values.get("group", "")))
    if missing:
        where, name = missing[0]
        more = f" ({len(missing):,} of {len(table.rows):,} rows have none)"
        raise InputError(
            f"{where}: there is no image {name!r}{more * (len(missing) > 1)}.\n"
            f"Paths are relative to {finder.root}; another folder: --set data.image_folder=FOLDER"
        )
    return rows


def _label_columns(columns: TableColumns, table: TextTable) -> tuple[str, ...]:
    return split_names(columns.label, table.header)


def _labels(
    fields: Sequence[str], positions: Mapping[str, int], delimiter: str, where: str
) -> tuple[str, ...]:
    """Return the labels of a row, from one column or from several of 0 and 1."""
    if len(positions) > 1:
        return flagged_labels(fields, positions, where)
    (index,) = positions.values()
    if delimiter == NONE:
        return (normalize("NFC", filled(fields[index], "label", where)),)
    return split_labels(fields[index], delimiter)


def _with_delimiter(columns: TableColumns, rows: Sequence[_Row]) -> TableColumns:
    """Decide whether several columns hold one label per image: if each image has exactly one.

    Raises:
        InputError: they have to, but an image has none or several.
    """
    row = next((row for row in rows if len(row.labels) != 1), None)
    if not columns.delimiter:
        return replace(columns, delimiter=NONE if row is None else ",")
    if columns.delimiter == NONE and row is not None:
        found = f"{len(row.labels)} columns of labels hold 1" if row.labels else "no column holds 1"
        raise InputError(
            f"{row.where}: {found}, but the table is read with one label per image "
            "(data.label_delimiter=none)."
        )
    return columns


def _check_no_flags(rows: Sequence[_Row], columns: TableColumns, table: TextTable) -> None:
    """Refuse lists such as [0, 1, 1], which mark labels instead of naming them."""
    if columns.label not in table.lists or all(len(row.labels) < 2 for row in rows):
        return
    if are_flags(label for row in rows for label in row.labels):
        raise InputError(
            f"{table.path}: the lists of {columns.label!r} hold only 0 and 1, not names.\n"
            "Write one column of 0 and 1 per label, or lists of names."
        )


def _with_whole_numbers(
    rows: list[_Row], columns: TableColumns, table: TextTable
) -> tuple[list[_Row], list[Note]]:
    """Write the labels of a column without decimals if all of them are whole numbers."""
    spelling = whole_numbers({label for row in rows for label in row.labels})
    if not spelling or len(_label_columns(columns, table)) > 1:
        return rows, []
    first = next(label for label, whole in sorted(spelling.items()) if label != whole)
    labels = (dict.fromkeys(spelling[label] for label in row.labels) for row in rows)
    rows = [replace(row, labels=tuple(each)) for row, each in zip(rows, labels, strict=True)]
    return rows, [("Numbers", f"labels such as {first} are read as {spelling[first]}")]


def _without_unlabelled_splits(rows: list[_Row]) -> tuple[list[_Row], list[Note]]:
    """Leave out validation or test images if none of them has a label: theirs are not known."""
    notes = []
    for split in ("valid", "test"):
        of_split = [row for row in rows if row.split == split]
        if of_split and not any(row.labels for row in of_split):
            rows = [row for row in rows if row.split != split]
            notes.append(("Not read", f"split {split}: its images have no labels"))
    return rows, notes


def _check_groups(rows: Sequence[_Row], columns: TableColumns) -> None:
    """Raise InputError if the images of a group are in two splits."""
    first: dict[str, _Row] = {}
    for row in rows:
        if row.group and (other := first.setdefault(row.group, row)).split != row.split:
            raise InputError(
                f"{row.where}: {columns.group} {row.group!r} is in {row.split}, but in "
                f"{other.split} in {other.where.rpartition(', ')[2]}.\n"
                "Keep each group in one split, or ignore groups: --set data.group_column=none"
            )


def _check_classes(rows: Sequence[_Row], names: Sequence[str], table: TextTable) -> None:
    """Check that there are two classes, and that no other split has more.

    Raises:
        InputError: there are fewer, or another split has another class.
    """
    if not names:
        has_rows = any(row.split == "train" for row in rows)
        missing = "no training image has a label" if has_rows else "no row is of the split train"
        raise InputError(f"{table.path}: {missing}.")
    if len(names) == 1:
        raise InputError(
            f"{table.path}: all training images have the label {names[0]!r}; two or more classes "
            "are needed.\nIs this the column of the labels? --set data.label_column=NAME"
        )
    for row in rows:
        for label in row.labels:
            if label not in names:
                guess = nearest(label, names)
                hint = f" Did you mean {guess!r}?" if guess else ""
                raise InputError(f"{row.where}: no training image has the label {label!r}.{hint}")


def _rare_labels(rows: Sequence[_Row], names: Sequence[str]) -> list[Note]:
    """Name the labels that occur once, which may be misspellings of one of `names`."""
    by_label: dict[str, list[_Row]] = {}
    for row in rows:
        for label in row.labels:
            by_label.setdefault(label, []).append(row)
    once = [(label, found[0]) for label, found in by_label.items() if len(found) == 1]
    others = [name for name in names if len(by_label[name]) > 1]
    texts = []
    for label, row in once[:_NUM_SHOWN]:
        guess = nearest(label, others)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        texts.append(f"{label!r} in {row.where.rpartition(', ')[2]}{hint}")
    more = f" and {len(once) - _NUM_SHOWN:,} more" if len(once) > _NUM_SHOWN else ""
    return [("Seen once", f"{', '.join(texts)}{more}")] if once else []


def _describe(columns: TableColumns, table: TextTable) -> str:
    """Describe the columns that are used."""
    labels = repr(columns.label)
    if len(names := _label_columns(columns, table)) > 1:
        labels = f"{len(names)} columns of 0 and 1 ({examples(names, _NUM_COLUMNS)})"
    elif columns.label in table.lists:
        labels = f"the lists of {labels}"
    elif columns.delimiter != NONE:
        labels += f" separated by {columns.delimiter!r}"
    texts = [f"{len(table.rows):,} rows; paths in {columns.path!r}, labels in {labels}"]
    for meaning in ("split", "group"):
        if (name := getattr(columns, meaning)) != NONE:
            texts.append(f"{meaning}s in {name!r}")
    return f"{', '.join(texts)}; change with --set data.label_column=NAME and others"


def _label_notes(
    columns: TableColumns, table: TextTable, multi: MultiLabels | None, names: Sequence[str]
) -> list[Note]:
    """Describe how many labels images have, and name the columns without images."""
    flags = _label_columns(columns, table)
    notes = []
    if multi is not None:
        label, text = describe_labels(multi)
        hint = "; for one per image: --set data.label_delimiter=none"
        hint *= len(flags) == 1 and columns.label not in table.lists
        notes.append((label, f"{text}{hint}"))
    elif len(flags) > 1:
        text = "one per image; to predict several: --set data.label_delimiter=,"
        notes.append(("Labels", text))
    if len(flags) > 1 and (empty := [name for name in flags if name not in names]):
        notes.append(
            ("Not used", f"columns of labels without any 1: {examples(empty, _NUM_COLUMNS)}")
        )
    return notes


def _unused_split_column(table: TextTable, columns: TableColumns) -> list[Note]:
    """Name a column that is called like one of splits, but does not hold any."""
    index = table.find(COLUMN_NAMES["split"], excluded=_label_columns(columns, table))
    if columns.split != NONE or index is None:
        return []
    value = table.rows[0][1][index].strip()
    text = f"column {table.header[index]!r}, which holds no splits such as train, but {value!r}"
    return [("Not used", text)]
