"""TensorBoard: event files in RUN/logs/tensorboard."""

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mixmo_fastai.loggers.tracker import Step, Subject

MAIN_METRICS = ("final/test/accuracy", "final/test/nll", "final/test/ece")
"""What the table of settings shows of each run."""


class TensorBoardTracker:
    """Write event files; what a killed process logged of steps that are done anew is purged."""

    def __init__(self, subject: Subject) -> None:
        folder = str(subject.folder / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=subject.done)
        # As `add_hparams` does, which comes too late for a run that is stopped, and makes a run of
        # its own beside this one.
        settings = {name: _plain(value) for name, value in subject.settings.items()}
        experiment, start, self.end = hparams(settings, dict.fromkeys(MAIN_METRICS, 0.0))
        self._add_summaries(experiment, start)
        self.writer.flush()

    def _add_summaries(self, *summaries: object) -> None:
        for summary in summaries:
            self.writer.file_writer.add_summary(summary)

    def steps(self, steps: Sequence[Step]) -> None:
        """Write three scalars per step."""
        for step in steps:
            for name in ("loss", "lr", "momentum"):
                self.writer.add_scalar(f"train/{name}", getattr(step, name), step.step)
        self.writer.flush()

    def metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write a scalar each."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)
        self.writer.flush()

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Write an image each."""
        for name, png in pictures.items():
            image = Image.open(io.BytesIO(png)).convert("RGB")
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(image.height, image.width, 3)
            self.writer.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")

    def close(self, exit_code: int) -> None:
        """Say that the run is over, if it went well, and close the file."""
        if exit_code == 0:
            self._add_summaries(self.end)
        self.writer.close()


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
