"""Labels of a table in one column per class, which holds 1 for the images of the class."""

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from unicodedata import normalize

from mixmo_fastai.data.text_tables import TextTable
from mixmo_fastai.errors import InputError

_FLAGS = {
    **dict.fromkeys(("1", "1.0", "true"), True),
    **dict.fromkeys(("0", "0.0", "false"), False),
}
"""Whether an image has a label, by the field in lower case."""


def split_names(names: str, header: Collection[str]) -> tuple[str, ...]:
    """Split names of columns; the name of one column that exists stays whole.

    Args:
        names: separated by commas; a name with a comma in quotes, as in CSV.
        header: the columns that exist.

    Example:
        >>> split_names('cat, "eel, grey"', ["path", "cat", "eel, grey"])
        ('cat', 'eel, grey')
        >>> split_names("cat,dog", ["path", "cat,dog"])
        ('cat,dog',)
    """
    if names in header or "," not in names:
        return (names,)
    fields = next(csv.reader([names], skipinitialspace=True))
    stripped = (normalize("NFC", field.strip()) for field in fields)
    return tuple(dict.fromkeys(field for field in stripped if field))


def join_names(names: Sequence[str]) -> str:
    """Join names of columns so that `split_names` returns them.

    Example:
        >>> join_names(["cat", "eel, grey"])
        'cat,"eel, grey"'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(names)
    return text.getvalue()


def are_flags(fields: Iterable[str]) -> bool:
    """Check whether all fields are 0 and 1, or true and false."""
    return {field.strip().lower() for field in fields} <= _FLAGS.keys()


def find_flag_columns(table: TextTable, names: Sequence[str]) -> list[str]:
    """Return the columns that hold only 0 and 1, or true and false, among those named."""
    return [
        name
        for name, index in ((name, table.header.index(name)) for name in names)
        if are_flags(fields[index] for _, fields in table.rows)
    ]


def find_nearly_flags(table: TextTable, names: Sequence[str]) -> tuple[str, int, str] | None:
    """Find a column of 0 and 1 with few other fields, such as misspellings.

    Args:
        table: the table.
        names: columns to look at.

    Returns:
        the first column in which at most a tenth of the fields are others, with position and
        value of the first; None if there is no such column.
    """
    for name in names:
        index = table.header.index(name)
        others = [
            (position, fields[index].strip())
            for position, fields in table.rows
            if fields[index].strip().lower() not in _FLAGS
        ]
        if others and len(others) <= len(table.rows) // 10:
            return name, *others[0]
    return None


def flagged_labels(
    fields: Sequence[str], positions: Mapping[str, int], where: str
) -> tuple[str, ...]:
    """Return the names of the columns that hold 1 in a row.

    Args:
        fields: the fields of the row.
        positions: the columns by name.
        where: position of the row, for messages.

    Raises:
        InputError: a column holds something else than 0 and 1.

    Example:
        >>> flagged_labels(["a.png", "1", "false"], {"cat": 1, "dog": 2}, "line 2")
        ('cat',)
    """
    found = []
    for name, index in positions.items():
        flag = _FLAGS.get(fields[index].strip().lower())
        if flag is None:
            value = fields[index].strip()
            raise InputError(
                f"{where}: the column {name!r} {f'holds {value!r}' if value else 'is empty'}.\n"
                "With one column per label, each field is 0 or 1, or true or false."
            )
        if flag:
            found.append(name)
    return tuple(found)
