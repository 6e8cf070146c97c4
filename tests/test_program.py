"""The program imports only the command that it runs."""

import inspect
import subprocess
import sys
from pkgutil import resolve_name

import pytest

from mixmo_fastai.cli.program import _COMMANDS


@pytest.mark.parametrize("name", _COMMANDS)
def test_first_line_of_help_is_that_of_the_command(name):
    target, first_line = _COMMANDS[name]
    docstring = inspect.getdoc(resolve_name(f"mixmo_fastai.cli.{target}"))
    assert docstring.partition("\n\n")[0].replace("\n", " ") == first_line


def test_help_imports_no_command():
    program = (
        "import sys\n"
        "from mixmo_fastai.cli import run\n"
        "assert run(['--help']) == 0\n"
        "imported = [name for name in sys.modules if name.startswith('mixmo_fastai.cli.')]\n"
        "assert sorted(imported) == ['mixmo_fastai.cli.options', 'mixmo_fastai.cli.program']\n"
        "assert not any(name.startswith('mixmo_fastai.runs') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"), [("mixmo lr", "lr-find"), ("mixmo fit --batch", "--batch-size")]
)
def test_shell_completion_knows_commands_and_flags(monkeypatch, words, expected):
    for name, value in (
        ("_MIXMO_COMPLETE", "complete_bash"),
        ("COMP_WORDS", words),
        ("COMP_CWORD", str(len(words.split()) - 1)),
    ):
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "mixmo_fastai"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert expected in done.stdout.split()
