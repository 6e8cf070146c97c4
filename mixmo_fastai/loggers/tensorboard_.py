"""TensorBoard logger: event files in RUN/logs/tensorboard."""

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mixmo_fastai.loggers.tracker import Step, TrackedRun

MAIN_METRICS = ("final/test/accuracy", "final/test/nll", "final/test/ece")
"""Metrics in TensorBoard's table of hyperparameters."""


class TensorBoardTracker:
    """Write event files; entries of steps that are repeated after a crash are purged."""

    def __init__(self, run: TrackedRun) -> None:
        folder = str(run.folder / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=run.steps_done)
        # `add_hparams` is not used: it needs final metrics, which an interrupted run does not have,
        # and creates a separate run.
        settings = {name: _to_scalar(value) for name, value in run.settings.items()}
        experiment, start, self.end = hparams(settings, dict.fromkeys(MAIN_METRICS, 0.0))
        self._add_summaries(experiment, start)
        self.writer.flush()

    def _add_summaries(self, *summaries: object) -> None:
        for summary in summaries:
            self.writer.file_writer.add_summary(summary)

    def log_steps(self, steps: Sequence[Step]) -> None:
        """Write three scalars per step."""
        for step in steps:
            for name in ("loss", "lr", "momentum"):
                self.writer.add_scalar(f"train/{name}", getattr(step, name), step.step)
        self.writer.flush()

    def log_metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write a scalar per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)
        self.writer.flush()

    def log_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Write an image per plot."""
        for name, png in images.items():
            image = Image.open(io.BytesIO(png)).convert("RGB")
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(image.height, image.width, 3)
            self.writer.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")

    def close(self, exit_code: int) -> None:
        """Mark a successful run as finished, and close the file."""
        if exit_code == 0:
            self._add_summaries(self.end)
        self.writer.close()


def _to_scalar(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
