"""Compare settings of a training on a CPU by timing a few of its steps with each of them.

The steps run on a copy of the network, as those of `speed.py`, and alternate between the settings,
so that other work on the machine affects all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from mixmo_fastai.runtime.acceleration import Acceleration
from mixmo_fastai.training.prepare import Training
from mixmo_fastai.training.speed import (
    CPU_THREAD_FLOPS,
    LONG_WARMUP_SECONDS,
    StepTimer,
    assumed_rate,
    copy_for_timing,
    measure_on_copy,
    operations_per_image,
    planned_size,
    possible_size,
    time_steps,
)

MAX_FRACTION, MAX_SECONDS = 0.02, 60.0
"""Maximum duration of a comparison: fraction of the expected run, and seconds."""
ROUNDS, WARMUP_STEPS, MAX_STEPS = 3, 1, 4
"""Measurements of each setting; steps before each that are not timed; maximum number of timed
steps."""
LONG_WARMUP_FACTOR, LONG_WARMUP_MIN_SECONDS = 5.0, 0.5
"""A warm-up that takes longer than this many times its planned duration, and than these seconds, is
timed itself."""
OVERTIME, MIN_ROUNDS = 2.0, 2
"""Ratio of actual to planned duration from which no further round is started, and the number of
rounds before: a single one may be a coincidence."""


@dataclass(frozen=True)
class StepTimes:
    """Times of training steps with several settings.

    Attributes:
        rounds: seconds per step with each setting, for each round.
        images: inputs of the network in such a step, as in `Train.batch_size`; fewer than in
            training if a step is slow.
    """

    rounds: tuple[tuple[float, ...], ...]
    images: int

    @property
    def seconds(self) -> tuple[float, ...]:
        """Median of the rounds, for each setting."""
        return tuple(median(times) for times in zip(*self.rounds, strict=True))

    @property
    def mean_seconds(self) -> tuple[float, ...]:
        """Mean of the rounds, for each setting: also counts what is slow only at times."""
        return tuple(fmean(times) for times in zip(*self.rounds, strict=True))

    def median_ratio(self, first: int, second: int) -> float:
        """Return the median of `ratios`."""
        return median(self.ratios(first, second))

    def ratios(self, first: int, second: int) -> list[float]:
        """Return the time with one setting divided by that with another, for each round."""
        return [times[first] / times[second] for times in self.rounds]


def compare_settings(
    training: Training,
    settings: Sequence[Acceleration],
    *,
    run_seconds: float,
    rounds: int | None = None,
    announce: Callable[[], None] = lambda: None,
) -> StepTimes | None:
    """Time training steps with each setting.

    At least `MIN_ROUNDS` rounds are timed, and no further one after `OVERTIME` times the planned
    duration of all. On busy cores, steps may take far longer than planned; if a warm-up step does,
    it is the only step of its setting in that round.

    Args:
        training: the run; it is not changed.
        settings: the settings to compare; none of them compiled.
        run_seconds: expected duration of the run, of which `MAX_FRACTION` may be spent.
        rounds: maximum number of rounds; by default `ROUNDS`.
        announce: called before the first step, since this may take a minute.

    Returns:
        The times; None if no step fits into that time, or if the steps cannot be run.
    """
    rounds = ROUNDS if rounds is None else rounds
    seconds = min(MAX_FRACTION * run_seconds, MAX_SECONDS) / rounds
    size = _images_per_step(training, settings, seconds)
    if size is None:
        return None
    announce()
    times = measure_on_copy(training, lambda: _measure(training, settings, size, seconds, rounds))
    if times is None:
        return None
    return StepTimes(tuple(times), size * training.recipe.mix.batch_repetitions)


def expected_seconds(training: Training) -> float:
    """Return the duration of a run by its operations, in seconds; 0 if they cannot be counted.

    On busy cores, the run may take much longer.
    """
    operations = operations_per_image(training)
    return (operations or 0.0) * training.images_seen / assumed_rate(training)


def _images_per_step(
    training: Training, settings: Sequence[Acceleration], seconds: float
) -> int | None:
    """Return distinct images per step, so that a round takes `seconds`; None if none fits."""
    # Steps with fewer threads take longer; so the number of images follows from the sum.
    seconds_per_operation = sum(1 / (CPU_THREAD_FLOPS * (each.threads or 1)) for each in settings)
    planned = planned_size(training, seconds / (WARMUP_STEPS + 1), 1 / seconds_per_operation)
    if planned is None or (size := possible_size(training, planned)) > planned:
        return None
    return size


def _measure(
    training: Training, settings: Sequence[Acceleration], size: int, seconds: float, rounds: int
) -> list[tuple[float, ...]]:
    """Return the seconds per step with each setting, for each round of `seconds`."""
    learn = copy_for_timing(training, size)
    step_seconds = seconds / len(settings) / (WARMUP_STEPS + 1)
    limit = max(LONG_WARMUP_FACTOR * step_seconds, LONG_WARMUP_MIN_SECONDS)
    limit = min(limit, LONG_WARMUP_SECONDS)
    end, measured = time.perf_counter() + OVERTIME * rounds * seconds, []
    while len(measured) < rounds and (len(measured) < MIN_ROUNDS or time.perf_counter() <= end):
        times = (
            time_steps(learn, setting, StepTimer(WARMUP_STEPS, step_seconds, MAX_STEPS, limit))
            for setting in settings
        )
        measured.append(tuple(times))
    return measured
