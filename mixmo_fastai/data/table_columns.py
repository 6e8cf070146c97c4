"""Columns of a table of labels: given by their names, or found.

Columns are found by their names in `COLUMN_NAMES`, ignoring case, and by what they hold.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from mixmo_fastai.config.recipe import Data
from mixmo_fastai.data.class_files import examples
from mixmo_fastai.data.file_finder import FileFinder
from mixmo_fastai.data.flag_columns import (
    find_flag_columns,
    find_nearly_flags,
    join_names,
    split_names,
)
from mixmo_fastai.data.layout import role_of
from mixmo_fastai.data.multi_labels import find_delimiter
from mixmo_fastai.data.text_tables import TextTable
from mixmo_fastai.errors import InputError, did_you_mean, nearest

COLUMN_NAMES = {
    "path": (
        *("path", "image_path", "img_path", "file_path", "filepath", "filename", "file_name"),
        *("fname", "image_file", "image_filename", "file", "image", "img", "image_name"),
        *("img_name", "image_id", "img_id", "photo", "picture", "name", "id"),
    ),
    "label": (
        *("label", "label_name", "class", "class_name", "category", "target", "species", "breed"),
        *("diagnosis", "dx", "y", "tag", "label_id", "class_id", "category_id"),
        *("labels", "tags", "classes", "categories", "targets", "finding_labels", "findings"),
        *("finding labels", "attributes", "keywords"),
    ),
    "split": ("split", "subset", "partition", "set", "is_valid", "is_val", "is_validation"),
    "group": (
        *("patient", "patient_id", "patientid", "subject", "subject_id", "group", "group_id"),
        *("scene", "scene_id", "case_id", "lesion_id"),
    ),
}
"""Names of the columns by their meaning, ignoring case; the first present one is used."""
FOLD_NAMES = ("fold", "folds", "kfold", "k_fold", "fold_id", "fold_index", "cv_fold")
"""Names of columns of the folds of a cross-validation, which replace the splits."""
NONE = "none"
"""The name of a column that is not to be used, although a guess would find one."""
SPLIT_WORDS = {"dev": "valid", "development": "valid", "holdout": "test"}
"""Splits by names that are used in tables, beside those of folders."""
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), True),
    **dict.fromkeys(("false", "0", "0.0", "no"), False),
}
_BOOLEAN_SPLITS = {
    **dict.fromkeys(("is_valid", "is_val", "is_validation"), ("train", "valid")),
    **dict.fromkeys(("is_train", "is_training"), ("valid", "train")),
    **dict.fromkeys(("is_test", "is_testing"), ("train", "test")),
}
"""Splits of false and of true, by the name of the column."""
_MAX_COLUMNS = 10
_MAX_ROWS = 20  # in which an image is looked for


@dataclass(frozen=True)
class TableColumns:
    """Columns of a table of labels.

    Attributes:
        path, label, split, group: names of the columns; "" to find them by `COLUMN_NAMES`, and
            "none" for no split or no group. `label` may name several that hold 0 and 1, as
            `flag_columns.split_names` reads them.
        folder: folder to which paths are relative, itself relative to that of the table.
        delimiter: what separates several labels of an image; "" to find it, "none" for one label.
            With several columns, anything else than "none" is for several labels.
        fold: the fold that is used for validation, a value of the column `split`; "" if that column
            holds splits. The column is found by `FOLD_NAMES`.
    """

    path: str = ""
    label: str = ""
    split: str = ""
    group: str = ""
    folder: str = ""
    delimiter: str = ""
    fold: str = ""

    @property
    def are_default(self) -> bool:
        """Whether everything is to be found."""
        return self == TableColumns()


def columns_of(data: Data) -> TableColumns:
    """Return the columns that the settings of a recipe name."""
    return TableColumns(
        data.path_column,
        data.label_column,
        data.split_column,
        data.group_column,
        data.image_folder,
        data.label_delimiter,
        data.fold,
    )


def find_columns(table: TextTable, columns: TableColumns, finder: FileFinder) -> TableColumns:
    """Fill in the columns that are to be guessed, and the delimiter of one column of labels.

    Raises:
        InputError: a given column does not exist, or a required one is not found.
    """
    given = {name: getattr(columns, name) for name in COLUMN_NAMES}
    _check_header(table, finder, "path,label")
    labels = split_names(given["label"], table.header)
    others = [(meaning, name) for meaning, name in given.items() if meaning != "label"]
    pairs = [*others, *(("label", name) for name in labels)]
    check_columns(pairs, table.header, str(table.path))
    if given["label"] and not labels:
        raise missing_column("label", table.header, str(table.path))
    given["label"] = join_names(labels) if len(labels) > 1 else labels[0]
    if columns.fold and given["split"] in ("", NONE):
        given["split"] = _fold_column(table)
    if columns.fold:
        _check_no_test_rows(table, given["split"])
    used = [name for name in (*given.values(), *labels) if name]
    for meaning in ("split", "group", "path", "label"):
        if not given[meaning]:
            guess = _guess(table, meaning, used, finder)
            given[meaning] = guess or NONE
            used.append(given[meaning])
    if given["path"] == NONE:
        raise missing_column("path", table.header, str(table.path))
    if given["label"] == NONE:
        given["label"] = _guess_flag_columns(table, used)
    delimiter = columns.delimiter
    if given["label"] in table.lists and delimiter != NONE:
        delimiter = table.lists[given["label"]]
    elif not delimiter and len(split_names(given["label"], table.header)) == 1:
        index = table.header.index(given["label"])
        delimiter = find_delimiter(given["label"], [fields[index] for _, fields in table.rows])
    return replace(columns, **given, delimiter=delimiter)


def _fold_column(table: TextTable) -> str:
    """Return the column of the folds, found by its name."""
    if (index := table.find(FOLD_NAMES)) is not None:
        return table.header[index]
    raise InputError(
        f"data.fold: which column of {table.path} holds the folds? "
        f"Columns: {examples(table.header, _MAX_COLUMNS)}.\n"
        "Name it: --set data.split_column=NAME"
    )


def _check_no_test_rows(table: TextTable, fold_column: str) -> None:
    """Refuse folds if another column marks test images, which would be trained on."""
    index = table.find(COLUMN_NAMES["split"], excluded=(fold_column,))
    if index is None:
        return
    name = table.header[index]
    if any(split_of(fields[index], name) == "test" for _, fields in table.rows):
        raise InputError(
            f"{table.path}: {name!r} marks test images, but data.fold uses the column "
            f"{fold_column!r} alone.\nWrite test for them in {fold_column!r}, and rename {name!r}."
        )


def find_path_column(table: TextTable, finder: FileFinder, given: str = "") -> str:
    """Return the column that holds the paths of images: the given one if the table has it.

    Raises:
        InputError: no column is called like one of paths, or names an image; or the first line
            names an image.
    """
    _check_header(table, finder, "path")
    found = given if given in table.header else _guess(table, "path", (), finder)
    if found is None:
        raise InputError(
            f"{table.path}: which column holds the paths? "
            f"Columns: {examples(table.header, _MAX_COLUMNS)}.\n"
            "Call it path, or name the folder of the images: --image-folder FOLDER"
        )
    return found


def _check_header(table: TextTable, finder: FileFinder, example: str) -> None:
    """Check that the first line names the columns, not an image."""
    images = [name for name in table.header if Path(name).suffix and finder.is_image(name)]
    if images:
        raise InputError(
            f"{table.path}, line 1 names the image {images[0]!r} instead of the columns.\n"
            f"Add a first line such as: {example}"
        )


def check_columns(given: Iterable[tuple[str, str]], columns: Collection[str], where: str) -> None:
    """Check that the columns which were given exist.

    Args:
        given: meaning and name of each column; a name may be "" or "none".
        columns: the columns that exist.
        where: the data, for messages.

    Raises:
        InputError: one does not.
    """
    for meaning, name in given:
        if name and name != NONE and name not in columns:
            guess = nearest(name, columns)
            hint = did_you_mean(guess)
            raise InputError(
                f"data.{meaning}_column: {where} has no column {name!r}.{hint}\n"
                f"Columns: {examples([*columns], _MAX_COLUMNS)}."
            )


def missing_column(meaning: str, columns: Collection[str], where: str) -> InputError:
    """Build the error for a required column that is not found."""
    return InputError(
        f"{where}: which column holds the {meaning}s? "
        f"Columns: {examples([*columns], _MAX_COLUMNS)}.\n"
        f"Name it: --set data.{meaning}_column=NAME"
    )


def _guess_flag_columns(table: TextTable, used: Sequence[str]) -> str:
    """Find the labels in columns of 0 and 1, if all that are not used hold nothing else.

    Raises:
        InputError: there are fewer than two, or another column.
    """
    rest = [name for name in table.header if name not in used]
    found = find_flag_columns(table, rest)
    if len(found) == len(rest) > 1:
        return join_names(found)
    setting = f"--set {quote(f'data.label_column={join_names(found)}')}"
    if (near := find_nearly_flags(table, [n for n in rest if n not in found])) and found:
        name, position, value = near
        raise InputError(
            f"{table.where(position)}: the column {name!r} holds {value!r}, but 0 or 1 in most "
            f"{table.unit}s.\nCorrect the field. If this is no label, name the columns: {setting}"
        )
    error = missing_column("label", table.header, str(table.path))
    if 1 < len(found) <= _MAX_COLUMNS:
        raise InputError(f"{error}\nOr name all columns of 0 and 1: {setting}")
    raise error


def _guess(table: TextTable, meaning: str, used: Sequence[str], finder: FileFinder) -> str | None:
    """Find a column by its name; for paths and labels otherwise by what it holds."""
    by_lower = {name.lower(): name for name in reversed(table.header) if name not in used}
    named = [by_lower[name] for name in COLUMN_NAMES[meaning] if name in by_lower]
    rest = [name for name in table.header if name not in used]
    if meaning == "path":
        first = [dict(zip(table.header, row, strict=True)) for _, row in table.rows[:_MAX_ROWS]]
        images = [name for name in named if any(finder.is_image(row[name]) for row in first)]
        # Labels may be names of images by chance, and so may numbers.
        others = [name for name in rest if finder.is_image(first[0][name])]
        return next(iter([*images, *others, *named]), None)
    if meaning == "split" and named:
        index = table.header.index(named[0])
        values = (fields[index] for _, fields in table.rows)
        named = named if any(split_of(value, named[0]) for value in values) else []
    if meaning == "label" and len(rest) == 1:
        named = rest
    return next(iter(named), None)


def split_of(value: str, column: str, fold: str = "") -> str | None:
    """Return the split that a value of a column stands for, or None.

    Args:
        value: a field of the column.
        column: its name.
        fold: the fold that is used for validation, if the column holds folds; the others are for
            training, except one that is called like a test set.
    """
    lower = value.strip().lower()
    role = role_of(lower) or SPLIT_WORDS.get(lower)
    if fold:
        if fold_name(lower) == fold_name(fold.lower()):
            return "valid"
        return "test" if role == "test" else "train"
    if (splits := _BOOLEAN_SPLITS.get(column.lower())) is not None:
        answer = _BOOLEANS.get(lower)
        return None if answer is None else splits[answer]
    return role


def fold_name(value: str) -> str:
    """Return the name of a fold without the decimals that pandas writes: 3 for 3.0."""
    return value.strip().removesuffix(".0")
