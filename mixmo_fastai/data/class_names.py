"""Class names of tables: their order, and checks that they are classes."""

import re
from collections import defaultdict
from collections.abc import Collection

from mixmo_fastai.data.class_files import Note, examples
from mixmo_fastai.errors import InputError

_MAX_DECIMALS = 20
"""Number of different decimals that may be classes, such as sizes or ratings."""
_NUM_SHOWN = 3
_WHOLE = re.compile(r"(\d+)(?:\.0+)?")


def class_order(labels: Collection[str]) -> list[str]:
    """Sort class names: numbers by value, others alphabetically.

    Example:
        >>> class_order({"10", "9"})
        ['9', '10']
    """
    are_numbers = all(label.isdecimal() for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if are_numbers else None)


def whole_numbers(labels: Collection[str]) -> dict[str, str]:
    """Return labels such as "10.0" without decimals; empty if there are none, or others.

    Tables are written so if a column of whole numbers once had an empty field.

    Example:
        >>> whole_numbers(["0.0", "10.0"])
        {'0.0': '0', '10.0': '10'}
        >>> whole_numbers(["0.0", "0.5"])
        {}
    """
    found = {label: match[1] for label in labels if (match := _WHOLE.fullmatch(label))}
    has_decimals = any(label != whole for label, whole in found.items())
    return found if has_decimals and len(found) == len(labels) else {}


def is_nan(label: str) -> bool:
    """Check whether a label is empty or "nan", as which pandas turns an empty field into text."""
    return label.lower() in ("", "nan", "<na>")


def similar_names(names: Collection[str]) -> list[Note]:
    """Name the classes that differ only in case, or are the same number.

    Example:
        >>> similar_names(["Cat", "cat", "dog"])
        [('Warning', "classes that differ only in case: 'Cat' and 'cat'")]
        >>> similar_names(["10", "9", "0010"])
        [('Warning', "classes that are the same number: '10' and '0010'")]
    """
    notes = []
    for text, key in (
        ("differ only in case", str.casefold),
        ("are the same number", lambda name: name.lstrip("0") if name.isdecimal() else name),
    ):
        by_key = defaultdict(list)
        for name in names:
            by_key[key(name)].append(repr(name))
        found = [" and ".join(spellings) for spellings in by_key.values() if len(spellings) > 1]
        if found:
            notes.append(("Warning", f"classes that {text}: {examples(found, _NUM_SHOWN)}"))
    return notes


def check_no_measurements(labels: Collection[str], num_images: int, where: str) -> None:
    """Check that labels are not decimals, most of which differ.

    Args:
        labels: the different labels, with a decimal point or comma if they are decimals.
        num_images: number of images that have them.
        where: the data, for the message.

    Raises:
        InputError: most are decimals, and there are more than 20, or more than half as many as
            images.

    Example:
        >>> check_no_measurements({"0.5", "1", "1.5"}, 30, "labels.csv")
    """
    if len(labels) <= min(_MAX_DECIMALS, num_images / 2):
        return
    try:
        decimals = [label for label in labels if not float(label.replace(",", ".")).is_integer()]
    except ValueError:
        return
    if 2 * len(decimals) > len(labels):
        raise InputError(
            f"{where}: the labels are {len(labels):,} different decimals, such as "
            f"{min(decimals)}, not classes.\nThe commands train classifiers only; for regression, "
            "use mixmo_learner or to_mixmo in a Learner (see README).\n"
            "Is this the column of the labels? --set data.label_column=NAME"
        )
