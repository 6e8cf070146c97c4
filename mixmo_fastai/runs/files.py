"""Atomic, durable file operations: a file is complete or absent, even after a crash or power loss.

Every file that must survive is written through these operations. The process may end after any of
them.
"""

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

# Errors of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_BINARY = getattr(os, "O_BINARY", 0)  # otherwise Windows would convert line endings
_CHUNK_BYTES = 8 * 2**20


def write_atomically(path: Path, content: str | bytes, *, is_shared: bool = False) -> None:
    """Write a file atomically: a reader sees the old content or the new content, never a mixture.

    Args:
        path: the file.
        content: its new content.
        is_shared: whether other processes, also on other machines, may write the file at the same
            time; the last one replaces the content of the others. A crash then leaves a temporary
            file, which otherwise the next call replaces.

    Raises:
        OSError: the file cannot be written; the old content is kept.
    """
    unique = f".{secrets.token_hex(8)}" if is_shared else ""
    temporary = path.with_name(f".{path.name}{unique}.tmp")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise
    flush_folder(path.parent)


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that does not exist yet; of several processes, exactly one succeeds.

    Raises:
        FileExistsError: the file exists.
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_durably(temporary, content)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644))  # claims the name
            os.replace(temporary, path)
    finally:
        remove_file(temporary)
    flush_folder(path.parent)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file and flush it to disk."""
    data = memoryview(content.encode() if isinstance(content, str) else content)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o644)
    try:
        while data:
            data = data[os.write(handle, data[:_CHUNK_BYTES]) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder if it does not exist, and flush its name to disk."""
    with suppress(FileExistsError):
        os.mkdir(path)
        flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Flush the directory entries of a folder to disk, where the system can."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_durably(path: Path, target: Path) -> None:
    """Rename a file or folder to an unused name, and flush the change to disk."""
    os.rename(path, target)
    flush_folder(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists."""
    if not path.is_dir():
        return
    for file in sorted(path.iterdir()):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            os.unlink(file)
    os.rmdir(path)
