"""What a logger is told of a run, and when."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Step(NamedTuple):
    """A step of training, before which `step` steps were done.

    Attributes:
        step: its place in the run, from 0.
        epoch: from 1.
        loss: per member, as the training loss of history.csv, which is the mean of an epoch's.
        lr, momentum: that the optimizer took.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    momentum: float


@dataclass(frozen=True)
class Subject:
    """A run to follow.

    Attributes:
        folder: where files go; it is there.
        name: of the run.
        group: the deep ensemble that it belongs to, if any.
        settings: of its recipe, by the names that a person types.
        done: steps that were done before; what was logged of later ones is void.
        say: tells a person a line.
    """

    folder: Path
    name: str
    group: str | None
    settings: Mapping[str, Any]
    done: int
    say: Callable[[str], None]


class Tracker(Protocol):
    """Where a run is logged to. What goes wrong may be raised: no training ends by that.

    A place in the run is a number of steps done: a step's loss is that of the weights after as
    many steps as were done before it, an epoch's metrics are those of the weights after its last.
    """

    def __init__(self, subject: Subject) -> None:
        """Begin to follow a run, or go on after `subject.done` steps."""

    def steps(self, steps: Sequence[Step]) -> None:
        """Log steps, in order."""

    def metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of one kind, "epoch" or "final", at a place in the run."""

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Log pictures, PNG by name, at a place in the run."""

    def close(self, exit_code: int) -> None:
        """Leave nothing unwritten; 0 where all went well, else the exit code of the command."""
