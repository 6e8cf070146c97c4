"""What the results of a study need of each test image, stored in one small file per run.

Shapes: N test images, K classes.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixmo_fastai.data.fingerprint import fingerprint_of
from mixmo_fastai.evaluation.results import final_metrics
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.labels import check_one_label
from mixmo_fastai.study.records import writing_study

TOLERANCE = 1e-4
"""Largest relative difference of the accuracy and the NLL from those that the run recorded."""
_IMAGES = "images"  # key of the fingerprint in the file


@dataclass(frozen=True)
class Predictions:
    """Predictions for the test images, in 9 bytes per image, or 11 with many classes.

    Attributes:
        labels: (N,) int16, or int32 if there are more classes.
        correct: (N,) bool, whether the predicted class is the label.
        confidence: (N,) float16, largest probability.
        nll: (N,) float32, negative log-likelihood of the label in nats.
        images: fingerprint of the images; "" if unknown, as in files of former versions.
    """

    labels: Tensor
    correct: Tensor
    confidence: Tensor
    nll: Tensor
    images: str = ""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, images: str = "") -> "Predictions":
        """Return the predictions of logits (N, K) for labels (N,)."""
        confidence, classes = logits.softmax(dim=1).max(dim=1)
        nll = cross_entropy(logits, labels, reduction="none")
        kind = torch.int16 if logits.shape[1] <= 2**15 else torch.int32
        return cls(labels.to(kind), classes == labels, confidence.half(), nll.float(), images)

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Read the file of `to_bytes`.

        Raises:
            OSError: it cannot be read.
            SafetensorError: it is damaged.
            TypeError: it contains other tensors.
        """
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**tensors, images=(file.metadata() or {}).get(_IMAGES, ""))

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        content: bytes = save(tensors, {_IMAGES: self.images})
        return content

    def terms(self) -> dict[str, Tensor]:
        """Return the values of each image whose means are accuracy and NLL: (N,) by name."""
        return {"accuracy": self.correct, "nll": self.nll}

    def agree_with(self, metrics: Mapping[str, Any]) -> bool:
        """Check whether accuracy and NLL are those of a metrics.json, and not of a former run."""
        means = {name: float(values.double().mean()) for name, values in self.terms().items()}
        return all(
            abs(mean - metrics[name]) <= TOLERANCE * (1 + abs(metrics[name]))
            for name, mean in means.items()
        )


def read_predictions(run: RunFolder, path: Path, data_dir: Path | None) -> Predictions:
    """Read the predictions of a finished run, or compute and store them.

    Args:
        run: the run.
        path: where they are stored.
        data_dir: folder of the data, if not the one that training used.

    Raises:
        InputError: they are not stored, and the weights or the data are missing.
        RunFailedError: they cannot be written.
    """
    check_one_label(run, "mixmo study")
    _, metrics = final_metrics(run.metrics())
    with suppress(OSError, SafetensorError, TypeError):
        stored = Predictions.read(path)
        if stored.agree_with(metrics):
            return stored
    finished = open_finished(run, data_dir)
    ((logits, labels),) = finished.logits([finished.final_loader()])
    images = fingerprint_of(finished.final_images)
    predictions = Predictions.of(logits.double().mean(dim=1), labels, images)
    with writing_study(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, predictions.to_bytes(), is_shared=True)
    return predictions


def have_equal_images(first: Predictions, second: Predictions) -> bool:
    """Check that two runs were evaluated on the same images in the same order.

    Images are compared by names, sizes and labels, or by labels alone if more is not known.
    """
    are_known = first.images and second.images
    same = first.images == second.images if are_known else True
    return same and torch.equal(first.labels, second.labels)
