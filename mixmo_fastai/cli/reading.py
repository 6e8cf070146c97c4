"""Display of reading and decoding many image files."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.progress import format_clock
from mixmo_fastai.runtime.progress import reported_to

BAR_AFTER = 1.0
"""Seconds after which a bar is shown on a terminal."""
LINE_AFTER, LINE_EVERY = 10.0, 60.0
"""Seconds after which a line is printed elsewhere, and until the next."""


@contextmanager
def reading_shown(output: Output) -> Iterator["ReadingDisplay"]:
    """Show the progress of reading image files in a with block; yield the display."""
    display = ReadingDisplay(output)
    try:
        with reported_to(display):
            yield display
    finally:
        display.close()


class ReadingDisplay:
    """Show a bar on a terminal, or print a line now and then; nothing for short tasks.

    A task of `LINE_AFTER` seconds or more ends with a line in both cases.

    Args:
        output: the command's console.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self.start_time = self.next_line = 0.0
        self.bar: Progress | None = None
        self.row: Any = None

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show that `done` of `total` images are read."""
        if self.output.quiet or self.output.is_silent:
            return
        now = time.perf_counter()
        if not done:
            self.close()
            self.start_time, self.next_line = now, now + LINE_AFTER
            return
        seconds = max(1e-9, now - self.start_time)
        rate = f"{done / seconds:,.0f} images/s"
        if done >= total:
            self.close()
            if seconds >= LINE_AFTER:
                self.output.print(f"{task}: {total:,} in {format_clock(seconds)}, {rate}")
            return
        left = format_clock((total - done) * seconds / done)
        if self.output.console.is_terminal:
            if seconds >= BAR_AFTER:
                self._show_bar(task, done, total, f"{rate}, left {left}")
        elif now >= self.next_line:
            self.next_line = now + LINE_EVERY
            self.output.print(f"{task}: {done:,} of {total:,}, {rate}, {left} left")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _show_bar(self, task: str, done: int, total: int, speed: str) -> None:
        if self.bar is None:
            self.bar = _make_bar(self.output)
            self.row = self.bar.add_task(task, total=total, completed=done, speed=speed)
            self.bar.start()
        self.bar.update(self.row, completed=done, speed=speed)


def _make_bar(output: Output) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        console=output.console,
        transient=True,
        expand=True,
    )
