"""Official archives: found, downloaded, checked against their checksums and unpacked."""

import hashlib
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

from mixmo_fastai.errors import InputError

_TIMEOUT = 10.0  # seconds of silence after which a server counts as unreachable


@dataclass(frozen=True)
class Archive:
    """An archive as its authors publish it.

    Attributes:
        dataset: name of the data set, for messages.
        url: where it is published; its last part is the file name.
        md5: checksum of the archive.
        folder: the folder it unpacks to.
        members: what the folder must hold: checksum by file name, None for a file or folder that is
            only looked for.
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
    """An archive's folder below a data folder.

    Attributes:
        archive: its description.
        home: the data folder.
    """

    archive: Archive
    home: Path

    @property
    def folder(self) -> Path:
        """The folder that the archive unpacks to, or the one of its name inside, if all is there.

        Some programs unpack x.zip into a new folder x, where it lies in x/x.
        """
        folder = self.home / self.archive.folder
        inner = folder / folder.name
        members = self.archive.members
        doubled = inner.is_dir() and not any((folder / name).exists() for name in members)
        return inner if doubled else folder

    def read(self, name: str) -> bytes:
        """Read a member, whose checksum is compared before a byte of it is used.

        Raises:
            InputError: the member is missing, or not the official one.
        """
        path = self.folder / name
        if not path.is_file():
            raise self._damaged(f"{name} is missing")
        content = path.read_bytes()
        if _md5(content) != self.archive.members[name]:
            raise self._damaged(f"{name} differs from its checksum")
        return content

    def require_members(self) -> None:
        """Check that nothing is missing; checksums are left to `read`.

        Raises:
            InputError: a member is missing.
        """
        for name in self.archive.members:
            if not (self.folder / name).exists():
                raise self._damaged(f"{name} is missing")

    def damage(self) -> str | None:
        """Check every member with its checksum, and say in a line what is wrong, if anything."""
        try:
            self.require_members()
            for name, md5 in self.archive.members.items():
                if md5 is not None:
                    self.read(name)
        except InputError as error:
            return str(error).partition("\n")[0]
        return None

    def _damaged(self, what: str) -> InputError:
        archive, there = self.archive, self._names_there()
        return InputError(
            f"Data set {archive.dataset!r} is damaged: {what} in {self.folder}, which has {there}."
            f"\nRename that folder and run again: it is then made from {archive.file_name}, which "
            "is downloaded if it is not there."
        )

    def _names_there(self) -> str:
        """List what a reader looks for, to tell a wrong folder from a damaged one."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
        return ", ".join(names[:6]) + ", …" * (len(names) > 6) if names else "nothing"


def fetch(archive: Archive, home: Path, *, download: bool = True) -> Unpacked:
    """Find the unpacked archive in a data folder; else unpack it; else download it first.

    Raises:
        InputError: it is not there and cannot be had, or is damaged. The message says which file
            to put into which folder.
    """
    unpacked = Unpacked(archive, home)
    if not unpacked.folder.is_dir():
        if not (home / archive.file_name).is_file():
            _obtain(archive, home, download)
        _unpack(unpacked)
    unpacked.require_members()
    return unpacked


def archive_damage(archive: Archive, home: Path) -> str | None:
    """Compare the archive file with its checksum, and say in a line what is wrong, if anything."""
    if file_md5(home / archive.file_name) == archive.md5:
        return None
    return f"{home / archive.file_name} differs from its checksum."


def file_md5(path: Path) -> str:
    """Compute the MD5 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        # Said not to be for security, or hardened Pythons refuse the algorithm.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _obtain(archive: Archive, home: Path, download: bool) -> None:
    if not download:
        raise _absent(archive, home, "and downloading is off")
    from torchvision.datasets.utils import download_url

    partial = home / f"{archive.file_name}.part"
    try:
        with _socket_timeout(_TIMEOUT):
            download_url(archive.url, home, filename=partial.name, md5=archive.md5)
        partial.replace(home / archive.file_name)
    except (OSError, HTTPException, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "reason", error)  # a URLError wraps what is worth reading
        raise _absent(archive, home, f"and downloading it failed ({reason})") from error


def _absent(archive: Archive, home: Path, why: str) -> InputError:
    return InputError(
        f"Data set {archive.dataset!r} is not in {home}, {why}.\n"
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
            "Rename it and run again: the official file is downloaded anew."
        )
    try:
        # Renamed when complete: an interrupted run leaves no folder that looks intact.
        with tempfile.TemporaryDirectory(prefix=f".{archive.folder}-", dir=home) as staging:
            extract(home / archive.file_name, Path(staging))
            (Path(staging) / archive.folder).rename(unpacked.folder)
    except OSError as error:
        if unpacked.folder.is_dir():  # another process, such as another rank, was faster
            return
        raise InputError(
            f"Cannot unpack {home / archive.file_name}: {error}.\n"
            f"Make room or allow writing in {home}, or choose another data folder."
        ) from error


def extract(file: Path, folder: Path) -> None:
    """Unpack a .zip or .tar archive into a folder, and never write outside it.

    Raises:
        InputError: a member is a link or a device, or leads out of the folder.
    """
    for name, content in _contents(file):
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise InputError(f"Archive {file} is unsafe: {name!r} leads out of its folder.")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            shutil.copyfileobj(content, copy)


def _contents(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Iterate over the files in an archive: their names and contents."""
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
                raise InputError(f"Archive {file} is unsafe: {member.name!r} is not a file.")
            if file_content := archive.extractfile(member):  # None for a folder
                yield member.name, file_content
