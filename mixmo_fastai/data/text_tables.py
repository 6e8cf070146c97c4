"""Tables as text: CSV and TSV files, and parquet files with pyarrow.

Lines are counted from 1, the header; the rows of a parquet file from 1.
"""

import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from mixmo_fastai.errors import InputError

PARQUET = ".parquet"
_DELIMITERS = ("|", ";", ",")
"""What may join the texts of a list."""


@dataclass(frozen=True, eq=False)
class TextTable:
    """A table.

    Attributes:
        path: its file.
        header: names of the columns, in Unicode normal form NFC; no name occurs twice.
        rows: position and fields of each row that is not blank.
        unit: what a position counts: "line" or "row".
        lists: the columns whose fields are lists, each with the delimiter that joins its lists.
    """

    path: Path
    header: tuple[str, ...]
    rows: Sequence[tuple[int, Sequence[str]]]
    unit: str = "line"
    lists: Mapping[str, str] = field(default_factory=dict)

    def find(self, names: Collection[str], excluded: Collection[str] = ()) -> int | None:
        """Return the position of the first column with one of these names, ignoring case.

        Args:
            names: names in lower case; earlier ones have priority.
            excluded: columns that are not considered.
        """
        lower = [None if name in excluded else name.lower() for name in self.header]
        return next((lower.index(name) for name in names if name in lower), None)

    def where(self, position: int) -> str:
        """Return the position of a row, for messages: "labels.csv, line 3"."""
        return f"{self.path}, {self.unit} {position}"


def filled(text: str, column: str, where: str, advice: str = "") -> str:
    """Return a field without spaces around it.

    Args:
        text: the field.
        column: what it holds, for the message.
        where: its position, for the message.
        advice: a second line of the message.

    Raises:
        InputError: it is empty.
    """
    if not (stripped := text.strip()):
        more = f"\n{advice}" if advice else ""
        raise InputError(f"{where}: the {column} is empty.{more}")
    return stripped


def read_text_table(path: Path, advice: str, *, holds_images: str = "") -> TextTable:
    """Read a table.

    Args:
        path: a CSV or TSV file in UTF-8, whose fields are separated by commas, semicolons or tabs;
            or a parquet file.
        advice: the columns that it should have, for messages.
        holds_images: what to do with a parquet file of images; by default, to pass it as hf:FILE.

    Raises:
        InputError: the file cannot be read, is damaged, has no rows, or has a column twice.
    """
    is_parquet, lists = path.suffix.lower() == PARQUET, dict[str, str]()
    if is_parquet:
        holds_images = holds_images or f"If it holds images, pass hf:{path} instead."
        rows, lists = _read_parquet(path, holds_images)
    else:
        rows = list(_split_rows(path, _read_text(path)))
    if len(rows) < 2:
        raise InputError(f"{path} has no rows.\n{advice}")
    (_, first), *rest = rows
    header = tuple(map(_column_name, first))
    start = f"{path}" if is_parquet else f"{path}, line 1"
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{start}: the column {name!r} occurs {header.count(name)} times.")
    for line, fields in rest:
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(fields)} fields; the header has {len(header)}."
            )
    return TextTable(path, header, rest, "row" if is_parquet else "line", lists)


def _column_name(text: str) -> str:
    return normalize("NFC", text.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8: {error.reason}.\nSave it as UTF-8."
        ) from error


def _split_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Split a table into fields; yield each row that is not blank with its line number."""
    first_line = text.partition("\n")[0]
    is_tsv = path.suffix.lower() == ".tsv"
    delimiter = "\t" if is_tsv else max(",;\t", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1  # line in which the row starts
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                yield reader.line_num, fields
            start = reader.line_num + 1
    except csv.Error as error:
        line, reason = reader.line_num, str(error)
        if reason == "unexpected end of data":
            line, reason = start, "a quote opens here and is not closed"
        elif line > start:
            reason += f"; a quote opens in line {start}"
        raise InputError(f"{path}, line {line}: {reason}.") from error


def _read_parquet(
    path: Path, holds_images: str
) -> tuple[list[tuple[int, list[str]]], dict[str, str]]:
    """Return the header and the rows of a parquet file, and its columns of lists.

    Missing values are empty.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"Reading {path} needs pyarrow.\nInstall it: pip install pyarrow. Or save the table as "
            "CSV."
        ) from error
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read as parquet: {reason}") from error
    columns, lists = [], {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = column.to_pylist()
        if any(isinstance(value, list) for value in values):
            values, lists[_column_name(name)] = _joined(values, name, path, holds_images)
        columns.append([_text(value, name, path, holds_images) for value in values])
    rows = [list(fields) for fields in zip(*columns, strict=True)]
    return [(0, list(table.column_names)), *enumerate(rows, start=1)], lists


def _joined(
    values: Sequence[list[object] | None], column: str, path: Path, holds_images: str
) -> tuple[list[str], str]:
    """Join each list of a column to a text; return the texts and the delimiter."""
    lists = [[_text(value, column, path, holds_images) for value in each or ()] for each in values]
    used = {text for texts in lists for text in texts}
    free = (mark for mark in _DELIMITERS if not any(mark in text for text in used))
    delimiter = next(free, None)
    if delimiter is None:
        raise InputError(
            f"{path}: the lists of {column!r} hold text with each of {' '.join(_DELIMITERS)}.\n"
            "Remove one of these characters from all labels."
        )
    return [delimiter.join(texts) for texts in lists], delimiter


def _text(value: object, column: str, path: Path, holds_images: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes | dict | list):
        raise InputError(f"{path}: the column {column!r} does not hold text.\n{holds_images}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # integer columns with missing values are floats
    is_missing = isinstance(value, float) and math.isnan(value)
    return "" if is_missing else str(value)
