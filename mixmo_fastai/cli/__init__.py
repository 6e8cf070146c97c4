"""The command line: parse arguments, call the library, format results. No logic belongs here."""

import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "run"]


def main() -> None:
    """Run the program and exit with its exit code.

    A program of one's own may call it after it has registered components; commands that start
    processes start that program.
    """
    try:
        code = run(sys.argv[1:], _own_program())
    except KeyboardInterrupt:  # during imports, before the command handles signals
        code = 130
    sys.exit(code)


def run(args: Sequence[str], own_program: Sequence[str] | None = None) -> int:
    """Run one command line; see `mixmo_fastai.cli.program.run`."""
    from mixmo_fastai.cli import program

    return program.run(args, own_program)


def _own_program() -> list[str] | None:
    """Return Python's arguments for the program that this process runs; None for `mixmo`."""
    module = sys.modules["__main__"]
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__")
        return None if name in ("mixmo_fastai", "__main__") else ["-m", name]
    return None if file is None or Path(file).stem == "mixmo" else [str(Path(file).resolve())]
