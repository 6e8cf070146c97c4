"""File lock: only one process at a time trains in a run folder.

The kernel releases the lock when its process ends for any reason, so a lock is never stale. On
Windows it is a lock of `filelock`. Elsewhere it is not, since child processes would inherit it: the
workers of a killed training would keep the folder locked.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


# Locks held by this process; the kernel's lock excludes other processes only.
_HELD: set[str] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against training by other processes.

    Child processes, such as data loader workers, do not inherit the lock. On a file system without
    locks, other processes are not excluded.

    Raises:
        InputError: another process, or this one, already holds the lock; the message names it.
        RunFailedError: the lock file cannot be written.
    """
    path = folder / LOCK
    real_path = os.path.realpath(path)
    if real_path in _HELD:
        raise _in_use(folder, "this process")
    with writing(path):
        release = _lock_with_filelock(path) if fcntl is None else _lock(path)
    _HELD.add(real_path)
    try:
        yield
    finally:
        _HELD.discard(real_path)
        release()


def _lock_with_filelock(path: Path) -> Callable[[], None]:
    """Lock a file on Windows; return the function that releases the lock."""
    import filelock  # 40 ms

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise _in_use(path.parent, "another process") from None
    return lock.release


def _lock(path: Path) -> Callable[[], None]:
    """Lock a file and write the name of the owner to it; return the function that releases it."""
    handle = _open_and_lock(path)
    with suppress(OSError):  # the content only serves error messages
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())

    def release() -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while the lock is still held
        os.close(handle)

    return release


def _open_and_lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # depends on the operating system
            owner = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise _in_use(path.parent, owner) from None
        except OSError:
            return handle
        if _is_still_at(path, handle):
            return handle
        os.close(handle)  # the previous holder has removed the file since


def _in_use(folder: Path, owner: str) -> InputError:
    return InputError(
        f"{folder} is in use: {owner} is training there.\n"
        "Wait until it finishes, or choose another folder."
    )


def _is_still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
