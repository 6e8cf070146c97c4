"""Schedules as functions of progress, for fastai's ParamScheduler.

Progress is the completed fraction of training, in [0, 1). Source of the published schedule: the
published configurations of MixMo.
"""

import math
from collections.abc import Callable, Sequence

ScheduleFunction = Callable[[float], float]


def one_cycle(start: float, peak: float, end: float, pct_start: float) -> ScheduleFunction:
    """Return a schedule that rises from `start` to `peak` and decays to `end`, along cosines.

    Args:
        start: initial value.
        peak: value at `pct_start`.
        end: final value.
        pct_start: fraction of training during which the value rises.
    """

    def value(progress: float) -> float:
        if progress < pct_start:
            return _cosine(start, peak, progress / pct_start)
        return _cosine(peak, end, (progress - pct_start) / (1 - pct_start) if pct_start < 1 else 0)

    return value


def flat_cosine(lr: float, end: float, pct_flat: float) -> ScheduleFunction:
    """Return a schedule that is constant at `lr` and then decays to `end` along a cosine.

    Args:
        lr: constant rate.
        end: final rate.
        pct_flat: fraction of training with a constant rate.
    """

    def value(progress: float) -> float:
        if progress < pct_flat or pct_flat == 1:
            return lr
        return _cosine(lr, end, (progress - pct_flat) / (1 - pct_flat))

    return value


def published_steps(
    lr: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[float],
    gamma: float,
    warmup_steps: int,
) -> ScheduleFunction:
    """Return a schedule with linear warm-up and a step decay by gamma at each milestone.

    Args:
        lr: rate after the warm-up.
        epochs: number of epochs.
        steps_per_epoch: batches per epoch.
        milestones: fractions of training, each rounded to whole epochs.
        gamma: factor by which the rate is multiplied at each milestone.
        warmup_steps: S; the rate at step s of the warm-up is lr · (s + 1) / S.
    """
    total = epochs * steps_per_epoch
    milestone_steps = [round(fraction * epochs) * steps_per_epoch for fraction in milestones]

    def value(progress: float) -> float:
        # fastai accumulates progress in floating point, so the step is recovered by rounding.
        step = round(progress * total)
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        return lr * warmup * math.prod(gamma for start in milestone_steps if step >= start)

    return value


def _cosine(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * fraction)) / 2
