"""One process at a time in a run folder.

The lock is the kernel's: it ends with its process, however that ends, so that none is ever stale.
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixmo_fastai.errors import InputError
from mixmo_fastai.runs import writing

LOCK = ".lock"


_HELD: set[str] = set()  # by this process, which the kernel's lock does not keep from itself


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder.

    Child processes, such as those that read images, do not hold the lock with their parent. Where
    the file system knows no locks, nothing is kept from other processes.

    Raises:
        InputError: another process is at it, or this one already; the message says which.
        RunFailedError: nothing can be written there.
    """
    path = folder / LOCK
    own = os.path.realpath(path)
    if own in _HELD:
        raise _in_use(folder, "this very process")
    with writing(path):
        handle = _opened_and_locked(path)
    _HELD.add(own)
    try:
        with suppress(OSError):  # of use to people only
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        _HELD.discard(own)
        with suppress(OSError):
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
            raise _in_use(path.parent, owner) from None
        except OSError:
            return handle
        if _is_still_at(path, handle):
            return handle
        os.close(handle)  # whoever held it has removed it since


def _in_use(folder: Path, owner: str) -> InputError:
    return InputError(
        f"{folder} is being trained by {owner}.\n"
        "Wait until that ends, or train into another folder."
    )


def _is_still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
