"""The display of training: a live bar on a terminal, and a line per epoch everywhere."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

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
    """

    order = 70  # after the history

    def __init__(self, output: Output, images_per_step: int) -> None:
        super().__init__()
        self.output, self.images_per_step = output, images_per_step
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
        total = self.learn.n_epoch * len(self.learn.dls.train)
        done = self.learn.epoch * len(self.learn.dls.train) + self.steps_before
        self.task = self.progress.add_task("", total=total, completed=done, speed="", left="")
        self.progress.start()

    def after_batch(self) -> None:
        """Move the bar."""
        self.steps_here += 1
        seconds = time.perf_counter() - self.began
        speed = self.steps_here * self.images_per_step / seconds
        self.progress.update(
            self.task,
            advance=1,
            description=f"epoch {self.learn.epoch + 1}/{self.learn.n_epoch}",
            speed=f"{speed:,.0f} images/s",
            left=f"{self._left()} left",
        )

    def after_trained_epoch(self) -> None:
        """Say the epoch's line."""
        row = next(cb for cb in self.learn.cbs if isinstance(cb, HistoryCallback)).latest
        if row.get("epoch") == self.learn.epoch + 1:
            self.output.say(_line({**row, "left": self._left()}, self.learn.n_epoch))

    def close(self) -> None:
        """Remove the bar; training is over, however it ended."""
        self.progress.stop()

    def _left(self) -> str:
        total = (self.learn.n_epoch - self.first_epoch) * len(self.learn.dls.train)
        left = total - self.steps_before - self.steps_here
        seconds = (time.perf_counter() - self.began) / max(1, self.steps_here) * left
        return str(timedelta(seconds=round(seconds)))


def _make_progress(output: Output) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=output.console,
        transient=True,
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
