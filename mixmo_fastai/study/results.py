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

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.results import final_metrics
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.bootstrap import resampled_metrics
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.study.plan import PlannedRun, Study

NUM_RESAMPLES, LEVEL = 1000, 0.95
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
    reference = reference or study.methods[0]
    if reference not in study.methods:
        raise InputError(f"There is no method {reference!r}.\nMethods: {', '.join(study.methods)}.")
    finished = [run for run in study.runs if RunFolder(folder / "runs" / run.name).is_finished]
    samples = {run.name: _resampled(run, folder, data_dir) for run in finished}
    cells = []
    for images_seen in sorted({run.images_seen for run in finished}):
        first = _runs_of(finished, reference, images_seen)
        for method in study.methods:
            if runs := _runs_of(finished, method, images_seen):
                differences = None
                if first and method != reference:
                    differences = _differences(first, runs, samples, folder)
                cells.append(_cell(runs, folder, differences))
    return cells


def _runs_of(runs: Sequence[PlannedRun], method: str, images_seen: int) -> list[PlannedRun]:
    return [run for run in runs if (run.method, run.images_seen) == (method, images_seen)]


def _cell(
    runs: Sequence[PlannedRun], folder: Path, differences: Mapping[str, Difference] | None
) -> Cell:
    found = [_metrics_of(run, folder) for run in runs]
    recorded = [RunFolder(folder / "runs" / run.name).metrics() for run in runs]
    names = [name for name in found[0] if all(name in metrics for metrics in found)]
    return Cell(
        method=runs[0].method,
        images_seen=runs[0].images_seen,
        seeds=tuple(run.seed for run in runs),
        metrics={name: tuple(metrics[name] for metrics in found) for name in names},
        parameters=recorded[0]["parameters"],
        hours=tuple(metrics["seconds"] / 3600 for metrics in recorded),
        images_trained=statistics.fmean(metrics["images_seen"] for metrics in recorded),
        differences=differences,
    )


def _metrics_of(run: PlannedRun, folder: Path) -> dict[str, float]:
    """Return the final metrics of a run, those after temperature scaling as `…_calibrated`."""
    metrics = RunFolder(folder / "runs" / run.name).metrics()
    _, final = final_metrics(metrics)
    values = {name: final[name] for name in ("accuracy", "nll", "ece") if name in final}
    scaled = metrics.get("cross_fitted") or {}
    values |= {f"{name}_calibrated": scaled[name] for name in ("nll", "ece") if name in scaled}
    return values


def _differences(
    first: Sequence[PlannedRun],
    second: Sequence[PlannedRun],
    samples: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
) -> dict[str, Difference]:
    """Compute the differences of two methods.

    Args:
        first: runs of the reference.
        second: runs of the other method.
        samples: metrics (R,) in the same resamples, by name of the run and metric.
        folder: folder of the study.
    """
    values = [[_metrics_of(run, folder) for run in group] for group in (first, second)]
    differences = {}
    for name in COMPARED:
        numbers = [[metrics[name] for metrics in group] for group in values]
        resampled = [
            torch.stack([samples[run.name][name] for run in group])  # (S, R)
            for group in (first, second)
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
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means[1] - means[0], torch.tensor([tail, 1 - tail]).double())
    return float(low), float(high)


def standard_error(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the standard error of a difference of two means; None with a single value."""
    if min(len(first), len(second)) < 2:
        return None
    variances = (statistics.variance(values) / len(values) for values in (first, second))
    error: float = sum(variances) ** 0.5
    return error


def _resampled(run: PlannedRun, folder: Path, data_dir: Path | None) -> dict[str, Tensor]:
    """Return the metrics of a run in R resamples of the test images, the same for all runs."""
    logits, labels = _logits(run, folder, data_dir)
    return resampled_metrics(logits, labels, num_resamples=NUM_RESAMPLES)


def _logits(run: PlannedRun, folder: Path, data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """Read the ensemble's logits (N, K) and labels (N,) of a run, or compute and store them."""
    path = folder / "logits" / f"{run.name}.safetensors"
    try:
        stored = load_file(path)
        logits, labels = stored["logits"].double(), stored["labels"]
    except (OSError, SafetensorError, KeyError):
        pass
    else:
        correct = float((logits.argmax(dim=1) == labels).double().mean())
        if abs(correct - _metrics_of(run, folder)["accuracy"]) < 1e-6:  # else of a former run
            return logits, labels
    finished = open_finished(RunFolder(folder / "runs" / run.name), data_dir)
    ((logits, labels),) = finished.logits([finished.final_loader()])
    mean = logits.double().mean(dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"logits": mean.float(), "labels": labels}))
    return mean, labels


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Convert cells to values for JSON."""
    return [
        {
            "method": cell.method,
            "images_seen": cell.images_seen,
            "seeds": list(cell.seeds),
            "parameters": cell.parameters,
            "images_trained": cell.images_trained,
            "hours": list(cell.hours),
            "metrics": {name: list(values) for name, values in cell.metrics.items()},
            "differences": None
            if cell.differences is None
            else {
                name: {
                    "value": each.value,
                    "interval": list(each.interval),
                    "standard_error": each.standard_error,
                }
                for name, each in cell.differences.items()
            },
        }
        for cell in cells
    ]
