"""The splits of an image folder, as stored in the split.json of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmo_fastai.errors import InputError


@dataclass(frozen=True)
class DrawnTest:
    """A test set drawn from a folder that has none.

    Attributes:
        test_split: fraction of each class that was drawn.
        train, test: files of both splits, relative to the image folder.
    """

    test_split: float
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class DataParts:
    """Origin of the splits of an image folder.

    Attributes:
        train: folder of the training images, relative to the image folder; "." for itself.
        valid: folder of the validation images; None if they are drawn from the training images.
        test: folder of the labelled test images; None if there is none.
        drawn: test set drawn from `train`; None if none was drawn.
        columns: for a table of labels, its columns, see `table_columns.TableColumns`; `valid` and
            `test` then are the names of its splits.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    drawn: DrawnTest | None = None
    columns: Mapping[str, str] | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: Path) -> "DataParts":
        """Build from the output of `dataclasses.asdict`, as read from JSON.

        Args:
            values: the content of the file.
            where: the file, for messages.

        Raises:
            InputError: a value is missing or has the wrong type.
        """
        try:
            drawn = values["drawn"]
            if drawn is not None:
                files = (tuple(map(str, drawn[part])) for part in ("train", "test"))
                drawn = DrawnTest(float(drawn["test_split"]), *files)
            valid, test = (values[part] for part in ("valid", "test"))
            columns = values.get("columns")
            if columns is not None:
                names = ("path", "label", "split", "group", "folder")
                columns = {
                    **{name: str(columns[name]) for name in names},
                    "delimiter": str(columns.get("delimiter", "none")),  # not in version 0.1.0
                    "fold": str(columns.get("fold", "")),  # not in version 0.1.0
                }
            return cls(str(values["train"]), _text(valid), _text(test), drawn, columns)
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{where} is damaged: {type(error).__name__}: {error}.\nRestore the original file."
            ) from error


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def parts_before_split_json(folder: Path) -> DataParts:
    """Return the splits of a run of version 0.1.0, which wrote no split.json.

    That version tested on test/, or else on val/ or valid/, and had no validation folder.
    """
    found = (name for name in ("test", "val", "valid") if (folder / name).is_dir())
    return DataParts("train", test=next(found, None))
