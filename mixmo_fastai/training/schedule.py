"""Schedules as functions of progress, for fastai's ParamScheduler.

Progress is the completed fraction of training, in [0, 1). Source of the published schedule: the
published configurations of MixMo.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

ScheduleFunction = Callable[[float], float]

FROZEN_PCT_START, FROZEN_DIV = 0.99, 25.0
"""One-cycle of the frozen part of fastai's `fine_tune`."""


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


def fine_tune(
    lr: float,
    *,
    num_steps: int,
    frozen_steps: int,
    body_div: float,
    pct_start: float,
    div: float,
    div_final: float,
    momentums: tuple[float, ...],
) -> dict[str, Callable[[float], Any]]:
    """Return the schedules of fastai's `fine_tune`: one-cycle for the heads, then for all layers.

    In the second part, the heads have half the rate of the first, and the body the rate of the
    heads divided by `body_div`. In the first part, the body's rate, a tenth, is that of its
    BatchNorm layers, which are not frozen.

    Args:
        lr: peak of the heads' rate in the first part.
        num_steps: steps of the whole training.
        frozen_steps: steps of the first part.
        body_div: rate of the heads divided by that of the body.
        pct_start: second part: fraction during which the rates rise.
        div: second part: peak divided by the initial rate.
        div_final: both parts: peak divided by the final rate.
        momentums: both parts: at start, peak and end.

    Returns:
        "lr": the rates of body and heads; "mom": the momentum.
    """
    start, peak, end = momentums
    first = (
        one_cycle(1 / FROZEN_DIV, 1.0, 1 / div_final, FROZEN_PCT_START),
        one_cycle(start, peak, end, FROZEN_PCT_START),
        (lr / 10, lr),
    )
    second = (
        one_cycle(1 / div, 1.0, 1 / div_final, pct_start),
        one_cycle(start, peak, end, pct_start),
        (lr / 2 / body_div, lr / 2),
    )

    def part(progress: float) -> tuple[tuple[Any, ...], float]:
        # fastai accumulates progress in floating point, so the step is recovered by rounding.
        step = round(progress * num_steps)
        if step < frozen_steps:
            return first, step / frozen_steps
        return second, (step - frozen_steps) / (num_steps - frozen_steps)

    def rates(progress: float) -> list[float]:
        (factor, _, peaks), within = part(progress)
        return [factor(within) * rate for rate in peaks]

    def momentum(progress: float) -> float:
        (_, values, _), within = part(progress)
        value: float = values(within)
        return value

    return {"lr": rates, "mom": momentum}


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
