"""The settings of pytest hold on any Python, whatever plugins are installed in it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = """
raise RuntimeError("a plugin was loaded that nobody asked for")
"""
ASKED_FOR = """
import warnings
import pytest

def pytest_configure(config):
    config.issue_config_time_warning(pytest.PytestWarning("a plugin warns at its start"), 2)

def pytest_sessionfinish():
    warnings.warn("a plugin warns at its end")
"""


def test_warnings_of_any_category_are_errors_in_a_test():
    for category in (UserWarning, DeprecationWarning, FutureWarning, ResourceWarning):
        with pytest.raises(category, match="or of a library"):
            warnings.warn("of this project or of a library", category, stacklevel=2)


@pytest.mark.filterwarnings("ignore:a warning that a test allows")
def test_a_test_may_allow_a_warning():
    warnings.warn("a warning that a test allows", stacklevel=1)


def test_workers_and_plugins_are_chosen_by_whoever_runs_the_tests(request):
    options = request.config.getini("addopts")
    assert not {"-n", "--numprocesses", "--dist"} & {*options}
    loaded = {name for name, _ in request.config.pluginmanager.list_name_plugin()}
    assert not loaded & {"benchmark", "pytest_cov", "randomly", "asyncio", "anyio"}


@pytest.mark.slow
def test_installed_plugins_are_not_loaded_and_others_may_warn(tmp_path):
    facts = tmp_path / "installed-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[pytest11]\ninstalled = installed_plugin\n")
    (tmp_path / "installed_plugin.py").write_text(INSTALLED)
    (tmp_path / "asked_for.py").write_text(ASKED_FOR)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "asked_for", "-p", "no:cacheprovider", "-n", "1"]
        + ["tests/test_pytest_settings.py::test_warnings_of_any_category_are_errors_in_a_test"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 4 warnings" in done.stdout  # of the worker and of the process that starts it
