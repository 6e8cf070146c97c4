"""The changes in docs/extending.md work when applied to a copy of the package."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^    mixmo (.*)$", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), re.M)
MAX_LINES = 30


@pytest.fixture(scope="module")
def extended_package(tmp_path_factory):
    """Return a copy of the package with all changes of the page."""
    copy = tmp_path_factory.mktemp("extended")
    for part in ("mixmo_fastai", "recipes"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for change in CHANGES:
        command = ["git", "apply", "-p0", "--unidiff-zero", "-"]
        done = subprocess.run(
            command, cwd=copy, input=change, capture_output=True, text=True, check=False,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_short(change):
    added = [line for line in change.splitlines() if re.match(r"\+(?!\+\+ )", line)]
    assert 0 < len(added) < MAX_LINES


def test_number_of_changes_and_commands():
    assert len(CHANGES) == 8
    assert len(COMMANDS) >= 11


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_with_the_changes(command, extended_package, mixmo, tmp_path):
    use_extended_package = f"""
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "mixmo_fastai"]:
    del sys.modules[name]
sys.path.insert(0, {str(extended_package)!r})
import mixmo_fastai
assert mixmo_fastai.__file__.startswith({str(extended_package)!r})
"""
    done = mixmo(*shlex.split(command), prelude=use_extended_package)
    assert done.wait() == 0, done.printed
    if command.startswith("parameters"):
        assert "parameters" in done.printed
        return
    assert len([*tmp_path.iterdir()]) > 1  # more than the file with the printed output
    files = [*tmp_path.glob("runs/*/metrics.json")]
    assert len(files) == command.startswith("fit")
    for file in files:
        value = json.loads(file.read_text())["test"]["worst_class_accuracy"]
        assert f"Worst class          {100 * value:.2f} %" in done.printed


def test_commands_fail_without_the_changes(mixmo):
    done = mixmo("show", "digits", "--mix", "diagonal")
    assert done.wait() == 2
    assert "diagonal" in done.printed
