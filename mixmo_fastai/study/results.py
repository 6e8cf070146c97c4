"""Results of a study: means and spreads over seeds, and differences with intervals.

Shapes: N test images, K classes, S seeds, R resamples.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixmo_fastai.evaluation.results import final_metrics
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.bootstrap import percentile_interval, resampled_means
from mixmo_fastai.metrics.calibration import bins_of_predictions
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.study.plan import PlannedRun, Study

COMPARED = ("accuracy", "nll")
"""Metrics whose differences have intervals."""


@dataclass(frozen=True)
class Predictions:
    """What the results of a study need of each test image, in 7 bytes per image.

    Attributes:
        correct: (N,) bool, whether the class is correct.
        confidence: (N,) float16, largest probability.
        nll: (N,) float32, negative log-likelihood of the label in nats.
    """

    correct: Tensor
    confidence: Tensor
    nll: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Predictions":
        """Return the predictions of logits (N, K) for labels (N,)."""
        confidence, classes = logits.softmax(dim=1).max(dim=1)
        nll = cross_entropy(logits, labels, reduction="none")
        return cls(classes == labels, confidence.half(), nll.float())


class Bin(NamedTuple):
    """Predictions of similar confidence.

    Attributes:
        confidence: their mean confidence.
        accuracy: fraction of them that is correct.
        images: their number.
    """

    confidence: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Difference:
    """Difference of two methods in a metric: of the means over their seeds.

    Attributes:
        value: second minus first.
        interval: 95 % bootstrap interval, which resamples test images and seeds.
        standard_error: standard error from the spread over seeds alone; None with a single seed.
    """

    value: float
    interval: tuple[float, float]
    standard_error: float | None


@dataclass(frozen=True)
class Cell:
    """One method at one training length.

    Attributes:
        method: name of the method.
        images_seen: length in the table of the study.
        seeds: seeds of the finished runs.
        metrics: values over the seeds by metric: accuracy, nll, ece, nll_calibrated and
            ece_calibrated (cross-fitted), as far as they are defined.
        parameters: number of parameters of all networks.
        hours: duration of training, over the seeds.
        images_trained: images that all networks saw, mean over the seeds.
        split: "test", or "valid" if there are no labelled test images.
        reliability: predictions of all seeds in bins of confidence; empty bins are left out.
        differences: from the first method of the study at this length; None for it itself or if it
            is not trained.
    """

    method: str
    images_seen: int
    seeds: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...]]
    parameters: int
    hours: tuple[float, ...]
    images_trained: float
    split: str
    reliability: tuple[Bin, ...]
    differences: Mapping[str, Difference] | None

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the seeds."""
        return statistics.fmean(self.metrics[name])

    def spread(self, name: str) -> float | None:
        """Return the standard deviation of a metric over the seeds; None for a single seed."""
        values = self.metrics[name]
        return statistics.stdev(values) if len(values) > 1 else None


def collect_results(
    study: Study, folder: Path, data_dir: Path | None = None, *, reference: str | None = None
) -> list[Cell]:
    """Collect the results of all finished runs of a study.

    What the results need of each test image is computed once per run and stored in
    `FOLDER/predictions`, after which neither the weights of the run nor the images are needed.

    Args:
        study: the study.
        folder: its folder.
        data_dir: folder of the data, if not the one that training used.
        reference: method from which differences are taken; the first one by default.

    Raises:
        InputError: the reference is unknown, or the data of the runs is missing.
    """
    reference = study.check_method(reference)
    finished = [
        _FinishedRun.read(run, folder, data_dir)
        for run in study.runs
        if run.folder(folder).is_finished
    ]
    cells = []
    for images_seen in sorted({each.run.images_seen for each in finished}):
        first = _runs_of(finished, reference, images_seen)
        for method in study.methods:
            if runs := _runs_of(finished, method, images_seen):
                differs = first and method != reference
                cells.append(_cell(runs, _differences(first, runs) if differs else None))
    return cells


@dataclass(frozen=True)
class _FinishedRun:
    """A finished run of a study, with what its cell needs.

    Attributes:
        run: the planned run.
        recorded: content of its metrics.json.
        metrics: its final metrics, those after temperature scaling as `…_calibrated`.
        samples: accuracy and NLL (R,) in resamples of the test images, the same for all runs.
        predictions: of the test images.
    """

    run: PlannedRun
    recorded: dict[str, Any]
    metrics: dict[str, float]
    samples: dict[str, Tensor]
    predictions: Predictions

    @classmethod
    def read(cls, run: PlannedRun, folder: Path, data_dir: Path | None) -> "_FinishedRun":
        run_folder = run.folder(folder)
        recorded = run_folder.metrics()
        metrics = _values(recorded)
        path = folder / "predictions" / f"{run.name}.safetensors"
        predictions = _predictions(run_folder, path, metrics["accuracy"], data_dir)
        terms = {"accuracy": predictions.correct, "nll": predictions.nll}
        return cls(run, recorded, metrics, resampled_means(terms), predictions)


def _runs_of(finished: Sequence[_FinishedRun], method: str, images_seen: int) -> list[_FinishedRun]:
    return [
        each
        for each in finished
        if (each.run.method, each.run.images_seen) == (method, images_seen)
    ]


def _cell(runs: Sequence[_FinishedRun], differences: Mapping[str, Difference] | None) -> Cell:
    first = runs[0]
    names = [name for name in first.metrics if all(name in each.metrics for each in runs)]
    return Cell(
        method=first.run.method,
        images_seen=first.run.images_seen,
        seeds=tuple(each.run.seed for each in runs),
        metrics={name: tuple(each.metrics[name] for each in runs) for name in names},
        parameters=first.recorded["parameters"],
        hours=tuple(each.recorded["seconds"] / 3600 for each in runs),
        images_trained=statistics.fmean(each.recorded["images_seen"] for each in runs),
        split=final_metrics(first.recorded)[0],
        reliability=_reliability([each.predictions for each in runs]),
        differences=differences,
    )


def _reliability(predictions: Sequence[Predictions]) -> tuple[Bin, ...]:
    bins = bins_of_predictions(
        torch.cat([each.confidence for each in predictions]),
        torch.cat([each.correct for each in predictions]),
    )
    columns = (bins.confidence.tolist(), bins.accuracy.tolist(), bins.counts.tolist())
    return tuple(Bin(*each) for each in zip(*columns, strict=True) if each[2])


def _values(recorded: Mapping[str, Any]) -> dict[str, float]:
    """Return the final metrics of a metrics.json, see `_FinishedRun.metrics`."""
    _, final = final_metrics(recorded)
    values = {name: final[name] for name in ("accuracy", "nll", "ece") if name in final}
    scaled = recorded.get("cross_fitted") or {}
    values |= {f"{name}_calibrated": scaled[name] for name in ("nll", "ece") if name in scaled}
    return values


def _differences(
    first: Sequence[_FinishedRun], second: Sequence[_FinishedRun]
) -> dict[str, Difference]:
    """Compute the differences of two methods, second minus first."""
    differences = {}
    for name in COMPARED:
        numbers = [[each.metrics[name] for each in group] for group in (first, second)]
        resampled = [
            torch.stack([each.samples[name] for each in group]) for group in (first, second)
        ]
        differences[name] = Difference(
            statistics.fmean(numbers[1]) - statistics.fmean(numbers[0]),
            seed_interval(*resampled),
            standard_error(*numbers),
        )
    return differences


def seed_interval(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Compute the percentile interval of a difference of means over seeds.

    Args:
        first: (S, R), a metric of each seed in R resamples of the test images.
        second: (S', R), of the other method, in the same resamples.

    In each resample, the seeds of each method are drawn with replacement as well.
    """
    generator = make_generator(0, "bootstrap")
    means = []
    for values in (first, second):
        seeds = torch.randint(len(values), values.shape, generator=generator)
        means.append(values.gather(0, seeds).mean(dim=0))
    return percentile_interval(means[1] - means[0])


def standard_error(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the standard error of a difference of two means; None with a single value."""
    if min(len(first), len(second)) < 2:
        return None
    variances = (statistics.variance(values) / len(values) for values in (first, second))
    error: float = sum(variances) ** 0.5
    return error


def _predictions(run: RunFolder, path: Path, accuracy: float, data_dir: Path | None) -> Predictions:
    """Read the predictions of a run, or compute and store them.

    Args:
        run: the run.
        path: where they are stored.
        accuracy: recorded accuracy of the run; other predictions are those of a former run.
        data_dir: folder of the data, if not the one that training used.
    """
    with suppress(OSError, SafetensorError, KeyError):
        stored = Predictions(**load_file(path))
        if abs(float(stored.correct.double().mean()) - accuracy) < 1e-6:
            return stored
    finished = open_finished(run, data_dir)
    ((logits, labels),) = finished.logits([finished.final_loader()])
    predictions = Predictions.of(logits.double().mean(dim=1), labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(vars(predictions)))
    return predictions
