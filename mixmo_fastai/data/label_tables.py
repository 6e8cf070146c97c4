"""Tables of labels: one row per image, with its path, its label, and optionally split and group.

Paths are relative to the folder of the table, or to another folder; a name without folder or suffix
is found if only one image below that folder has it. Positions of rows are those of `text_tables`.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any
from unicodedata import normalize

from mixmo_fastai.data.class_files import Note, examples
from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.class_names import (
    check_no_measurements,
    class_order,
    is_nan,
    similar_names,
    whole_numbers,
)
from mixmo_fastai.data.file_finder import FileFinder, is_named
from mixmo_fastai.data.flag_columns import are_flags, flagged_labels, split_names
from mixmo_fastai.data.multi_labels import (
    ALL,
    MultiLabels,
    describe_labels,
    possible_delimiter,
    split_labels,
)
from mixmo_fastai.data.table_columns import (
    COLUMN_NAMES,
    FOLD_NAMES,
    NONE,
    TableColumns,
    find_columns,
    fold_name,
    split_of,
)
from mixmo_fastai.data.table_rows import (
    TableRow,
    check_classes,
    check_groups,
    rare_labels,
    without_nan,
    without_unlabelled_splits,
)
from mixmo_fastai.data.text_tables import TextTable, filled, read_text_table
from mixmo_fastai.errors import InputError, did_you_mean

ADVICE = "Use one row per image, with a column for its path and a column for its label."
_NUM_COLUMNS, _NUM_LABELS = 6, 20


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
    rows = _read_rows(table, found)
    _check_fold(rows, found, table)
    if found.delimiter == NONE and len(_label_columns(found, table)) == 1:
        rows = without_nan(rows)
    rows, unlabelled = without_unlabelled_splits(rows)
    rows = _find_files(rows, found, finder, left_out)
    check_groups(rows, found)
    _check_no_flags(rows, found, table)
    rows, numbers = _with_whole_numbers(rows, found, table)
    found = _with_delimiter(found, rows)
    names = class_order({name for row in rows if row.split == "train" for name in row.labels})
    if found.delimiter == NONE:
        check_no_measurements({row.labels[0] for row in rows}, len(rows), str(path))
    check_classes(rows, names, table)
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
        *_label_notes(found, table, multi, names, delimiter_is_given=bool(columns.delimiter)),
        *numbers,
        *unlabelled,
        *_unused_split_column(table, found),
        *similar_names(names),
        *rare_labels(rows, names if len(_label_columns(found, table)) == 1 else ()),
    )
    return LabelTable(root, found, used, groups, notes, multi)


def _read_rows(table: TextTable, columns: TableColumns) -> list[TableRow]:
    """Read labels and splits; paths and groups are still the fields of the table."""
    positions = {
        meaning: table.header.index(name)
        for meaning in ("path", "split", "group")
        if (name := getattr(columns, meaning)) != NONE
    }
    label_positions = {name: table.header.index(name) for name in _label_columns(columns, table)}
    rows: list[TableRow] = []
    for position, fields in table.rows:
        where, split = table.where(position), "train"
        if "split" in positions:
            text = filled(fields[positions["split"]], "split", where)
            found = split_of(text, columns.split, columns.fold)
            if found is None:
                raise InputError(
                    f"{where}: {text!r} is not a split.\n"
                    "Splits are train, valid and test; data.split_column=none ignores the column."
                )
            split = found
        labels = _labels(fields, label_positions, columns.delimiter, where)
        group = fields[positions["group"]].strip() if "group" in positions else ""
        rows.append(TableRow(where, fields[positions["path"]].strip(), labels, split, group))
    return rows


def _check_fold(rows: Sequence[TableRow], columns: TableColumns, table: TextTable) -> None:
    """Raise InputError if there are no images to validate or to train on."""
    splits = {row.split for row in rows}
    if columns.fold and not {"train", "valid"} <= splits:
        index = table.header.index(columns.split)
        folds = class_order({fold_name(fields[index]) for _, fields in table.rows})
        problem = "has no row of" if "train" in splits else "has no fold to train on besides"
        raise InputError(
            f"{table.path}: the column {columns.split!r} {problem} data.fold={columns.fold}.\n"
            f"It holds {examples(folds, _NUM_COLUMNS)}."
        )


def _find_files(
    rows: Sequence[TableRow],
    columns: TableColumns,
    finder: FileFinder,
    left_out: Collection[str],
) -> list[TableRow]:
    """Replace the paths of a table by files; leave out those that may be missing."""
    found: list[TableRow] = []
    first_rows: dict[str, str] = {}
    missing: list[TableRow] = []
    for row in rows:
        filled(row.file, "path", row.where)
        if columns.group != NONE:
            advice = "Fill it in, or ignore groups: --set data.group_column=none"
            filled(row.group, "group", row.where, advice)
        if (file := finder.find(row.file, row.where)) is None:
            if not is_named(row.file, left_out):
                missing.append(row)
            continue
        real = os.path.normcase(os.path.realpath(finder.root / file))
        if (earlier := first_rows.setdefault(real, row.where)) != row.where:
            raise InputError(
                f"{row.where}: the image {row.file!r} is already in "
                f"{earlier.rpartition(', ')[2]}.\nKeep one row per image. Several labels of one "
                "are in one field, such as cat|dog, or in one column each."
            )
        found.append(replace(row, file=file))
    if missing:
        more = f" ({len(missing):,} of {len(rows):,} rows have none)" * (len(missing) > 1)
        guess = finder.similar(missing[0].file)
        hint = did_you_mean(guess)
        raise InputError(
            f"{missing[0].where}: there is no image {missing[0].file!r}{more}.{hint}\n"
            f"Paths are relative to {finder.root}; another folder: --set data.image_folder=FOLDER"
        )
    return found


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
        return (normalize("NFC", fields[index].strip()),)
    return () if is_nan(fields[index].strip()) else split_labels(fields[index], delimiter)


def _with_delimiter(columns: TableColumns, rows: Sequence[TableRow]) -> TableColumns:
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


def _check_no_flags(rows: Sequence[TableRow], columns: TableColumns, table: TextTable) -> None:
    """Refuse lists such as [0, 1, 1], which mark labels instead of naming them."""
    if columns.label not in table.lists or all(len(row.labels) < 2 for row in rows):
        return
    if are_flags(label for row in rows for label in row.labels):
        raise InputError(
            f"{table.path}: the lists of {columns.label!r} hold only 0 and 1, not names.\n"
            "Write one column of 0 and 1 per label, or lists of names."
        )


def _with_whole_numbers(
    rows: list[TableRow], columns: TableColumns, table: TextTable
) -> tuple[list[TableRow], list[Note]]:
    """Write the labels of a column without decimals if all of them are whole numbers."""
    spelling = whole_numbers({label for row in rows for label in row.labels})
    if not spelling or len(_label_columns(columns, table)) > 1:
        return rows, []
    first = next(label for label, whole in sorted(spelling.items()) if label != whole)
    labels = (dict.fromkeys(spelling[label] for label in row.labels) for row in rows)
    rows = [replace(row, labels=tuple(each)) for row, each in zip(rows, labels, strict=True)]
    return rows, [("Numbers", f"labels such as {first} are read as {spelling[first]}")]


def _describe(columns: TableColumns, table: TextTable) -> str:
    """Describe the columns that are used."""
    labels = repr(columns.label)
    if len(names := _label_columns(columns, table)) > 1:
        labels = f"{len(names)} columns of 0 and 1 ({examples(names, _NUM_LABELS)})"
    elif columns.label in table.lists:
        labels = f"the lists of {labels}"
    elif columns.delimiter != NONE:
        labels += f" separated by {columns.delimiter!r}"
    texts = [f"{len(table.rows):,} rows; paths in {columns.path!r}, labels in {labels}"]
    for meaning in ("split", "group"):
        if (name := getattr(columns, meaning)) != NONE:
            is_fold = meaning == "split" and columns.fold
            texts.append(f"{'folds' if is_fold else f'{meaning}s'} in {name!r}")
    return f"{', '.join(texts)}; change with --set data.label_column=NAME and others"


def _label_notes(
    columns: TableColumns,
    table: TextTable,
    multi: MultiLabels | None,
    names: Sequence[str],
    *,
    delimiter_is_given: bool,
) -> list[Note]:
    """Describe how many labels images have, and name the columns without images."""
    flags = _label_columns(columns, table)
    notes = []
    if multi is None and len(flags) == 1 and not delimiter_is_given:
        delimiter, parts = possible_delimiter(names)
        if delimiter:
            text = f"one per image, {len(names):,} combinations of {parts:,} words; if they are"
            hint = f"several labels: --set {quote(f'data.label_delimiter={delimiter}')}"
            notes.append(("Labels", f"{text} {hint}"))
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
    """Name a column of folds, or one that is called like one of splits but does not hold any."""
    labels = _label_columns(columns, table)
    if columns.split == NONE and (fold := table.find(FOLD_NAMES, labels)) is not None:
        value = fold_name(table.rows[0][1][fold])
        text = f"column {table.header[fold]!r}; to validate on one fold: --set data.fold={value}"
        return [("Not used", text)]
    index = table.find(COLUMN_NAMES["split"], excluded=labels)
    if columns.split != NONE or index is None:
        return []
    value = table.rows[0][1][index].strip()
    text = f"column {table.header[index]!r}, which holds no splits such as train, but {value!r}"
    return [("Not used", text)]
