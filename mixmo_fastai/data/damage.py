"""Image files that cannot be decoded: all of a data set are named at once, or left out."""

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mixmo_fastai.data.decoding import undecodable
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.errors import InputError

SHOWN = 10
"""Files that a message names; all are in a list beside it."""

LeftOut = Mapping[str, str]
"""Files, by their path below the data set's folder, with the reason for leaving each out."""


class DamagedImagesError(InputError):
    """Image files of a data set cannot be decoded.

    Attributes:
        problem: the first line of the message, which names the first of them.
        reasons: why, by the file's path below the data set's folder.
        listed: the file that lists all of them, if there are several.
    """

    def __init__(self, problem: str, advice: str, reasons: LeftOut, listed: Path | None) -> None:
        where = f" All, with reasons: {listed}" if listed else ""
        super().__init__(f"{problem}\n{advice}{where}")
        self.problem, self.reasons, self.listed = problem, reasons, listed

    def advising(self, advice: str) -> "DamagedImagesError":
        """Return the same error with other advice."""
        return DamagedImagesError(self.problem, advice, self.reasons, self.listed)


def read_intact(
    read: Callable[[Collection[str]], DataSource],
    *,
    skip: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Read a data set with or without its damaged images.

    Args:
        read: reads it without the files that it is given.
        skip: whether damaged images are left out; otherwise they are an error.
        left_out: the files that a run has left out, which are left out again, and no others; None
            to look for damaged images.

    Raises:
        DamagedImagesError: there are damaged images that are not left out.
        InputError: no training image of a class would be left.
    """
    if left_out is None:
        try:
            return read(())
        except DamagedImagesError as error:
            if not skip:
                raise
            left_out = error.reasons
    try:
        source = read(left_out)
    except DamagedImagesError as error:
        raise error.advising("The run was made with them: put back intact files.") from None
    counts = source.train.labels.bincount(minlength=len(source.classes))
    if empty := [name for name, count in zip(source.classes, counts, strict=True) if not count]:
        raise InputError(
            f"No training image of the class {empty[0]!r} can be decoded.\n"
            "Put intact images into its folder, or remove the class."
        )
    note = [("Left out", _counted(left_out))] if left_out else []
    return replace(source, left_out=dict(left_out), notes=(*source.notes, *note))


def find_damaged(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Decode every file once, in threads, and return why some cannot be decoded."""
    reasons = undecodable([root / file for file in files])
    return {file: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}


def damaged_images(
    root: Path, reasons: LeftOut, total: int, place: Path | None = None
) -> DamagedImagesError:
    """Build the error that names all damaged images of a data set.

    Args:
        root: the folder that the files are relative to.
        reasons: why each cannot be decoded.
        total: images of the data set.
        place: the folder for the list of all; the system's folder of temporary files if it is None
            or cannot be written.
    """
    several = len(reasons) > 1
    because = "" if several else f" ({next(iter(reasons.values()))})"
    them = "them" if several else "it"
    smaller = " by smaller images" if any("megapixels" in text for text in reasons.values()) else ""
    return DamagedImagesError(
        f"{len(reasons)} of {total:,} images below {root} cannot be decoded: "
        f"{_named(reasons)}{because}.",
        f"Replace {them}{smaller} or remove {them}, or leave {them} out with --skip-damaged.",
        reasons,
        _write_list(root, reasons, place) if several else None,
    )


def _counted(left_out: LeftOut) -> str:
    """Count and name images that are left out; a single one with the reason."""
    if len(left_out) == 1:
        ((name, reason),) = left_out.items()
        return f"1 unreadable image: {name} ({reason})"
    return f"{len(left_out):,} unreadable images: {_named(left_out, 3)}"


def _named(files: LeftOut, most: int = SHOWN) -> str:
    more = f" and {len(files) - most:,} more" if len(files) > most else ""
    return ", ".join([*files][:most]) + more


def _write_list(root: Path, reasons: LeftOut, place: Path | None) -> Path | None:
    """Write a line per file: its path, a tab, the reason."""
    text = "".join(f"{root / file}\t{reason}\n" for file, reason in reasons.items())
    content = text.encode(errors="surrogateescape")
    if place is not None:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            path = place / "damaged.txt"
            path.write_bytes(content)
            return path
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="mixmo-damaged-", suffix=".txt")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        return Path(name)
    return None
