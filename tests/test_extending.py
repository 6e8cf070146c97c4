"""The changes that docs/extending.md shows, made to a copy of the package, do what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^    mixmo (.*)$", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), re.M)
MOST_LINES = 30


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with all changes of the page."""
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
    assert 0 < len(added) < MOST_LINES


def test_there_is_a_change_of_each_kind():
    assert len(CHANGES) == 3
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run(command, extended, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mixmo_fastai", *shlex.split(command)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(extended)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*tmp_path.iterdir()]


def test_without_the_changes_they_do_not(tmp_path):
    command = [sys.executable, "-m", "mixmo_fastai", "show", "digits", "--mix", "diagonal"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "diagonal" in done.stderr
