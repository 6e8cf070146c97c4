"""The display of training: a live bar on a terminal, and a line per epoch everywhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from mixmo_fastai.cli.console import Output
from mixmo_fastai.epochs import TrainedEpochCallback
from mixmo_fastai.recording import HistoryCallback

COLUMNS = (
    ("epoch", "epoch", 9),
    ("train_loss", "train loss", 11),
    ("valid_loss", "valid loss", 11),
    ("accuracy", "accuracy", 9),
    ("member_accuracy", "members", 8),
    ("lr", "lr", 10),
    ("images_per_second", "images/s", 9),
    ("left", "left", 9),
)


class TrainingDisplay(TrainedEpochCallback):
    """Show steps, images per second and the time left; say one line per epoch.

    Args:
        output: the command's console.
        images_per_step: images that the network sees per step.
        speed: as it was measured before, a `speed.Speed`, until enough steps were made; None where
            it was not.
    """

    order = 70  # after the history
    FIRST_STEPS = 2
    """Steps that are left out of the rate: they tune, compile and allocate."""

    def __init__(self, output: Output, images_per_step: int, speed: Any = None) -> None:
        super().__init__()
        self.output, self.images_per_step = output, images_per_step
        self.rate_before = speed.images_per_second / images_per_step if speed else None
        self.progress = _make_progress(output)
        self.task: Any = None
        self.steps_here, self.first_epoch, self.latest_epoch = 0, -1, -1

    def before_train(self) -> None:
        """Start the bar at the first epoch that trains, and anew with each network."""
        if self.learn.epoch <= self.latest_epoch or self.first_epoch < 0:
            self._start()
        self.latest_epoch = self.learn.epoch

    def _start(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.steps_here, self.first_epoch = 0, self.learn.epoch
        self.steps_before = getattr(self.learn.dl, "first_step", 0)  # of a resumed run's epoch
        self.output.say("".join(f"{title:>{width}}" for _, title, width in COLUMNS))
        self.began = time.perf_counter()
        self.counted_from = self.began
        total = self.learn.n_epoch * len(self.learn.dls.train)
        done = self.learn.epoch * len(self.learn.dls.train) + self.steps_before
        self.task = self.progress.add_task(
            self._place(), total=total, completed=done, speed=self._speed(), left=self._left()
        )
        self.progress.start()

    def after_batch(self) -> None:
        """Move the bar."""
        self.steps_here += 1
        if self.steps_here <= self.FIRST_STEPS:
            self.counted_from = time.perf_counter()
        self.progress.update(
            self.task,
            advance=1,
            description=self._place(),
            speed=self._speed(),
            left=self._left(),
        )

    def after_trained_epoch(self) -> None:
        """Say the epoch's line."""
        row = next(cb for cb in self.learn.cbs if isinstance(cb, HistoryCallback)).latest
        if row.get("epoch") == self.learn.epoch + 1:
            self.output.say(_line({**row, "left": self._left()}, self.learn.n_epoch))

    def close(self) -> None:
        """Remove the bar; training is over, however it ended."""
        self.progress.stop()

    def _place(self) -> str:
        return f"epoch {self.learn.epoch + 1}/{self.learn.n_epoch}"

    def _rate(self) -> float | None:
        """Return steps per second, validation included; as measured before in the first steps."""
        counted = self.steps_here - self.FIRST_STEPS
        if counted > 0:
            return counted / max(1e-9, time.perf_counter() - self.counted_from)
        if self.rate_before or not self.steps_here:
            return self.rate_before
        return self.steps_here / max(1e-9, time.perf_counter() - self.began)

    def _speed(self) -> str:
        rate = self._rate()
        if rate is None:
            return ""
        images = rate * self.images_per_step
        return f"{images:,.0f} images/s" if images >= 10 else f"{images:.2g} images/s"

    def _left(self) -> str:
        rate = self._rate()
        if rate is None:
            return ""
        total = (self.learn.n_epoch - self.first_epoch) * len(self.learn.dls.train)
        left = total - self.steps_before - self.steps_here
        return clock(left / rate)


class LabelledTimes(ProgressColumn):
    """The time that has passed and the time left, each with its label."""

    def render(self, task: Task) -> Text:
        """Show both for a bar."""
        left = task.fields["left"]
        return Text(f"elapsed {clock(task.elapsed or 0)}" + (f", left {left}" if left else ""))


def clock(seconds: float) -> str:
    """Show a time in hours, minutes and seconds, and from 100 hours on in days."""
    if seconds >= 360_000:
        return f"{seconds / 86_400:,.0f} days"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _make_progress(output: Output) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[speed]}"),
        LabelledTimes(table_column=Column(no_wrap=True)),
        console=output.console,
        transient=True,
        expand=True,
        disable=output.quiet or output.is_silent or not output.console.is_terminal,
    )


def _line(row: Mapping[str, Any], num_epochs: int) -> str:
    shown = {**row, "epoch": f"{row['epoch']}/{num_epochs}"}
    for name in ("accuracy", "member_accuracy"):
        shown[name] = f"{100 * row[name]:.2f}" if row[name] != "" else "-"
    for name in ("train_loss", "valid_loss"):
        shown[name] = f"{row[name]:.4f}" if row[name] != "" else "-"
    shown["lr"] = f"{float(row['lr']):.3g}"
    shown["images_per_second"] = f"{row['images_per_second']:,.0f}"
    return "".join(f"{shown[name]:>{width}}" for name, _, width in COLUMNS)
