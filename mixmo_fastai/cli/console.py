"""Console output of commands: text lines, or JSON for programs."""

import json
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from mixmo_fastai.runs.folder import RunFolder


def wrap_line(line: str, width: int) -> list[str]:
    """Wrap a line to a width; further lines are indented to its second column, if it has one.

    Numbers are not separated from their units. Words longer than the width, such as paths, and
    lines that are commands are not broken, so that they can be copied.
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
        as_json: print the result as JSON to standard output, and all other lines to standard error.
        quiet: print only the result.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.console = Console(stderr=as_json, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # programs need unbroken lines
        self.run: RunFolder | None = None
        self.is_silent = False  # True in distributed processes other than rank 0

    def print(self, line: str = "", style: str | None = None) -> None:
        """Print a line during the command, and write it to the run's log."""
        if not (self.quiet or self.is_silent):
            self._write(line, style)
        self.log(line)

    def print_command(self, line: str) -> None:
        """Print a command line without wrapping, so that it can be copied; also log it."""
        if not (self.quiet or self.is_silent):
            self.console.print(line, markup=False, soft_wrap=True)
        self.log(line)

    def log(self, line: str) -> None:
        """Write a line only to the run's log."""
        if self.run is not None:
            self.run.log(line)

    def print_result(self, lines: list[str], value: Mapping[str, Any]) -> None:
        """Print the result, as lines of text or the value as JSON; the lines are also logged."""
        if self.is_silent:
            return
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2) + "\n")
        for number, line in enumerate(lines):
            if not self.as_json and (line or number or not self.quiet):
                self._write(line)
            self.log(line)

    def _write(self, line: str, style: str | None = None) -> None:
        """Write a line to the console, wrapped to the width of a terminal, unbroken to a pipe."""
        width = self.console.width if self.console.is_terminal else None
        for part in [line] if width is None else wrap_line(line, width):
            self.console.print(part, style=style, markup=False, soft_wrap=True)
