"""One process at a time in a run folder.

The lock is the kernel's: it ends with its process, however that ends, so that none is ever stale.
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixmo_fastai.errors import InputError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder.

    Child processes, such as those that read images, do not hold the lock with their parent. Where
    the file system knows no locks, nothing is kept from anybody.

    Raises:
        InputError: another process is at it; the message says which.
    """
    path = folder / LOCK
    handle = _opened_and_locked(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held
        os.close(handle)


def _opened_and_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them, systems differ in
            owner = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise InputError(
                f"{path.parent} is being trained by {owner}.\n"
                "Wait until that ends, or train into another folder."
            ) from None
        except OSError:
            return handle
        if _is_still_at(path, handle):
            return handle
        os.close(handle)  # whoever held it has removed it since


def _is_still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
