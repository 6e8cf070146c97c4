"""Steps as CSV and pictures as PNG, in RUN/logs.

Figures of epochs and the final ones need no more files: history.csv and metrics.json have them.
"""

import csv
import io
from collections.abc import Mapping, Sequence

from mixmo_fastai.files import write_atomically
from mixmo_fastai.loggers.tracker import Step, Subject


class CsvTracker:
    """Write a line per step to steps.csv, and pictures beside it."""

    def __init__(self, subject: Subject) -> None:
        self.folder, self.path = subject.folder, subject.folder / "steps.csv"
        if self.path.is_file():
            kept = self._rows_before(subject.done)
            write_atomically(self.path, _as_csv([Step._fields, *kept]))

    def _rows_before(self, step: int) -> list[list[str]]:
        """Read the lines of earlier steps; a process that was killed may leave a torn one."""
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))[1:]
        whole = [row for row in rows if len(row) == len(Step._fields) and row[0].isdecimal()]
        return [row for row in whole if int(row[0]) < step]

    def steps(self, steps: Sequence[Step]) -> None:
        """Add lines."""
        rows = [(s.step, s.epoch, *(f"{value:.6g}" for value in s[2:])) for s in steps]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_as_csv(rows if file.tell() else [Step._fields, *rows]))

    def metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Leave them to the run's own files."""

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Write them, in place of those that are there."""
        for name, png in pictures.items():
            write_atomically(self.folder / f"{name}.png", png)

    def close(self, exit_code: int) -> None:
        """Nothing is left unwritten."""


def _as_csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
