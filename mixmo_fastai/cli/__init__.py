"""The command line: parse arguments, call the library, format results. No logic belongs here."""

import sys
from collections.abc import Sequence

__all__ = ["main", "run"]


def main(program: str | None = None) -> None:
    """Run the program and exit with its exit code.

    Args:
        program: `__file__` of a program of one's own that registers components and then calls this
            function: `mixmo study` starts it for each run, instead of `mixmo`.
    """
    try:
        code = run(sys.argv[1:], program)
    except KeyboardInterrupt:  # during imports, before the command handles signals
        code = 130
    sys.exit(code)


def run(args: Sequence[str], program: str | None = None) -> int:
    """Run one command line; see `mixmo_fastai.cli.program.run`."""
    from mixmo_fastai.cli import program as mixmo

    return mixmo.run(args, program)
