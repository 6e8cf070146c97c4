"""Tables of annotators' votes: CSV or TSV, one row per vote or one row per image.

One row per vote has the columns image and label, and optionally annotator. One row per image has
the column image, and one column of counts or probabilities per class. Other names of these columns
are in `COLUMN_NAMES`. Lines are counted from 1, the header.

Shapes: n images with votes, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import numpy as np

from mixmo_fastai.data.image_names import ImageNames
from mixmo_fastai.data.text_tables import TextTable, filled, read_text_table
from mixmo_fastai.errors import InputError, did_you_mean, nearest

COLUMN_NAMES = {
    "image": (
        "image",
        "image_path",
        "image_name",
        "path",
        "filename",
        "file_name",
        "file",
        "index",
    ),
    "label": ("label", "class", "category", "vote"),
    "annotator": ("annotator", "annotator_id", "worker", "worker_id", "rater", "user"),
}
"""Names of the columns, ignoring case, by their meaning; the first present one is used."""
LAYOUTS = (
    "Use one row per vote with the columns image and label, or one row per image with the column "
    "image and one column per class."
)


@dataclass(frozen=True, eq=False)
class RawVotes:
    """Counts or probabilities as they are in a file.

    Attributes:
        indices: index of the image of each row; no image occurs twice.
        values: (n, K) float64.
        rows: position of each row in the file, for messages, such as "line 3".
        layout: how the file was read, such as "one row per vote".
    """

    indices: Sequence[int]
    values: np.ndarray
    rows: Sequence[str]
    layout: str


def read_vote_table(path: Path, images: ImageNames, classes: Sequence[str]) -> RawVotes:
    """Read a table of votes.

    Args:
        path: a CSV or TSV file in UTF-8; fields are separated by commas, semicolons or tabs.
        images: the images that can have votes.
        classes: class names by label. Labels may also be class indices if no class name is a
            number.

    Raises:
        InputError: the file cannot be read or has another layout, or a row has an unknown class or
            image, or repeats another row.
    """
    table = read_text_table(path, LAYOUTS)
    names = [normalize("NFC", name) for name in classes]
    label = table.find(COLUMN_NAMES["label"])
    if label is not None and not set(names) <= set(table.header):
        return _read_rows_per_vote(table, images, names, label)
    if set(names).isdisjoint(table.header):
        shown = ", ".join(table.header[:6])
        raise InputError(f"{path} has the columns {shown}, but no label and no class.\n{LAYOUTS}")
    return _read_rows_per_image(table, images, names)


def _read_rows_per_vote(
    table: TextTable, images: ImageNames, classes: Sequence[str], label: int
) -> RawVotes:
    """Count the votes in the column `label` of each image."""
    image, labels = _image_column(table), _ClassLabels(classes)
    found_images: dict[str, int] = {}  # each name is looked up once
    annotator = table.find(COLUMN_NAMES["annotator"])
    counts: dict[int, np.ndarray] = {}
    first_lines: dict[int, str] = {}
    lines_of_annotators: dict[tuple[int, str], int] = {}
    for line, fields in table.rows:
        where = table.where(line)
        if (index := found_images.get(fields[image])) is None:
            index = images.find(filled(fields[image], "image", where), where)
            found_images[fields[image]] = index
        if annotator is not None:
            key = index, filled(fields[annotator], "annotator", where)
            if (earlier := lines_of_annotators.setdefault(key, line)) != line:
                raise InputError(
                    f"{where}: the annotator {key[1]!r} already voted on {fields[image]!r} in line "
                    f"{earlier}.\nKeep one of these rows."
                )
        votes = counts.setdefault(index, np.zeros(len(classes)))
        votes[labels.find(filled(fields[label], "label", where), where)] += 1
        first_lines.setdefault(index, f"line {line}")
    values = np.stack([*counts.values()])
    return RawVotes([*counts], values, [*first_lines.values()], "one row per vote")


def _read_rows_per_image(table: TextTable, images: ImageNames, classes: Sequence[str]) -> RawVotes:
    image = _image_column(table, excluded=classes)
    columns = _class_columns(table, image, classes)
    values = np.empty((len(table.rows), len(classes)))
    lines: dict[int, int] = {}
    for row, (line, fields) in enumerate(table.rows):
        where = table.where(line)
        index = images.find(filled(fields[image], "image", where), where)
        if (earlier := lines.setdefault(index, line)) != line:
            raise InputError(
                f"{where}: the image {fields[image]!r} is already in line {earlier}.\n"
                "Keep one row per image."
            )
        values[row] = [
            _number(fields[column], name, where)
            for column, name in zip(columns, classes, strict=True)
        ]
    return RawVotes([*lines], values, [f"line {n}" for n in lines.values()], "one row per image")


class _ClassLabels:
    """Find a class by its name, or by its index if no class name is a number."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._repeated = {name for name in classes if classes.count(name) > 1}
        self._by_name = {
            name: label for label, name in enumerate(classes) if name not in self._repeated
        }
        self._has_indices = not any(name.isdecimal() for name in classes)

    def find(self, name: str, where: str) -> int:
        """Return the label of a class.

        Raises:
            InputError: no class or several classes have this name.
        """
        name = normalize("NFC", name)
        if (label := self._by_name.get(name)) is not None:
            return label
        if name in self._repeated:
            raise InputError(f"{where}: several classes are called {name!r}; use class indices.")
        is_index = self._has_indices and name.isdecimal() and len(name) < 10
        if is_index and int(name) < len(self._classes):
            return int(name)
        raise InputError(f"{where}: {_unknown_class(name, self._classes)}")


def _unknown_class(name: str, classes: Sequence[str]) -> str:
    guess = nearest(name, classes)
    hint = did_you_mean(guess)
    shown = ", ".join(classes[:10]) + ", …" * (len(classes) > 10)
    return f"{name!r} is not a class of this run.{hint}\nClasses: {shown}."


def _image_column(table: TextTable, excluded: Sequence[str] = ()) -> int:
    if (column := table.find(COLUMN_NAMES["image"], excluded)) is None:
        raise InputError(
            f"{table.path} has no column 'image'; rows are not matched by their order.\n{LAYOUTS}"
        )
    return column


def _class_columns(table: TextTable, image: int, classes: Sequence[str]) -> list[int]:
    """Return the position of the column of each class.

    Raises:
        InputError: a class has no column, or a column is not a class.
    """
    others = [name for position, name in enumerate(table.header) if position != image]
    where = table.where(1)
    if unknown := [name for name in others if name not in classes]:
        raise InputError(f"{where}: the column {_unknown_class(unknown[0], classes)}")
    if missing := [name for name in classes if name not in others]:
        shown = ", ".join(missing[:6]) + ", …" * (len(missing) > 6)
        raise InputError(f"{where}: no column for {len(missing)} of the classes: {shown}.")
    if len(others) < len(classes):
        raise InputError(f"{where}: several classes have the same name; use a .npy file.")
    return [table.header.index(name) for name in classes]


def _number(text: str, name: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        shown = repr(text) if text.strip() else "empty; write 0 for no votes"
        raise InputError(f"{where}: the number for {name!r} is {shown}.") from None
