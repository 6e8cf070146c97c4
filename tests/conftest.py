import gc
import os

import pytest
import torch
from processes import keep_digits, mixmo, server

__all__ = ["mixmo", "server"]

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Make warnings errors while tests run, but not while pytest, plugins and libraries load."""
    filters = session.config.getini("filterwarnings")
    gc.collect()
    gc.freeze()  # or each collection would look through all that was imported
    keep_digits()
    configured = [*filters]
    filters.insert(0, "error")  # first, so that the filters of pyproject.toml, -W and tests prevail
    try:
        return (yield)
    finally:
        filters[:] = configured


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker tests that follow each other, as they share fixtures, then balance.

    The option --dist chooses another way; "load", which deals tests out singly, is what -n implies.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None
