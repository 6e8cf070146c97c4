"""The command line: parse arguments, call the library, format results. No logic belongs here."""

import sys
from collections.abc import Sequence

__all__ = ["main", "run"]


def main() -> None:
    """Run the program and exit with its exit code."""
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # during imports, before the command handles signals
        code = 130
    sys.exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command line; see `mixmo_fastai.cli.program.run`."""
    from mixmo_fastai.cli import program

    return program.run(args)
