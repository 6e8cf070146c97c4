"""Differences between two methods, with intervals over test images and over seeds.

Shapes: S seeds, R resamples of the test images.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

from mixmo_fastai.metrics.bootstrap import LEVEL, percentile_interval
from mixmo_fastai.rng import make_generator

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Difference of two methods in a metric: of the means over their seeds.

    Attributes:
        value: the method minus the reference.
        interval: 95 % bootstrap interval, which resamples test images and seeds.
        standard_error: standard error from the spread over seeds alone; None with a single seed.
        seeds_interval: 95 % interval from the seeds alone, by Welch's t distribution; None with a
            single seed, or if no method varies over its seeds.
    """

    value: float
    interval: Interval
    standard_error: float | None
    seeds_interval: Interval | None


def difference(
    first: Sequence[float], second: Sequence[float], samples: tuple[Tensor, Tensor]
) -> Difference:
    """Compute the difference of two methods.

    Args:
        first: metric of each seed of the reference.
        second: metric of each seed of the other method.
        samples: the same metric in resamples of the test images, (S, R) and (S', R).
    """
    value = statistics.fmean(second) - statistics.fmean(first)
    error = standard_error(first, second)
    seeds = _seeds_interval(value, error, first, second) if error else None
    return Difference(value, bootstrap_interval(*samples), error, seeds)


def bootstrap_interval(first: Tensor, second: Tensor) -> Interval:
    """Compute the percentile interval of a difference of means over seeds.

    In each resample, the seeds of each method are drawn with replacement as well.

    Args:
        first: (S, R), a metric of each seed in R resamples of the test images.
        second: (S', R), of the other method, in the same resamples.
    """
    generator = make_generator(0, "bootstrap seeds")
    means = []
    for values in (first, second):
        seeds = torch.randint(len(values), values.shape, generator=generator)
        means.append(values.gather(0, seeds).mean(dim=0))
    return percentile_interval(means[1] - means[0])


def standard_error(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the standard error of a difference of two means; None with a single value."""
    if min(len(first), len(second)) < 2:
        return None
    error: float = sum(_variances_of_means(first, second)) ** 0.5
    return error


def _seeds_interval(
    value: float, error: float, first: Sequence[float], second: Sequence[float]
) -> Interval:
    parts = _variances_of_means(first, second)
    sizes = (len(first), len(second))
    freedom = sum(parts) ** 2 / sum(
        part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True)
    )
    half_width = float(student.ppf((1 + LEVEL) / 2, freedom)) * error
    return value - half_width, value + half_width


def _variances_of_means(*groups: Sequence[float]) -> list[float]:
    return [statistics.variance(values) / len(values) for values in groups]
