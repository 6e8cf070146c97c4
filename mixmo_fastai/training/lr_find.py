"""Learning-rate range test: train with an increasing rate, then restore everything."""

import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median

import torch
from fastai.callback.schedule import minimum, slide, steep, valley

from mixmo_fastai.callbacks.freeze import FreezeCallback
from mixmo_fastai.config.defaults import MIN_LR_FIND_STEPS
from mixmo_fastai.errors import InputError, check_count
from mixmo_fastai.runtime.acceleration import Acceleration
from mixmo_fastai.training.prepare import Training

SUGGESTIONS = (valley, slide, steep, minimum)
MIN_DECREASE = 0.01
"""Fraction of the loss by which it must decrease for the test to recommend a rate."""
NOISE_MULTIPLE = 0.5
"""Number of standard deviations of a single step's loss by which the smoothed loss must decrease.

A test of 100 steps is smoothed over 25 to 80 of them, and the difference of two such averages has a
standard deviation of about a quarter of a single step's.
"""
SMOOTHING = 0.98
"""Decay of the exponential moving average in fastai's smoothed loss."""
NUM_ALWAYS_CUT = 5
"""Number of last points that fastai discards because the loss diverges there."""


@dataclass(frozen=True)
class LrSearch:
    """Result of a range test.

    Attributes:
        lrs: learning rate of each step.
        losses: smoothed training loss of each step, per member.
        suggestions: suggested rate by the name of fastai's method.
    """

    lrs: list[float]
    losses: list[float]
    suggestions: dict[str, float]

    @property
    def start(self) -> float:
        """Median of the smoothed loss in the first quarter, where rates are too small to train."""
        return median(self.losses[: self._quarter])

    @property
    def lowest(self) -> float:
        """Lowest smoothed loss after the first quarter."""
        return min(self.losses[self._quarter :])

    @property
    def noise(self) -> float:
        """Standard deviation of the loss of single steps in the first quarter.

        It is estimated from the median difference of consecutive steps, so that a single outlier
        does not count.
        """
        sums = [loss * (1 - SMOOTHING**count) for count, loss in enumerate(self.losses, 1)]
        steps = [
            now - SMOOTHING * last for last, now in pairwise([0.0, *sums][: self._quarter + 1])
        ]
        differences = [abs(b - a) / (1 - SMOOTHING) for a, b in pairwise(steps)]
        return median(differences) / (2**0.5 * NormalDist().inv_cdf(0.75)) if differences else 0.0

    @property
    def is_flat(self) -> bool:
        """Whether the loss decreases too little to recommend a rate.

        The curve is flat if the smoothed loss decreases by less than `NOISE_MULTIPLE` times
        `noise`, or by less than `MIN_DECREASE` of its start.
        """
        min_decrease = max(NOISE_MULTIPLE * self.noise, MIN_DECREASE * self.start)
        return self.start - self.lowest < min_decrease

    @property
    def recommended(self) -> float | None:
        """The rate to train with, two digits; None if the curve is flat or no rate stands out.

        It is fastai's `slide`, the end of the steepest stretch before the loss rises, and at most
        the rate with the lowest loss; `valley` if `slide` is below it. As the peak of one-cycle,
        larger rates work better than the cautious `valley`.
        """
        if self.is_flat:
            return None
        # `slide` compares points that are 15 steps apart; with few steps it ends too early.
        too_small = self.lrs[self._quarter - 1]
        rate = max(self.suggestions["slide"], self.suggestions["valley"])
        if rate <= too_small:
            return None
        rate_of_lowest = self.lrs[self.losses.index(self.lowest, self._quarter)]
        return float(f"{min(rate, rate_of_lowest):.1e}")

    @property
    def _quarter(self) -> int:
        return max(1, len(self.losses) // 4)


def search_lr(
    training: Training, *, num_steps: int = 100, start: float = 1e-6, end: float = 10.0
) -> LrSearch:
    """Increase the learning rate step by step and record the loss.

    Weights and optimizer are restored afterwards; later draws do not depend on earlier ones. With
    the schedule "fine-tune", the heads alone are trained, as in its first part, whose peak is the
    recipe's rate.

    Args:
        training: from `prepare`.
        num_steps: steps of the test, `MIN_LR_FIND_STEPS` or more; it stops early if the loss
            diverges.
        start: first learning rate, above 0.
        end: last learning rate, above `start`.

    Raises:
        InputError: an argument is out of range, or the loss diverged within the first steps.
    """
    check_count("num_steps", num_steps, MIN_LR_FIND_STEPS)
    if not 0 < start < end:
        raise InputError(
            f"The first learning rate must be above 0 and below the last; got {start} and {end}."
        )
    learn = training.learn
    original_path, learn.path = learn.path, Path()
    with tempfile.TemporaryDirectory() as folder:  # fastai saves the weights to a file
        learn.path = Path(folder)
        try:
            with (
                _acceleration(training).applied(learn.model),
                learn.added_cbs(_freezing(training)),
            ):
                suggestions = learn.lr_find(
                    start_lr=start,
                    end_lr=end,
                    num_it=num_steps,
                    show_plot=False,
                    suggest_funcs=SUGGESTIONS,
                )
        except IndexError as error:  # fastai's methods found too few points
            raise InputError(
                f"The loss diverged within the first steps from {start:g}.\n"
                f"Start lower, e.g. --start {start / 100:g}, or take more --steps."
            ) from error
        finally:
            learn.path = original_path
    losses = torch.stack([torch.as_tensor(v) for v in learn.recorder.losses]).flatten().cpu()
    num_finite = int(losses.isfinite().cumprod(0).sum())  # up to where the loss diverged
    return LrSearch(
        lrs=[float(rate) for rate in learn.recorder.lrs[:num_finite]],
        losses=losses[:num_finite].tolist(),
        suggestions={name: float(rate) for name, rate in suggestions._asdict().items()},
    )


def _freezing(training: Training) -> list[FreezeCallback]:
    schedule = training.recipe.schedule
    is_frozen = schedule.kind == "fine-tune" and schedule.frozen_share > 0
    return [FreezeCallback(sys.maxsize)] if is_frozen else []


def _acceleration(training: Training) -> Acceleration:
    """Return the training's acceleration; compile only under compile=on, as the test is short."""
    compiled = training.recipe.train.compile == "on"
    return replace(training.acceleration, compiled=compiled)
