"""Display of training: a progress bar on a terminal, and a line per epoch."""

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from mixmo_fastai.callbacks.epoch import TrainedEpochCallback
from mixmo_fastai.cli.console import Output
from mixmo_fastai.training.history import HistoryCallback

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
    """Show a progress bar with images per second and time left, and print a line per epoch.

    Args:
        output: the command's console.
        images_per_step: number of images that the network sees per step.
        speed: `speed.Speed` measured before training, used for the first steps; None if not
            measured.
    """

    order = 70  # after the history
    WARMUP_STEPS = 2
    """Steps excluded from the rate, because they compile, tune kernels and allocate memory."""

    def __init__(self, output: Output, images_per_step: int, speed: Any = None) -> None:
        super().__init__()
        self.output, self.images_per_step = output, images_per_step
        self.initial_rate = speed.images_per_second / images_per_step if speed else None
        self.progress = _make_progress(output)
        self.task: Any = None
        self.steps_here, self.first_epoch, self.latest_epoch = 0, -1, -1

    def before_train(self) -> None:
        """Start the bar at the first epoch that trains, and restart it for each network."""
        if self.learn.epoch <= self.latest_epoch or self.first_epoch < 0:
            self._start()
        self.latest_epoch = self.learn.epoch

    def _start(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.steps_here, self.first_epoch = 0, self.learn.epoch
        self.steps_before = getattr(self.learn.dl, "first_step", 0)  # nonzero if resumed mid-epoch
        self.output.print("".join(f"{title:>{width}}" for _, title, width in COLUMNS))
        self.start_time = time.perf_counter()
        self.rate_start_time = self.start_time
        total = self.learn.n_epoch * len(self.learn.dls.train)
        done = self.learn.epoch * len(self.learn.dls.train) + self.steps_before
        self.task = self.progress.add_task(
            self._description(), total=total, completed=done, speed=self._speed(), left=self._left()
        )
        self.progress.start()

    def after_batch(self) -> None:
        """Advance the bar."""
        self.steps_here += 1
        if self.steps_here <= self.WARMUP_STEPS:
            self.rate_start_time = time.perf_counter()
        self.progress.update(
            self.task,
            advance=1,
            description=self._description(),
            speed=self._speed(),
            left=self._left(),
        )

    def after_trained_epoch(self) -> None:
        """Print the line of the epoch."""
        row = next(cb for cb in self.learn.cbs if isinstance(cb, HistoryCallback)).latest
        if row.get("epoch") == self.learn.epoch + 1:
            self.output.print(_epoch_line({**row, "left": self._left()}, self.learn.n_epoch))

    def close(self) -> None:
        """Remove the bar after training has finished or failed."""
        self.progress.stop()

    def _description(self) -> str:
        return f"epoch {self.learn.epoch + 1}/{self.learn.n_epoch}"

    def _rate(self) -> float | None:
        """Return steps per second, including validation; during warm-up, the initial rate."""
        counted = self.steps_here - self.WARMUP_STEPS
        if counted > 0:
            return counted / max(1e-9, time.perf_counter() - self.rate_start_time)
        if self.initial_rate or not self.steps_here:
            return self.initial_rate
        return self.steps_here / max(1e-9, time.perf_counter() - self.start_time)

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
        return format_clock(left / rate)


class TimesColumn(ProgressColumn):
    """Progress column with the elapsed time and the time left, both labelled."""

    def render(self, task: Task) -> Text:
        """Format the times of a task."""
        left = task.fields["left"]
        elapsed = format_clock(task.elapsed or 0)
        return Text(f"elapsed {elapsed}" + (f", left {left}" if left else ""))


def format_clock(seconds: float) -> str:
    """Format a time in hours, minutes and seconds, or in days from 100 hours."""
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
        TimesColumn(table_column=Column(no_wrap=True)),
        console=output.console,
        transient=True,
        expand=True,
        disable=output.quiet or output.is_silent or not output.console.is_terminal,
    )


def _epoch_line(row: Mapping[str, Any], num_epochs: int) -> str:
    texts = {**row, "epoch": f"{row['epoch']}/{num_epochs}"}
    for name in ("accuracy", "member_accuracy"):
        texts[name] = f"{100 * row[name]:.2f}" if row[name] != "" else "-"
    for name in ("train_loss", "valid_loss"):
        texts[name] = f"{row[name]:.4f}" if row[name] != "" else "-"
    texts["lr"] = f"{float(row['lr']):.3g}"
    texts["images_per_second"] = f"{row['images_per_second']:,.0f}"
    return "".join(f"{texts[name]:>{width}}" for name, _, width in COLUMNS)
