"""The command line: parse, call, render. No logic lives here."""

from mixmo_fastai.cli.main import main, run

__all__ = ["main", "run"]
