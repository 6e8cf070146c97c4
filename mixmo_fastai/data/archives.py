"""Official archives: find, download, verify by checksum and unpack."""

import hashlib
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.lock import starting

_TIMEOUT = 10.0  # seconds without a response after which a server counts as unreachable


@dataclass(frozen=True)
class Archive:
    """An archive as published by the authors of a data set.

    Attributes:
        dataset: name of the data set, for messages.
        url: address of the archive; its last part is the file name.
        md5: checksum of the archive.
        folder: name of the folder that the archive contains.
        members: required files and folders: checksum by name, or None if only presence is checked.
    """

    dataset: str
    url: str
    md5: str
    folder: str
    members: Mapping[str, str | None]

    @property
    def file_name(self) -> str:
        """Name of the archive file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Unpacked:
    """An unpacked archive in a data folder.

    Attributes:
        archive: description of the archive.
        home: the data folder.
    """

    archive: Archive
    home: Path

    @property
    def folder(self) -> Path:
        """The folder of the archive, or the folder of the same name inside it.

        Some programs unpack x.zip into a new folder x, which results in x/x.
        """
        folder = self.home / self.archive.folder
        inner = folder / folder.name
        members = self.archive.members
        is_nested = inner.is_dir() and not any((folder / name).exists() for name in members)
        return inner if is_nested else folder

    def read(self, name: str) -> bytes:
        """Read a member, and verify its checksum.

        Raises:
            InputError: the member is missing, or differs from its checksum.
        """
        path = self.folder / name
        if not path.is_file():
            raise self._damaged(f"{name} is missing")
        content = path.read_bytes()
        if _md5(content) != self.archive.members[name]:
            raise self._damaged(f"{name} differs from its checksum")
        return content

    def require_members(self) -> None:
        """Check that all members exist; `read` verifies checksums.

        Raises:
            InputError: a member is missing.
        """
        for name in self.archive.members:
            if not (self.folder / name).exists():
                raise self._damaged(f"{name} is missing")

    def damage(self) -> str | None:
        """Verify every member; return the first problem in one line, or None if all are intact."""
        try:
            self.require_members()
            for name, md5 in self.archive.members.items():
                if md5 is not None:
                    self.read(name)
        except InputError as error:
            return str(error).partition("\n")[0]
        return None

    def _damaged(self, problem: str) -> InputError:
        archive, present = self.archive, self._present_names()
        return InputError(
            f"Data set {archive.dataset!r} is damaged: {problem} in {self.folder}, which has "
            f"{present}.\nRename that folder and run again: {archive.file_name} is unpacked again, "
            "and downloaded if necessary."
        )

    def _present_names(self) -> str:
        """List the content of the folder: shows users whether it is the wrong folder."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
        return ", ".join(names[:6]) + ", …" * (len(names) > 6) if names else "nothing"


def fetch(archive: Archive, home: Path, *, download: bool = True) -> Unpacked:
    """Return the unpacked archive in a data folder; unpack it and download it if necessary.

    Raises:
        InputError: the archive is missing and cannot be downloaded, or is damaged. The message says
            which file to put into which folder.
    """
    unpacked = Unpacked(archive, home)
    if not unpacked.folder.is_dir():
        if not (home / archive.file_name).is_file():
            _download(unpacked, download)
        _unpack(unpacked)
    unpacked.require_members()
    return unpacked


def archive_damage(archive: Archive, home: Path) -> str | None:
    """Verify the checksum of an archive file; return the problem in one line, or None."""
    if file_md5(home / archive.file_name) == archive.md5:
        return None
    return f"{home / archive.file_name} differs from its checksum."


def file_md5(path: Path) -> str:
    """Compute the MD5 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        # Without usedforsecurity=False, hardened builds of Python refuse MD5.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(unpacked: Unpacked, is_allowed: bool) -> None:
    archive, home = unpacked.archive, unpacked.home
    if not is_allowed:
        raise _absent(archive, home, "and downloading is disabled")
    target = home / archive.file_name
    with ExitStack() as stack:
        try:
            stack.enter_context(starting(target))  # another process may download it
        except InputError as error:
            reason = str(error).removesuffix(".")
            raise _absent(archive, home, f"and downloading it failed ({reason})") from error
        if not target.is_file():
            _download_to(target, archive)


def _download_to(target: Path, archive: Archive) -> None:
    from torchvision.datasets.utils import download_url

    home, partial = target.parent, target.with_name(f"{target.name}.part")
    try:
        with _socket_timeout(_TIMEOUT):
            download_url(archive.url, home, filename=partial.name, md5=archive.md5)
        partial.replace(target)
    except (OSError, HTTPException, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "reason", error)  # a URLError wraps the actual error
        raise _absent(archive, home, f"and downloading it failed ({reason})") from error


def _absent(archive: Archive, home: Path, reason: str) -> InputError:
    return InputError(
        f"Data set {archive.dataset!r} is not in {home}, {reason}.\n"
        f"Put the file {archive.file_name} into that folder, from\n{archive.url}"
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack(unpacked: Unpacked) -> None:
    archive, home = unpacked.archive, unpacked.home
    if problem := archive_damage(archive, home):
        raise InputError(
            f"Data set {archive.dataset!r}: {problem}\n"
            "Rename the file and run again to download the official one."
        )
    try:
        # Renamed when complete, so that an interrupted run leaves no folder that looks intact.
        with tempfile.TemporaryDirectory(prefix=f".{archive.folder}-", dir=home) as staging:
            extract(home / archive.file_name, Path(staging))
            (Path(staging) / archive.folder).rename(unpacked.folder)
    except OSError as error:
        if unpacked.folder.is_dir():  # another process, such as another rank, has unpacked it
            return
        raise InputError(
            f"Cannot unpack {home / archive.file_name}: {error}.\n"
            f"Free disk space or allow writing in {home}, or choose another data folder."
        ) from error


def extract(file: Path, folder: Path) -> None:
    """Unpack a .zip or .tar archive into a folder, without ever writing outside it.

    Raises:
        InputError: a member is a link or a device, or its path leaves the folder.
    """
    for name, content in _contents(file):
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise InputError(f"Archive {file} is unsafe: the path {name!r} leaves the folder.")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as target_file:
            shutil.copyfileobj(content, target_file)


def _contents(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Iterate over the names and contents of the files in an archive."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    with archive.open(name) as content:
                        yield name, content
        return
    with tarfile.open(file) as archive:
        for member in archive:
            if not (member.isfile() or member.isdir()):
                raise InputError(
                    f"Archive {file} is unsafe: {member.name!r} is not a regular file."
                )
            if file_content := archive.extractfile(member):  # None for a folder
                yield member.name, file_content
