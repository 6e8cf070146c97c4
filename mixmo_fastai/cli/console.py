"""Where a command's words go: people read the console, programs read JSON."""

import json
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from mixmo_fastai.runs import RunFolder


class RunInterruptedError(Exception):
    """A person or a signal stopped a run; the message says how to continue it.

    Attributes:
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def fold(line: str, width: int) -> list[str]:
    """Fold a line to a width; what follows is indented to the second column, if there is one.

    A number stays with its unit. Words that are longer than a line, such as paths, and lines that
    are commands are left whole, so that they can be copied.
    """
    if len(line) <= width or line.lstrip().startswith("mixmo "):
        return [line]
    label = _LABEL.match(line)
    indent = " " * (len(label[0]) if label and len(label[0]) <= width // 3 else _margin(line) + 2)
    parts = textwrap.wrap(
        _UNIT.sub("\u00a0", line),
        width,
        subsequent_indent=indent,
        drop_whitespace=True,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.replace("\u00a0", " ") for part in parts]


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip())


_LABEL = re.compile(r"\s*\S+(?: \S+)*\s{2,}(?=\S)")
_UNIT = re.compile(r"(?<=\d) (?=(?:%|points|nats|min|h|s)(?!\w))")


class Output:
    """The console of one command.

    Args:
        as_json: the result alone goes to standard output, and words to standard error.
        quiet: no words but the result.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.console = Console(stderr=as_json, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a program reads whole lines
        self.run: RunFolder | None = None
        self.is_silent = False  # in a process that leaves speaking to another

    def say(self, line: str = "", style: str | None = None) -> None:
        """Say one thing on the way; the run's log keeps it as well."""
        if not (self.quiet or self.is_silent):
            self._print(line, style)
        self.note(line)

    def say_command(self, line: str) -> None:
        """Say a command line; a terminal does not break it, so that it can be copied."""
        if not (self.quiet or self.is_silent):
            self.console.print(line, markup=False, soft_wrap=True)
        self.note(line)

    def note(self, line: str) -> None:
        """Write a line to the run's log alone."""
        if self.run is not None:
            self.run.log(line)

    def result(self, lines: list[str], value: Mapping[str, Any]) -> None:
        """Give the result: lines for people, or the value as JSON."""
        if self.is_silent:
            return
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2) + "\n")
        for number, line in enumerate(lines):
            if not self.as_json and (line or number or not self.quiet):
                self._print(line)
            self.note(line)

    def _print(self, line: str, style: str | None = None) -> None:
        """Print a line, on a terminal folded to its width; pipes get whole lines."""
        width = self.console.width if self.console.is_terminal else None
        for part in [line] if width is None else fold(line, width):
            self.console.print(part, style=style, markup=False, soft_wrap=True)
