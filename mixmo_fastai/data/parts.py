"""Which images of a folder train, validate and test, as a run keeps it in split.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmo_fastai.errors import InputError


@dataclass(frozen=True)
class DrawnTest:
    """A test set that was drawn from a folder without one.

    Attributes:
        test_split: fraction of each class that was drawn.
        train, test: the files of both parts, relative to the image folder.
    """

    test_split: float
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class DataParts:
    """Where the parts of an image folder come from.

    Attributes:
        train: folder of the training images, relative to the image folder, "." for itself.
        valid: folder of the validation images; None where they are drawn from the training images.
        test: folder of the labelled test images; None where there is none.
        drawn: the test set that was drawn from `train` instead; None where none was.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    drawn: DrawnTest | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: Path) -> "DataParts":
        """Read what `dataclasses.asdict` gave, from JSON.

        Args:
            values: as read.
            where: the file, for messages.

        Raises:
            InputError: it is something else.
        """
        try:
            drawn = values["drawn"]
            if drawn is not None:
                files = (tuple(map(str, drawn[part])) for part in ("train", "test"))
                drawn = DrawnTest(float(drawn["test_split"]), *files)
            valid, test = (values[part] for part in ("valid", "test"))
            return cls(str(values["train"]), _text(valid), _text(test), drawn)
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{where} is damaged: {type(error).__name__}: {error}.\nPut back the original."
            ) from error


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def parts_before_split_json(folder: Path) -> DataParts:
    """Return the parts as version 0.1.0 took them, which kept no split.json with its runs.

    Its test set was test/, or val/ or valid/ where there was no test/; none validated.
    """
    found = (name for name in ("test", "val", "valid") if (folder / name).is_dir())
    return DataParts("train", test=next(found, None))
