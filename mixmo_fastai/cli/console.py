"""Where a command's words go: people read the console, programs read JSON."""

import json
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

    def say(self, line: str = "", style: str | None = None, *, indent: int = 0) -> None:
        """Say one thing on the way; the run's log keeps it as well.

        Args:
            line: what.
            style: of a terminal.
            indent: columns by which a terminal indents the second and later lines of a long one.
        """
        if not (self.quiet or self.is_silent):
            shown = line
            if indent and self.console.is_terminal:
                shown = _folded(line, self.console.width, indent)
            self.console.print(shown, style=style, markup=False)
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
        for line in lines:
            if not self.as_json:
                self.console.print(line, markup=False)
            self.note(line)


def _folded(line: str, width: int, indent: int) -> str:
    return textwrap.fill(
        line,
        max(width, 2 * indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
