"""Results of a study: means and spreads over seeds, and differences with intervals.

Shapes: R resamples of the test images.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.results import final_metrics
from mixmo_fastai.metrics.bootstrap import resampled_means
from mixmo_fastai.metrics.calibration import bins_of_predictions
from mixmo_fastai.study.differences import Difference, difference
from mixmo_fastai.study.plan import PlannedRun, Study
from mixmo_fastai.study.predictions import Predictions, have_equal_images, read_predictions
from mixmo_fastai.study.records import check_unchanged

COMPARED = ("accuracy", "nll")
"""Metrics whose differences have intervals."""


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
        images_planned: images that they were to see, before rounding to epochs; with the budget
            "each", more than `images_seen`.
        split: "test", or "valid" if there are no labelled test images.
        reliability: predictions of all seeds in bins of confidence; empty bins are left out.
        differences: from the reference at this length, by metric; None for the reference itself or
            if it is not trained.
    """

    method: str
    images_seen: int
    seeds: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...]]
    parameters: int
    hours: tuple[float, ...]
    images_trained: float
    images_planned: int
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
        InputError: the reference is unknown, a run was trained with other settings than those of
            the study, two runs have other test images, or the data of the runs is missing.
    """
    reference = study.check_method(reference)
    check_unchanged(study.runs, folder)
    finished = [
        _FinishedRun.read(run, folder, data_dir)
        for run in study.runs
        if run.folder(folder).is_finished
    ]
    if finished:
        _check_equal_images(finished)
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
        predictions = read_predictions(run_folder, path, data_dir)
        samples = resampled_means(predictions.terms())
        return cls(run, recorded, metrics, samples, predictions)


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
        images_planned=first.run.recipe.train.images_seen or first.run.images_seen,
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
    return {
        name: difference(
            [each.metrics[name] for each in first],
            [each.metrics[name] for each in second],
            (_stacked(first, name), _stacked(second, name)),
        )
        for name in COMPARED
    }


def _stacked(runs: Sequence[_FinishedRun], name: str) -> Tensor:
    return torch.stack([each.samples[name] for each in runs])


def _check_equal_images(finished: Sequence[_FinishedRun]) -> None:
    known = (each for each in finished if each.predictions.images)
    first = next(known, None) or finished[0]
    for each in finished:
        if not have_equal_images(first.predictions, each.predictions):
            raise InputError(
                f"{each.run.name} was evaluated on other images than {first.run.name}, so "
                "their results are not comparable.\nTrain both with the same data and splits."
            )
