"""Trackers whose entries are rows: a step with named values."""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mixmo_fastai.loggers.progress import Progress
from mixmo_fastai.loggers.tracker import Step


class RowTracker(ABC):
    """Log rows to a service, and none twice.

    Attributes:
        progress: the last logged step of each kind.
    """

    progress: Progress

    @abstractmethod
    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row."""

    @abstractmethod
    def picture(self, image: Image.Image) -> Any:
        """Return an image as a value of a row."""

    def log_steps(self, steps: Sequence[Step]) -> None:
        """Log loss, learning rate and momentum of each step."""
        for step in steps:
            values = {f"train/{name}": getattr(step, name) for name in ("loss", "lr", "momentum")}
            self._log("train", step.step, values)
        self.progress.save()

    def log_metrics(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics; services show the latest of each."""
        self._log(kind, step, {f"{kind}/{name}": value for name, value in metrics.items()})
        self.progress.save()

    def log_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Log plots."""
        values = {
            f"pictures/{name}": self.picture(Image.open(io.BytesIO(png)))
            for name, png in images.items()
        }
        self._log("pictures", step, values)
        self.progress.save()

    def _log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self.progress.advance(kind, step):
            self.write(step, values)
