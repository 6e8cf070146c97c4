import pytest
import torch
from processes import mixmo, server

__all__ = ["mixmo", "server"]

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Make warnings errors while tests run, but not while pytest, plugins and libraries load."""
    filters = session.config.getini("filterwarnings")
    configured = [*filters]
    filters.insert(0, "error")  # first, so that the filters of pyproject.toml, -W and tests prevail
    try:
        return (yield)
    finally:
        filters[:] = configured
