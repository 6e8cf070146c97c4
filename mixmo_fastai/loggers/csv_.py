"""CSV logger: steps as CSV and plots as PNG, in RUN/logs.

Metrics are not written again: history.csv and metrics.json of the run already hold them.
"""

import csv
import io
from collections.abc import Mapping, Sequence

from mixmo_fastai.loggers.tracker import Step, TrackedRun
from mixmo_fastai.runs.files import write_atomically


class CsvTracker:
    """Write a row per step to steps.csv, and plots as PNG to the same folder."""

    def __init__(self, run: TrackedRun) -> None:
        self.folder, self.path = run.folder, run.folder / "steps.csv"
        if self.path.is_file():
            valid_rows = self._rows_before(run.steps_done)
            write_atomically(self.path, _to_csv([Step._fields, *valid_rows]))

    def _rows_before(self, step: int) -> list[list[str]]:
        """Read the rows of earlier steps; skip an incomplete row of a process that was killed."""
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))[1:]
        complete = [row for row in rows if len(row) == len(Step._fields) and row[0].isdecimal()]
        return [row for row in complete if int(row[0]) < step]

    def log_steps(self, steps: Sequence[Step]) -> None:
        """Append a row per step."""
        rows = [(s.step, s.epoch, *(f"{value:.6g}" for value in s[2:])) for s in steps]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_to_csv(rows if file.tell() else [Step._fields, *rows]))

    def log_metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing: the run's own files hold the metrics."""

    def log_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Write PNG files, replacing existing ones."""
        for name, png in images.items():
            write_atomically(self.folder / f"{name}.png", png)

    def close(self, exit_code: int) -> None:
        """Do nothing: no data is pending."""


def _to_csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
