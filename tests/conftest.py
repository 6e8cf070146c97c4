import gc
import os
import tempfile

import pytest
import torch
from processes import cache_digits, mixmo, server

from mixmo_fastai.runtime.devices import keep_freed_memory

__all__ = ["mixmo", "server"]

# Failed assertions of these helper modules show the compared values, as those of tests do.
pytest.register_assert_rewrite("commands", "fuzzing", "launches", "short_runs")

torch.set_num_threads(1)
keep_freed_memory()  # a sixth of the time of the suite is spent in the kernel otherwise
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
TRACKIO = tempfile.TemporaryDirectory(prefix="trackio-", ignore_cleanup_errors=True)
os.environ["TRACKIO_DIR"] = TRACKIO.name  # Trackio reads it when it is imported
MANY_TESTS = 20  # from which on caching the digits takes less time than it saves


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Make warnings errors while tests run, but not while pytest, plugins and libraries load."""
    filters = session.config.getini("filterwarnings")
    gc.collect()
    gc.freeze()  # otherwise each collection traverses all imported objects
    if len(session.items) > MANY_TESTS:
        cache_digits()
    configured = [*filters]
    filters.insert(0, "error")  # first, so that pyproject.toml, -W and tests override it
    try:
        return (yield)
    finally:
        filters[:] = configured


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Start one worker more than there are cores, since many tests wait for other processes."""
    return num_cores() + 1


def num_cores():
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Assign consecutive tests, which share fixtures, to each worker, then balance the load.

    This replaces "load", the default of -n; --dist selects another scheduler.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None
