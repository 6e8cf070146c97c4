"""Loggers: a run's metrics and pictures, in files and in experiment trackers.

A new one is a module beside this one with a `Tracker`, and a line in `LOGGERS`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from mixmo_fastai.errors import InputError, unknown


class Logger(NamedTuple):
    """A logger that there is.

    Attributes:
        tracker: its class, as module of this package and name.
        package: that it needs, if any.
    """

    tracker: str
    package: str = ""

    def load(self) -> Any:
        """Import its class; that takes a second, and torch."""
        module, _, name = self.tracker.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), name)


LOGGERS = {
    "csv": Logger("csv_:CsvTracker"),
    "tensorboard": Logger("tensorboard_:TensorBoardTracker", package="tensorboard"),
    "wandb": Logger("wandb_:WandbTracker", package="wandb"),
}


def parse_loggers(text: str) -> tuple[str, ...]:
    """Read names as on the command line, such as "csv,wandb".

    Raises:
        InputError: there is no logger of a name, or the package that it needs is not installed.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in LOGGERS:
            raise unknown("logger", name, LOGGERS)
        package = LOGGERS[name].package
        if package and find_spec(package) is None:
            raise InputError(
                f"--logger {name} needs the package {package}.\n"
                "Install: pip install 'mixmo-fastai[loggers]'"
            )
    return names
