"""pytest's settings do not depend on the installed plugins."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNUSED_PLUGIN = """
raise RuntimeError("a plugin was loaded that was not requested")
"""
REQUESTED_PLUGIN = """
import warnings
import pytest

def pytest_configure(config):
    config.issue_config_time_warning(pytest.PytestWarning("a warning at the start"), 2)

def pytest_sessionfinish():
    warnings.warn("a warning at the end")
"""


def test_warnings_of_any_category_are_errors_in_a_test():
    for category in (UserWarning, DeprecationWarning, FutureWarning, ResourceWarning):
        with pytest.raises(category, match="or of a library"):
            warnings.warn("of this project or of a library", category, stacklevel=2)


@pytest.mark.filterwarnings("ignore:a warning that a test allows")
def test_filterwarnings_mark_allows_a_warning():
    warnings.warn("a warning that a test allows", stacklevel=1)


def test_no_workers_or_plugins_by_default(request):
    options = request.config.getini("addopts")
    assert not {"-n", "--numprocesses", "--dist"} & {*options}
    loaded = {name for name, _ in request.config.pluginmanager.list_name_plugin()}
    assert not loaded & {"benchmark", "pytest_cov", "randomly", "asyncio", "anyio"}


@pytest.mark.slow
def test_only_requested_plugins_are_loaded_and_may_warn(tmp_path):
    metadata = tmp_path / "installed-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\ninstalled = installed_plugin\n")
    (tmp_path / "installed_plugin.py").write_text(UNUSED_PLUGIN)
    (tmp_path / "requested_plugin.py").write_text(REQUESTED_PLUGIN)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "requested_plugin",
            "-p",
            "no:cacheprovider",
            "-n",
            "1",
        ]
        + ["tests/test_pytest_settings.py::test_warnings_of_any_category_are_errors_in_a_test"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 4 warnings" in done.stdout  # two in the worker and two in the main process
