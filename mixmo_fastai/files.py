"""Files that are there whole or not at all, also after a crash or a loss of power.

Whatever must survive is written through these few operations, each of which may be the last that a
process does.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of such file systems
_CHUNK_BYTES = 8 * 2**20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part.

    Raises:
        OSError: it cannot be written; the old content is there still.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_durably(temporary, content)
        os.rename(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise
    flush_folder(path.parent)


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that is not there yet; of several processes, one does.

    Raises:
        FileExistsError: it is there.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, content)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644))  # claimed; now its content
            os.rename(temporary, path)
    finally:
        remove_file(temporary)
    flush_folder(path.parent)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file and wait until the disk has it."""
    data = memoryview(content.encode() if isinstance(content, str) else content)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        while data:
            data = data[os.write(handle, data[:_CHUNK_BYTES]) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder where there is none, and wait until the disk has its name."""
    with suppress(FileExistsError):
        os.mkdir(path)
        flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Wait until the disk has the names of a folder's files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_durably(path: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free, and wait until the disk has it."""
    os.rename(path, target)
    flush_folder(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file where there is one."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder of files where there is one."""
    if not path.is_dir():
        return
    for file in sorted(path.iterdir()):
        os.unlink(file)
    os.rmdir(path)
