"""Schedules as functions of progress, in the form that fastai's ParamScheduler takes.

Progress is the share of training done, in [0, 1). Source of the published schedule: the published
configurations of MixMo.
"""

import math
from collections.abc import Callable, Sequence

ScheduleFunction = Callable[[float], float]


def one_cycle(start: float, peak: float, end: float, pct_start: float) -> ScheduleFunction:
    """Rise by a cosine from `start` to `peak`, then fall by one to `end`.

    Args:
        start: value at the beginning.
        peak: value after `pct_start` of training.
        end: value at the end.
        pct_start: share of training that rises.
    """

    def value(progress: float) -> float:
        if progress < pct_start:
            return _cosine(start, peak, progress / pct_start)
        return _cosine(peak, end, (progress - pct_start) / (1 - pct_start) if pct_start < 1 else 0)

    return value


def flat_cosine(lr: float, end: float, flat_share: float) -> ScheduleFunction:
    """Hold the rate, then let it fall by a cosine.

    Args:
        lr: the rate that is held.
        end: the rate at the end.
        flat_share: share of training that holds.
    """

    def value(progress: float) -> float:
        if progress < flat_share or flat_share == 1:
            return lr
        return _cosine(lr, end, (progress - flat_share) / (1 - flat_share))

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
    """Warm up linearly, then hold, multiplying by gamma after each milestone.

    Args:
        lr: the rate after the warm-up.
        epochs: length of training.
        steps_per_epoch: batches per epoch.
        milestones: shares of training, each rounded to a whole number of epochs.
        gamma: the factor.
        warmup_steps: S; step s of the warm-up trains with lr · (s + 1) / S.
    """
    total = epochs * steps_per_epoch
    drops = [round(share * epochs) * steps_per_epoch for share in milestones]

    def value(progress: float) -> float:
        # Progress is a sum of many small floats; the step it stands for is whole.
        step = round(progress * total)
        warmth = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        return lr * warmth * math.prod(gamma for drop in drops if step >= drop)

    return value


def _cosine(start: float, end: float, share: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * share)) / 2
