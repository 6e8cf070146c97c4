"""Several labels per image, in one field of a table.

Shapes: N images, K classes.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from unicodedata import normalize

import torch
from torch import Tensor

from mixmo_fastai.data.class_files import Note, examples
from mixmo_fastai.errors import InputError

NONE = "none"
"""The delimiter of a column with one label per image."""
CERTAIN, POSSIBLE = ("|", ";"), (",", " ")
"""Delimiters that are found in any column of labels, and those found only in one whose name is a
plural, if dividing leaves fewer names than there were."""
PLURALS = (
    *("labels", "tags", "classes", "categories", "targets", "findings", "attributes"),
    *("keywords", "species", "diagnoses", "objects"),
)
"""Last words of names of columns with several labels."""
ALL = ""
"""The one class under which files with several labels are listed."""


@dataclass(frozen=True, eq=False)
class MultiLabels:
    """The labels of files that may have several, or none.

    Attributes:
        classes: names of the classes.
        of: names of the labels of each file.

    Example:
        >>> labels = MultiLabels(("cat", "dog"), {"a.png": ("dog",), "b.png": ()})
        >>> labels.targets(["a.png", "b.png"])
        tensor([[0, 1],
                [0, 0]], dtype=torch.uint8)
    """

    classes: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]]

    def targets(self, files: Sequence[str]) -> Tensor:
        """Return 1 for the labels of each file, and 0 for others: (N, K) uint8."""
        positions = {name: index for index, name in enumerate(self.classes)}
        found = [(i, positions[name]) for i, file in enumerate(files) for name in self.of[file]]
        targets = torch.zeros(len(files), len(self.classes), dtype=torch.uint8)
        if found:
            rows, columns = torch.tensor(found).T
            targets[rows, columns] = 1
        return targets


def find_delimiter(column: str, fields: Sequence[str]) -> str:
    """Return the delimiter between the labels of a field; `NONE` if fields hold one label.

    Args:
        column: name of the column.
        fields: its fields.

    Example:
        >>> find_delimiter("tags", ["clear water", "clear", "cloudy water", "cloudy", "clear road"])
        ' '
        >>> find_delimiter("labels", ["golden retriever", "tabby cat"])
        'none'
    """
    for delimiter in CERTAIN:
        if any(delimiter in field for field in fields):
            return delimiter
    words = column.lower().replace("_", " ").replace("-", " ").split()
    if words and words[-1] in PLURALS:
        values = {field.strip() for field in fields}
        for delimiter in POSSIBLE:
            names = {name for field in values for name in split_labels(field, delimiter)}
            if any(delimiter in field for field in values) and len(names) < len(values):
                return delimiter
    return NONE


def possible_delimiter(names: Collection[str]) -> tuple[str, int]:
    """Return what may separate several labels in the names of classes, and their number of parts.

    It is in at least half of the names, and they have at most half as many different parts as
    there are names. Without one, "" and 0 are returned.

    Example:
        >>> possible_delimiter(["a b", "a c", "b c", "a", "b", "c"])
        (' ', 3)
        >>> possible_delimiter(["brown bear", "polar bear", "red fox"])
        ('', 0)
    """
    for delimiter in POSSIBLE:
        parts = {part for name in names for part in split_labels(name, delimiter)}
        if 2 * sum(delimiter in name for name in names) >= len(names) >= 2 * len(parts):
            return delimiter, len(parts)
    return "", 0


def split_labels(field: str, delimiter: str) -> tuple[str, ...]:
    """Split a field into its labels, each once, in normal form NFC.

    Example:
        >>> split_labels(" cat; dog;cat", ";")
        ('cat', 'dog')
    """
    names = (normalize("NFC", name.strip()) for name in field.split(delimiter))
    return tuple(dict.fromkeys(name for name in names if name))


def describe_labels(labels: MultiLabels) -> Note:
    """Describe how many labels images have."""
    counts = [len(names) for names in labels.of.values()]
    mean = sum(counts) / len(counts)
    text = f"several per image: {min(counts)} to {max(counts)}, {mean:.3g} on average"
    without = counts.count(0)
    if without:
        text += f"; {without:,} image{'s' * (without > 1)} without any"
    return ("Labels", text)


def missing_labels(role: str, files: Sequence[str], labels: MultiLabels) -> list[Note]:
    """List the labels that no image of a split has."""
    present = {name for file in files for name in labels.of[file]}
    missing = [name for name in labels.classes if name not in present]
    if not missing or not files:
        return []
    text = f"no {role} image has {len(missing):,} of {len(labels.classes):,} labels: "
    return [("Missing", text + examples(missing))]


def check_names(
    where: str, train: Sequence[str], labels: MultiLabels, classes: Sequence[str] | None
) -> MultiLabels:
    """Return labels with the classes of a run, in its order.

    Args:
        where: the table, for messages.
        train: training images.
        labels: labels of all images.
        classes: classes of the run; None to keep those of `labels`.

    Raises:
        InputError: the training images have other labels.
    """
    present = Counter(name for file in train for name in labels.of[file])
    known = labels.classes if classes is None else tuple(normalize("NFC", n) for n in classes)
    if changed := sorted(present.keys() ^ set(known)):
        state = "is new" if changed[0] in present else "no longer has training images"
        raise InputError(
            f"The labels in {where} are not those of the run: {changed[0]!r} {state}.\n"
            "Undo the change, or start a new run."
        )
    return MultiLabels(known, labels.of)
