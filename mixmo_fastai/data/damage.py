"""Image files that cannot be decoded: report all of a data set at once, or skip them."""

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mixmo_fastai.data.decoding import undecodable
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.errors import InputError

NUM_SHOWN = 10
"""Maximum number of files listed in a message; all are listed in a file."""

LeftOut = Mapping[str, str]
"""Skipped files, as paths relative to the folder of the data set, with reasons."""


class DamagedImagesError(InputError):
    """Image files of a data set cannot be decoded.

    Attributes:
        problem: the first line of the message, which names the first files.
        reasons: reasons by path relative to the folder of the data set.
        listed: the file that lists all damaged files, if there are several.
    """

    def __init__(self, problem: str, advice: str, reasons: LeftOut, listed: Path | None) -> None:
        where = f" All, with reasons: {listed}" if listed else ""
        super().__init__(f"{problem}\n{advice}{where}")
        self.problem, self.reasons, self.listed = problem, reasons, listed

    def with_advice(self, advice: str) -> "DamagedImagesError":
        """Return the error with other advice."""
        return DamagedImagesError(self.problem, advice, self.reasons, self.listed)


def read_intact(
    read: Callable[[Collection[str]], DataSource],
    *,
    skip: bool = False,
    left_out: LeftOut | None = None,
) -> DataSource:
    """Read a data set with or without its damaged images.

    Args:
        read: function that reads the data set without the given files.
        skip: whether to skip damaged images; otherwise they raise an error.
        left_out: files skipped by an earlier run, of which exactly these are skipped again; None to
            search for damaged images.

    Raises:
        DamagedImagesError: there are damaged images that are not skipped.
        InputError: a class would have no training images.
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
        raise error.with_advice(
            "The run was trained with these images: restore intact files."
        ) from None
    labels, num_classes = source.train.labels, len(source.classes)
    counts = labels.sum(dim=0) if labels.ndim == 2 else labels.bincount(minlength=num_classes)
    if empty := [name for name, count in zip(source.classes, counts, strict=True) if not count]:
        raise InputError(
            f"No training image of the class {empty[0]!r} can be decoded.\n"
            "Put intact images into its folder, or remove the class."
        )
    note = [("Left out", _describe(left_out))] if left_out else []
    return replace(source, left_out=dict(left_out), notes=(*source.notes, *note))


def find_damaged(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Decode every file once, in threads; return the reason for each that cannot be decoded."""
    reasons = undecodable([root / file for file in files])
    return {file: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}


def damaged_images(
    root: Path, reasons: LeftOut, total: int, list_folder: Path | None = None
) -> DamagedImagesError:
    """Build the error that lists all damaged images of a data set.

    Args:
        root: the folder to which the files are relative.
        reasons: the reason for each file.
        total: number of images of the data set.
        list_folder: folder of the list of damaged images; the system's temporary folder if it is
            None or cannot be written.
    """
    is_plural = len(reasons) > 1
    reason = "" if is_plural else f" ({next(iter(reasons.values()))})"
    them = "them" if is_plural else "it"
    smaller = (
        " with smaller images" if any("megapixels" in text for text in reasons.values()) else ""
    )
    return DamagedImagesError(
        f"{len(reasons)} of {total:,} images below {root} cannot be decoded: "
        f"{_examples(reasons)}{reason}.",
        f"Replace {them}{smaller} or remove {them}, or skip {them} with --skip-damaged.",
        reasons,
        _write_list(root, reasons, list_folder) if is_plural else None,
    )


def _describe(left_out: LeftOut) -> str:
    """Describe skipped images: their number and examples; for a single one, the reason."""
    if len(left_out) == 1:
        ((name, reason),) = left_out.items()
        return f"1 unreadable image: {name} ({reason})"
    return f"{len(left_out):,} unreadable images: {_examples(left_out, 3)}"


def _examples(files: LeftOut, limit: int = NUM_SHOWN) -> str:
    more = f" and {len(files) - limit:,} more" if len(files) > limit else ""
    return ", ".join([*files][:limit]) + more


def _write_list(root: Path, reasons: LeftOut, list_folder: Path | None) -> Path | None:
    """Write one line per file: path, tab, reason."""
    text = "".join(f"{root / file}\t{reason}\n" for file, reason in reasons.items())
    content = text.encode(errors="surrogateescape")
    if list_folder is not None:
        with suppress(OSError):
            list_folder.mkdir(parents=True, exist_ok=True)
            path = list_folder / "damaged.txt"
            path.write_bytes(content)
            return path
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="mixmo-damaged-", suffix=".txt")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        return Path(name)
    return None
