"""Rows of a table of labels, and checks of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixmo_fastai.data.class_files import Note
from mixmo_fastai.data.class_names import is_nan
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.data.text_tables import TextTable
from mixmo_fastai.errors import InputError, did_you_mean, nearest

_NUM_SHOWN = 3


@dataclass(frozen=True)
class TableRow:
    """One image of a table.

    Attributes:
        where: position of the row, for messages.
        file: the image, relative to the folder of the images.
        labels: its labels; empty if it has none.
        split: "train", "valid" or "test".
        group: its group; "" without groups.
    """

    where: str
    file: str
    labels: tuple[str, ...]
    split: str
    group: str


def without_nan(rows: Sequence[TableRow]) -> list[TableRow]:
    """Remove empty labels, and "nan", from splits in which no image has another label.

    Args:
        rows: with one label each.

    Raises:
        InputError: another image of the split has a label, or it is that of the training images.
    """
    labelled = {"train", *(row.split for row in rows if not is_nan(row.labels[0]))}
    unlabelled = [row for row in rows if is_nan(row.labels[0])]
    if refused := [row for row in unlabelled if row.split in labelled]:
        text = refused[0].labels[0]
        more = f" ({len(refused):,} of {len(rows):,} rows have none)"
        raise InputError(
            f"{refused[0].where}: the label is {repr(text) if text else 'empty'}"
            f"{more * (len(refused) > 1)}.\n"
            "Remove rows without a label; mixmo predict predicts their images."
            f"{' If it is a class, give it another name.' if text else ''}"
        )
    return [replace(row, labels=()) if is_nan(row.labels[0]) else row for row in rows]


def without_unlabelled_splits(rows: list[TableRow]) -> tuple[list[TableRow], list[Note]]:
    """Leave out validation or test images if none of them has a label: theirs are not known."""
    notes = []
    for split in ("valid", "test"):
        of_split = [row for row in rows if row.split == split]
        if of_split and not any(row.labels for row in of_split):
            rows = [row for row in rows if row.split != split]
            notes.append(("Not read", f"split {split}: its images have no labels"))
    return rows, notes


def check_groups(rows: Sequence[TableRow], columns: TableColumns) -> None:
    """Raise InputError if the images of a group are in two splits."""
    first: dict[str, TableRow] = {}
    for row in rows:
        if row.group and (other := first.setdefault(row.group, row)).split != row.split:
            raise InputError(
                f"{row.where}: {columns.group} {row.group!r} is in {row.split}, but in "
                f"{other.split} in {other.where.rpartition(', ')[2]}.\n"
                "Keep each group in one split, or ignore groups: --set data.group_column=none"
            )


def check_classes(rows: Sequence[TableRow], names: Sequence[str], table: TextTable) -> None:
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
                guess = _likely_spelling(label, names)
                hint = did_you_mean(guess)
                raise InputError(f"{row.where}: no training image has the label {label!r}.{hint}")


def rare_labels(rows: Sequence[TableRow], names: Sequence[str]) -> list[Note]:
    """Name the labels that occur once, which may be misspellings of one of `names`."""
    by_label: dict[str, list[TableRow]] = {}
    for row in rows:
        for label in row.labels:
            by_label.setdefault(label, []).append(row)
    once = [(label, found[0]) for label, found in by_label.items() if len(found) == 1]
    others = [name for name in names if len(by_label[name]) > 1]
    texts = []
    for label, row in once[:_NUM_SHOWN]:
        guess = _likely_spelling(label, others)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        texts.append(f"{label!r} in {row.where.rpartition(', ')[2]}{hint}")
    more = f" and {len(once) - _NUM_SHOWN:,} more" if len(once) > _NUM_SHOWN else ""
    return [("Seen once", f"{', '.join(texts)}{more}")] if once else []


def _likely_spelling(label: str, names: Sequence[str]) -> str:
    """Return the name that a label may stand for; none for numbers, which are all alike."""
    return "" if label.isdecimal() else nearest(label, names)
