"""Paths for output: checked before any work is done, and never overwritten."""

import itertools
import os
from pathlib import Path

from mixmo_fastai.errors import InputError


def free_file(path: Path | None, stem: str, suffix: str, flag: str = "--out") -> Path:
    """Return a path that does not exist yet: `path`, or the first free name with this stem.

    Raises:
        InputError: `path` exists, has another suffix, or its folder does not exist.
    """
    if path is None:
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        paths = (Path(f"{name}{suffix}") for name in names)
        return _writable_file(next(path for path in paths if not path.exists()))
    path = expand_user(path)
    if os.path.lexists(path):
        raise InputError(f"{str(path)!r} exists and was not changed. Choose another {flag}.")
    if path.suffix.lower() != suffix:
        raise InputError(f"{flag} {str(path)!r} must end in {suffix}.")
    if not path.parent.is_dir():
        raise InputError(
            f"There is no folder {str(path.parent)!r} for {flag} {path.name}.\nCreate it first."
        )
    return _writable_file(path, flag)


def _writable_file(path: Path, flag: str = "--out") -> Path:
    """Check that a file can be created, by creating and deleting it."""
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        raise InputError(
            f"Cannot write {str(path)!r}: {error.strerror}.\nChoose another file with {flag} FILE."
        ) from error
    return path


def expand_user(path: Path | str) -> Path:
    """Expand ~ in a path.

    Raises:
        InputError: a part of the path is too long for the name of a file.
    """
    expanded = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user
    if longest := next((part for part in expanded.parts if len(os.fsencode(part)) > 255), None):
        raise InputError(
            f"The name {longest[:40]!r}… is too long for a file. Choose a shorter name."
        )
    return expanded


def check_writable(path: Path) -> None:
    """Check that a folder exists or can be created, from its nearest existing parent."""
    existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    if existing.is_dir() and os.access(existing, os.W_OK):
        return
    problem = "cannot be written to" if existing.is_dir() else "is not a folder"
    raise InputError(
        f"Cannot create the run folder {str(path)!r}: {str(existing)!r} {problem}.\n"
        "Choose another folder with --out DIR."
    )
