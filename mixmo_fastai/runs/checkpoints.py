"""Checkpoints on disk: an incomplete or damaged checkpoint is never loaded.

    checkpoint/save-000007/   manifest.json and the files it lists, with sizes and checksums
    checkpoint/save-000008/   the newest
    checkpoint/.unfinished/   a checkpoint that is being written
    checkpoint/damaged-…/     a damaged checkpoint; removed after the next two saves

A checkpoint is written under a temporary name, flushed to disk, verified against its manifest and
then renamed; only then are older checkpoints removed. The process may be killed at any point.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.files import (
    flush_folder,
    make_folder,
    remove_folder,
    rename_durably,
    write_durably,
)

FORMAT = 2
"""Format version; increment it when the meaning of a checkpoint's files changes."""
KEPT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"save-(\d{6,})")


class DamagedError(ValueError):
    """A checkpoint differs from what was written; the message says how."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        path: folder of the checkpoint.
        files: names of its files, without the manifest.
        skipped: the problem of each newer, damaged checkpoint, by name.
    """

    path: Path
    files: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: folder of all checkpoints; created by the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, files: Iterable[tuple[str, bytes]]) -> Path:
        """Write a checkpoint, and remove all but the newest `KEPT` checkpoints.

        Args:
            files: names and contents; consumed one at a time.

        Returns:
            the folder of the checkpoint.

        Raises:
            OSError: the checkpoint cannot be written; existing checkpoints are kept.
        """
        make_folder(self.folder)
        unfinished = self.folder / ".unfinished"
        remove_folder(unfinished)
        make_folder(unfinished)
        try:
            file_facts = dict(_write_files(unfinished, files))
            write_durably(unfinished / MANIFEST, _manifest(file_facts))
            flush_folder(unfinished)
            verify(unfinished)
        except BaseException:
            remove_folder(unfinished)  # frees the space if the disk is full
            raise
        numbers = self._numbers()
        path = self._path(max(numbers, default=0) + 1)
        rename_durably(unfinished, path)
        self._prune()
        return path

    def newest(self) -> Saved | None:
        """Find the newest intact checkpoint; return None if none was ever saved.

        Raises:
            InputError: all checkpoints are damaged, or the folder holds files or checkpoints of a
                format that this version cannot read.
        """
        skipped: dict[str, str] = {}
        for number in reversed(self._numbers()):
            path = self._path(number)
            try:
                return Saved(path, verify(path), skipped)
            except DamagedError as error:
                skipped[path.name] = str(error)
        if not skipped and (unknown := self._unknown_entry()):
            raise InputError(
                f"{self.folder} holds no checkpoint, but {unknown}, which this version of mixmo "
                "cannot read.\nContinue with the version that wrote it, or start a new run."
            )
        if skipped:
            name, problem = next(iter(skipped.items()))
            raise InputError(
                f"No checkpoint in {self.folder} is intact; the newest, {name}: {problem}.\n"
                "Restore it from a backup, or start a new run."
            )
        return None

    def set_aside(self, names: Iterable[str]) -> None:
        """Rename damaged checkpoints, so that they are no longer read or counted."""
        for name in names:
            target = self.folder / f"damaged-{name}"
            remove_folder(target)
            rename_durably(self.folder / name, target)

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def _unknown_entry(self) -> str | None:
        """Return the name of a file or folder that `save` does not create, if there is one."""
        names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        known = (".", "damaged-")  # hidden ones are unfinished, or of a file manager
        return next((name for name in names if not name.startswith(known)), None)

    def _path(self, number: int) -> Path:
        return self.folder / f"save-{number:06d}"

    def _prune(self) -> None:
        numbers = self._numbers()
        for number in numbers[:-KEPT]:
            remove_folder(self._path(number))
        if len(numbers) >= KEPT:
            for path in sorted(self.folder.glob("damaged-*")):
                remove_folder(path)


def verify(path: Path) -> tuple[str, ...]:
    """Read a complete checkpoint, and compare it with its manifest.

    Returns:
        the names of its files.

    Raises:
        DamagedError: the checkpoint differs from what was written.
        InputError: the checkpoint has the format of another version.
    """
    try:
        return tuple(_verified_files(path))
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from error


def _verified_files(path: Path) -> dict[str, Any]:
    listed = _read_manifest(path)
    # File managers leave hidden files, such as .DS_Store.
    names = (file.name for file in path.iterdir() if not file.name.startswith("."))
    present = {*names} - {MANIFEST}
    if present != listed.keys():
        name = sorted(present ^ listed.keys())[0]
        raise DamagedError(f"{name} is {'not in its manifest' if name in present else 'missing'}")
    for name, facts in listed.items():
        size = (path / name).stat().st_size
        if size != facts["size"]:
            raise DamagedError(f"{name} has {size} bytes instead of {facts['size']}")
        if _checksum_of_file(path / name) != facts["sha256"]:
            raise DamagedError(f"the checksum of {name} does not match its manifest")
    return listed


def _write_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Any]]:
    for name, content in files:
        write_durably(folder / name, content)
        yield name, {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(listed: dict[str, Any]) -> str:
    """Format the manifest, including a checksum of the manifest itself."""
    return _signed({"format": FORMAT, "files": listed})


def _signed(content: dict[str, Any]) -> str:
    return json.dumps({**content, "sha256": _signature(content)}, indent=1) + "\n"


def _signature(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        signature = content.pop("sha256")
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is damaged") from error
    if signature != _signature(content):
        raise DamagedError(f"the checksum of {MANIFEST} does not match")
    if content.get("format") != FORMAT:
        raise InputError(
            f"The checkpoint {path} has format {content.get('format')!r}; this version of mixmo "
            f"reads format {FORMAT}.\nContinue it with the version that wrote it."
        )
    return _checked_list(content.get("files"))


def _checked_list(listed: Any) -> dict[str, Any]:
    """Check the file list of a manifest, which may be forged: anyone can compute the checksum."""
    if not isinstance(listed, dict):
        raise DamagedError(f"{MANIFEST} lists no files")
    for name, facts in listed.items():
        is_plain = Path(name).name == name and name not in ("", ".", "..")
        if not is_plain or not isinstance(facts, dict) or facts.keys() != {"size", "sha256"}:
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is not a file of a checkpoint")
    return listed


def _checksum_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
