"""Loggers: write a run's metrics and plots to files and to experiment trackers.

To add a logger, write a module in this package with a `Tracker`, and add a line to `LOGGERS`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from mixmo_fastai.errors import InputError, unknown_name_error


class Logger(NamedTuple):
    """An available logger.

    Attributes:
        tracker: its class, as "module:name" with a module of this package.
        package: required package; "" for none.
    """

    tracker: str
    package: str = ""

    def load(self) -> Any:
        """Import the class; this also imports torch and takes about a second."""
        module, _, name = self.tracker.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), name)


LOGGERS = {
    "csv": Logger("csv_:CsvTracker"),
    "tensorboard": Logger("tensorboard_:TensorBoardTracker", package="tensorboard"),
    "wandb": Logger("wandb_:WandbTracker", package="wandb"),
    "mlflow": Logger("mlflow_:MlflowTracker", package="mlflow"),
    "trackio": Logger("trackio_:TrackioTracker", package="trackio"),
}


def parse_loggers(text: str) -> tuple[str, ...]:
    """Parse names of loggers, such as "csv,wandb".

    Raises:
        InputError: a name is unknown, or the package that its logger needs is not installed.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in LOGGERS:
            raise unknown_name_error("logger", name, LOGGERS)
        package = LOGGERS[name].package
        if package and find_spec(package) is None:
            raise InputError(
                f"--logger {name} needs the package {package}.\n"
                "Install: pip install 'mixmo-fastai[loggers]'"
            )
    return names
