"""Choose the training, validation and test images of a table of labels; see `label_tables`."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixmo_fastai.data.chosen_images import ChosenImages
from mixmo_fastai.data.class_files import (
    Note,
    check_drawn,
    draw_files,
    drawn_text,
    missing_classes,
    renamed,
    run_spelling,
    split_files,
)
from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.hub_dataset import is_hub_dataset, read_hub_dataset
from mixmo_fastai.data.label_tables import LabelTable, read_label_table
from mixmo_fastai.data.multi_labels import ALL, MultiLabels, check_names, missing_labels
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.splits import DEFAULT_TEST_SPLIT
from mixmo_fastai.data.table_columns import NONE, TableColumns
from mixmo_fastai.errors import InputError

_SPLIT_NAMES = {"valid": "validation", "test": "testing"}


def choose_table_images(
    path: Path | str, columns: TableColumns, test_split: float | None = None
) -> tuple[Any, ChosenImages]:
    """Read the splits of a table, and draw a test set if it has none.

    Args:
        path: the table, or the name of a `hub_dataset`.
        columns: its columns, as far as they are not to be guessed.
        test_split: fraction of each class to draw, by groups if there are any; None for
            `DEFAULT_TEST_SPLIT` if there are neither test nor validation images, and for no test
            set otherwise.

    Returns:
        the folder to which files are relative, and the images.

    Raises:
        InputError: as for `read_label_table`, or `test_split` was given for a table with test
            images.
    """
    table = read_table(path, columns)
    if "test" in table.parts and test_split is not None:
        raise InputError(
            f"--test-split is for data without test images, but {path} has some.\n"
            "Remove --test-split, or ignore the column: --set data.split_column=none"
        )
    if test_split is None:
        test_split = 0.0 if table.parts.keys() - {"train"} else DEFAULT_TEST_SPLIT
    targets = None if table.multi is None else table.multi.targets
    drawn = draw_files(table.parts["train"], test_split, table.groups, targets)
    parts = DataParts(
        ".",
        valid="valid" if "valid" in table.parts else None,
        test="test" if "test" in table.parts else None,
        drawn=drawn,
        columns=asdict(table.columns),
    )
    train, test = split_files(table.parts["train"], drawn)
    return table.root, _chosen(table, parts, train, test, [], multi=table.multi)


def reopen_table_images(
    path: Path | str,
    parts: DataParts,
    classes: Sequence[str] | None = None,
    left_out: Collection[str] = (),
) -> tuple[Any, ChosenImages]:
    """Read the images of an earlier run.

    Args:
        path: as for `choose_table_images`.
        parts: the splits stored with the run.
        classes: class names of the run, in the order of its labels.
        left_out: files skipped by the run; they may be missing.

    Raises:
        InputError: as for `read_label_table`, an image of the run is missing, or a class is new.
    """
    table = read_table(path, TableColumns(**(parts.columns or {})), left_out)
    files, notes = table.parts["train"], list[Note]()
    if parts.drawn is not None:
        notes += check_drawn(path, parts.drawn, files, left_out)
    train, test = split_files(files, parts.drawn)
    if table.multi is not None:
        multi = check_names(str(path), train[ALL], table.multi, classes)
        return table.root, _chosen(table, parts, train, test, notes, multi=multi)
    spelling = run_spelling(path, train, classes)
    train, test = renamed(train, spelling), renamed(test, spelling)
    return table.root, _chosen(table, parts, train, test, notes, multi=None)


def read_table(
    path: Path | str, columns: TableColumns, left_out: Collection[str] = ()
) -> LabelTable:
    """Read a table of labels or a `hub_dataset`; see `label_tables.read_label_table`."""
    if is_hub_dataset(path):
        return read_hub_dataset(str(path), columns)
    return read_label_table(Path(path), columns, left_out)


def _chosen(
    table: LabelTable,
    parts: DataParts,
    train: FilesByClass,
    drawn: FilesByClass,
    notes: list[Note],
    *,
    multi: MultiLabels | None,
) -> ChosenImages:
    """Put the splits together, each with the classes of the training images.

    Raises:
        InputError: another split has a class without training images.
    """
    # A split whose images were labelled after the run began is not used.
    labelled = {
        role: {name: table.parts[role].get(name, []) for name in train}
        for role in ("valid", "test")
        if role in table.parts and getattr(parts, role) is not None
    }
    checked = {"test": drawn, **labelled} if any(drawn.values()) else labelled
    for role, part in (("valid", "validation"), ("test", "test")):
        if role not in checked:
            continue
        if multi is None:
            notes += missing_classes(role, checked[role])
        else:
            notes += missing_labels(part, checked[role][ALL], multi)
    return ChosenImages(
        train,
        labelled.get("valid"),
        labelled.get("test", drawn),
        parts,
        (*table.notes, *_split_notes(table, parts), *notes),
        table.groups,
        multi,
    )


def _split_notes(table: LabelTable, parts: DataParts) -> list[Note]:
    notes = []
    found = [role for role in ("valid", "test") if getattr(parts, role) is not None]
    if found:
        fold = table.columns.fold and f" (fold {table.columns.fold})"
        spelled = {**_SPLIT_NAMES, "valid": f"{_SPLIT_NAMES['valid']}{fold}"}
        names = " and ".join(spelled[role] for role in found)
        where = f" as in {table.columns.split!r}" if table.columns.split != NONE else ""
        notes.append(("Splits", f"{names}{where}" if where else f"{names}: those of the data set"))
    if "test" not in found:
        text = drawn_text(parts.drawn)
        if parts.drawn is not None and table.columns.group != NONE:
            text += f"; whole groups of {table.columns.group!r}"
        notes.append(("Test set", text))
    return notes
