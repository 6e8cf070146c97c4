"""Checkpoints on disk; incomplete or damaged ones are skipped.

    checkpoint/save-000007/   manifest.json and the files it lists, with sizes and checksums
    checkpoint/save-000008/   the newest
    checkpoint/.unfinished/   a checkpoint that is being written
    checkpoint/damaged-…/     a damaged checkpoint; removed after the next two saves

A checkpoint is written under a temporary name, flushed, read back, compared with its manifest and
renamed; only then are older ones removed. A process may therefore end at any point.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmo_fastai.errors import InputError
from mixmo_fastai.files import (
    flush_folder,
    make_folder,
    remove_folder,
    rename_durably,
    write_durably,
)

FORMAT = 2
"""Format version; increase it when the meaning of a checkpoint's files changes."""
KEPT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"save-(\d{6,})")


class DamagedError(ValueError):
    """A checkpoint differs from what was written; the message explains how."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        path: folder of the checkpoint.
        files: names of its files, without the manifest.
        skipped: newer, damaged checkpoints by name, each with the problem.
    """

    path: Path
    files: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run, oldest to newest.

    Args:
        folder: folder of all checkpoints; created by the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, files: Iterable[tuple[str, bytes]]) -> Path:
        """Write a checkpoint and remove all but the newest `KEPT`.

        Args:
            files: names and contents, consumed one at a time.

        Returns:
            the folder of the checkpoint.

        Raises:
            OSError: writing failed; existing checkpoints are unchanged.
        """
        make_folder(self.folder)
        unfinished = self.folder / ".unfinished"
        remove_folder(unfinished)
        make_folder(unfinished)
        try:
            listed = dict(_written(unfinished, files))
            write_durably(unfinished / MANIFEST, _manifest(listed))
            flush_folder(unfinished)
            check(unfinished)
        except BaseException:
            remove_folder(unfinished)  # frees the space if the disk is full
            raise
        numbers = self._numbers()
        path = self._path(max(numbers, default=0) + 1)
        rename_durably(unfinished, path)
        self._prune()
        return path

    def newest(self) -> Saved | None:
        """Return the newest intact checkpoint, or None if none was saved.

        Raises:
            InputError: all checkpoints are damaged, or one has an unsupported format.
        """
        skipped: dict[str, str] = {}
        for number in reversed(self._numbers()):
            path = self._path(number)
            try:
                return Saved(path, check(path), skipped)
            except DamagedError as error:
                skipped[path.name] = str(error)
        if not skipped and (strange := self._strange()):
            raise InputError(
                f"There is no checkpoint in {self.folder}, but {strange}, which this version of "
                "mixmo knows nothing of.\nContinue with the version that wrote it, or start a new "
                "run."
            )
        if skipped:
            name, problem = next(iter(skipped.items()))
            raise InputError(
                f"No checkpoint in {self.folder} is intact; the newest, {name}: {problem}.\n"
                "Put it back from a copy, or start a new run."
            )
        return None

    def set_aside(self, names: Iterable[str]) -> None:
        """Rename damaged checkpoints, so that they are no longer read or counted."""
        for name in names:
            aside = self.folder / f"damaged-{name}"
            remove_folder(aside)
            rename_durably(self.folder / name, aside)

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def _strange(self) -> str | None:
        """Return the name of an unknown file or folder, if any."""
        names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        known = (".unfinished", "damaged-")
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


def check(path: Path) -> tuple[str, ...]:
    """Read a whole checkpoint and compare it with its manifest.

    Returns:
        the names of its files.

    Raises:
        DamagedError: the checkpoint differs from what was written.
        InputError: its format is not supported by this version.
    """
    try:
        return tuple(_checked(path))
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from error


def _checked(path: Path) -> dict[str, Any]:
    listed = _read_manifest(path)
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    if present != listed.keys():
        odd = sorted(present ^ listed.keys())[0]
        raise DamagedError(f"{odd} is {'not in its manifest' if odd in present else 'missing'}")
    for name, facts in listed.items():
        size = (path / name).stat().st_size
        if size != facts["size"]:
            raise DamagedError(f"{name} has {size} bytes in place of {facts['size']}")
        if _checksum_of_file(path / name) != facts["sha256"]:
            raise DamagedError(f"{name} has another checksum than when it was written")
    return listed


def _written(folder: Path, files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Any]]:
    for name, content in files:
        write_durably(folder / name, content)
        yield name, {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(listed: dict[str, Any]) -> str:
    """Format the list of files with a checksum of the list itself."""
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
        raise DamagedError(f"{MANIFEST} has another checksum than when it was written")
    if content.get("format") != FORMAT:
        raise InputError(
            f"The checkpoint {path} has format {content.get('format')!r}; this version of mixmo "
            f"reads format {FORMAT}.\nContinue it with the version that wrote it."
        )
    return _checked_list(content.get("files"))


def _checked_list(listed: Any) -> dict[str, Any]:
    """Check the entries of a manifest; its checksum does not prove who wrote it."""
    if not isinstance(listed, dict):
        raise DamagedError(f"{MANIFEST} lists no files")
    for name, facts in listed.items():
        plain = Path(name).name == name and name not in ("", ".", "..")
        if not plain or not isinstance(facts, dict) or facts.keys() != {"size", "sha256"}:
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is no file of a checkpoint")
    return listed


def _checksum_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
