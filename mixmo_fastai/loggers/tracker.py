"""Interface of loggers: the information they receive about a run, and when."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Step(NamedTuple):
    """A training step.

    Attributes:
        step: index of the step in the run, from 0.
        epoch: number of the epoch, from 1.
        loss: loss per member; the training loss in history.csv is the mean of these over an epoch.
        lr, momentum: values that the optimizer used.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    momentum: float


@dataclass(frozen=True)
class TrackedRun:
    """A run to log.

    Attributes:
        folder: existing folder for files.
        name: name of the run.
        group: name of the deep ensemble that it belongs to, or None.
        settings: settings of its recipe, by the names used on the command line.
        steps_done: number of completed steps; entries logged for later steps are invalid.
        report: prints a line for the user.
    """

    folder: Path
    name: str
    group: str | None
    settings: Mapping[str, Any]
    steps_done: int
    report: Callable[[str], None]


class Tracker(Protocol):
    """Writes a run to one destination. Its methods may raise: errors never end training.

    `step` counts completed steps: the loss of a step belongs to the weights before that step, the
    metrics of an epoch to the weights after its last step.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Start logging a run, or continue after `run.steps_done` steps."""

    def log_steps(self, steps: Sequence[Step]) -> None:
        """Log steps, in order."""

    def log_metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of one kind, "epoch" or "final"."""

    def log_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Log plots, as PNG data by name."""

    def close(self, exit_code: int) -> None:
        """Write all pending data; `exit_code` is that of the command, 0 for success."""
