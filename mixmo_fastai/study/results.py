"""Results of a study: means and spreads over seeds, and differences with intervals.

Shapes: N test images, K classes, S seeds, R resamples.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mixmo_fastai.evaluation.results import final_metrics
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.bootstrap import percentile_interval, resampled_metrics
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.study.plan import PlannedRun, Study

COMPARED = ("accuracy", "nll")
"""Metrics whose differences have intervals."""


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

    The logits of the test images are computed once per run and stored in `FOLDER/logits`.

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
        samples: metrics (R,) in resamples of the test images, the same for all runs, by name.
    """

    run: PlannedRun
    recorded: dict[str, Any]
    metrics: dict[str, float]
    samples: dict[str, Tensor]

    @classmethod
    def read(cls, run: PlannedRun, folder: Path, data_dir: Path | None) -> "_FinishedRun":
        run_folder = run.folder(folder)
        recorded = run_folder.metrics()
        metrics = _values(recorded)
        stored = folder / "logits" / f"{run.name}.safetensors"
        logits, labels = _logits(run_folder, stored, metrics["accuracy"], data_dir)
        return cls(run, recorded, metrics, resampled_metrics(logits, labels))


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
        differences=differences,
    )


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


def _logits(
    run: RunFolder, path: Path, accuracy: float, data_dir: Path | None
) -> tuple[Tensor, Tensor]:
    """Read the ensemble's logits (N, K) and labels (N,) of a run, or compute and store them.

    Args:
        run: the run.
        path: where they are stored.
        accuracy: recorded accuracy of the run; other logits are those of a former run.
        data_dir: folder of the data, if not the one that training used.
    """
    try:
        stored = load_file(path)
        logits, labels = stored["logits"].double(), stored["labels"]
    except (OSError, SafetensorError, KeyError):
        pass
    else:
        correct = float((logits.argmax(dim=1) == labels).double().mean())
        if abs(correct - accuracy) < 1e-6:
            return logits, labels
    finished = open_finished(run, data_dir)
    ((logits, labels),) = finished.logits([finished.final_loader()])
    mean = logits.double().mean(dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"logits": mean.float(), "labels": labels}))
    return mean, labels
