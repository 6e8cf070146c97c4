"""File lock: only one process at a time trains in a run folder.

The operating system releases the lock when its process ends for any reason, so a lock is never
stale. Child processes, such as data loader workers, do not hold it: `filelock` closes the lock file
in forked processes.
"""

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import writing

LOCK = ".lock"
_TIMEOUT = 0.1  # seconds, for another attempt if the holder has just removed the file
_OWNER_AT = 1  # position of the owner's name; on Windows, byte 0 is locked and cannot be read
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class FolderInUseError(InputError):
    """Another process, or this one, trains in a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against training by other processes.

    On a file system without locks, other processes are not excluded.

    Raises:
        FolderInUseError: another process, or this one, holds the lock; the message names it.
        RunFailedError: the lock file cannot be written.
    """
    import filelock  # 40 ms

    path = folder / LOCK
    lock = filelock.FileLock(path, fallback_to_soft=False)
    with writing(path):
        if not folder.is_dir():  # filelock would create it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        try:
            lock.acquire(timeout=_TIMEOUT)
        except filelock.Timeout:
            raise _in_use(path) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    try:
        with suppress(OSError):  # the content only serves error messages
            _write_owner(path)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while the lock is still held
        lock.release()


@contextmanager
def starting(path: Path) -> Iterator[Callable[[], None]]:
    """Wait until no other process starts a run at a path; the caller may then start or join it.

    The lock file is beside the run folder. On a file system without locks, others are not excluded.

    Args:
        path: the run folder, which may not exist.

    Yields:
        A function that lets the others go on, before the end of the with block.

    Raises:
        InputError: the lock file cannot be written.
    """
    beside = _beside(path, "starting")
    try:
        end = _lock_beside(beside)
    except OSError as error:
        raise InputError(f"Cannot write {beside}: {error.strerror}.") from error
    try:
        yield end
    finally:
        end()


def claim(path: Path) -> Callable[[], None] | None:
    """Claim a run, which may not exist yet, for this process, without waiting.

    The lock file is beside the run folder. On a file system without locks, others are not excluded.

    Args:
        path: the run folder.

    Returns:
        A function that ends the claim, or None if another process has claimed the run.

    Raises:
        OSError: the lock file cannot be written.
    """
    try:
        return _lock_beside(_beside(path, "claimed"), _TIMEOUT)
    except FolderInUseError:
        return None


def _beside(path: Path, purpose: str) -> Path:
    path = Path(os.path.abspath(path))  # "." has no name
    return path.with_name(f".{path.name}.{purpose}")


def _lock_beside(beside: Path, timeout: float = -1) -> Callable[[], None]:
    """Lock a file; return a function that removes and unlocks it, and may be called again."""
    import filelock  # 40 ms

    beside.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(beside, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        raise FolderInUseError(f"{beside} is locked.") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise

    def end() -> None:
        if lock.is_locked:
            with suppress(OSError):
                beside.unlink(missing_ok=True)  # while the lock is still held
        lock.release()

    return end


def _write_owner(path: Path) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(_OWNER_AT)
        file.write(_this_process().encode())
        file.truncate()


def _read_owner(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        file.seek(_OWNER_AT)
        return file.read(200).decode(errors="replace")


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _in_use(path: Path) -> FolderInUseError:
    owner = ""
    with suppress(OSError):
        owner = _read_owner(path)
    name = "this process" if owner == _this_process() else owner or "another process"
    return FolderInUseError(
        f"{path.parent} is in use: {name} is training there.\n"
        "Wait until it finishes, or choose another folder."
    )
