"""Progress of reading many files, for display by commands.

Code that reads files wraps its loop in `counted`. Nothing is displayed unless the caller has
installed a function with `reported_to`.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Report = Callable[[str, int, int], None]
"""Takes the name of a task, the number of items that are done, and their total."""

_Batch = TypeVar("_Batch", bound=Sized)
_report: ContextVar[Report | None] = ContextVar("report", default=None)


@contextmanager
def reported_to(report: Report) -> Iterator[None]:
    """Pass progress to a function in a with block."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


def counted(batches: Iterable[_Batch], task: str, total: int) -> Iterator[_Batch]:
    """Yield batches, and report how many of their items are done.

    Args:
        batches: batches of items.
        task: what is done, such as "Decoding images".
        total: number of items in all batches.
    """
    report, done = _report.get(), 0
    if report is None or not total:
        yield from batches
        return
    report(task, 0, total)
    for batch in batches:
        done += len(batch)
        report(task, done, total)
        yield batch
