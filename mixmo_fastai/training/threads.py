"""Choose the number of threads of a training on a CPU by timing training steps.

The threads of a step wait for one another several hundred times. If other programs keep some of
the cores busy, the operating system takes a core from one thread for a few milliseconds, and all
others wait; then fewer threads are faster. How busy the cores are is not asked, but measured.

Results depend on the number of threads, up to rounding: torch sums the statistics of BatchNorm and
the gradients of the weights of convolutions by thread. So a run keeps its number when it is
resumed, unless fewer CPUs are available or it has become much slower than another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.runtime.acceleration import Acceleration, thread_limit
from mixmo_fastai.runtime.cpus import CpuLimit
from mixmo_fastai.runtime.processes import run_on_rank0
from mixmo_fastai.training.prepare import Training
from mixmo_fastai.training.speed import (
    StepTimer,
    assumed_rate,
    copy_for_timing,
    measure_on_copy,
    planned_size,
    possible_size,
    time_steps,
)
from mixmo_fastai.training.trials import StepTimes, compare_settings, expected_seconds

MIN_RUN_SECONDS = 20.0
"""Duration of a run below which numbers are not compared, and all threads are used: by its
operations and, from `MIN_PROBED_STEPS` on, by a few timed steps too."""
MIN_PROBED_STEPS, PROBE_SECONDS = 20, 0.3
"""Length of a shorter run from which a few steps check its duration, and duration of these steps:
on busy cores, a step of a tiny network was measured to take more than a second."""
ROUNDS = 5
"""Measurements of each number."""
MIN_RATIO = 1.1
"""Ratio of the speeds from which a larger number is preferred. On busy cores, a step with several
threads takes 2 to 50 times as long at some times and not at others, so the means are compared, and
what is lost by too few threads on idle cores is less than what is lost by too many on busy ones."""
MIN_RATIO_ON_RESUME = 1.25
"""Ratio of the speeds, in every round, from which a resumed run changes its number of threads."""


@dataclass(frozen=True)
class ThreadChoice:
    """A number of threads, and why it was chosen.

    Attributes:
        threads: the number, for each process.
        available: the largest number that was considered.
        limit: why not more; see `CpuLimit.reason`.
        step_seconds: seconds per training step by number of threads; empty if not measured.
        compared: the number that `ratio` compares with; None if not measured.
        ratio: the time of a step with that number divided by the time with `threads`.
        before: number of a resumed run before; None for a new run.
    """

    threads: int
    available: int
    limit: str
    step_seconds: Mapping[int, float]
    compared: int | None = None
    ratio: float | None = None
    before: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of environment.json."""
        return {
            "threads": self.threads,
            "available": self.available,
            "limit": self.limit,
            "step_seconds": {str(number): time for number, time in self.step_seconds.items()},
        }


def choose_threads(
    training: Training, fraction: float = 1.0, announce: Callable[[], None] = lambda: None
) -> tuple[Training, ThreadChoice | None]:
    """Replace threads "auto" of a training on a CPU by the fastest number.

    In several processes, rank 0 measures and decides; each process uses this number. The choice is
    part of the recipe of the returned training, so that a resumed run keeps it. All available
    threads are chosen in runs that are expected to take less than `MIN_RUN_SECONDS`, and if steps
    cannot be timed: they are too slow for the time of a comparison, their operations cannot be
    counted, or they fail.

    Args:
        training: a new run.
        fraction: fraction of it that will be trained, for a learning-rate search.
        announce: called before the numbers are compared.

    Returns:
        The training and the choice; the same training and None on other devices, and for a given
        number.
    """
    recipe = training.recipe
    if training.device.type != "cpu" or recipe.train.threads != "auto":
        return training, None
    choice = run_on_rank0(lambda: _choose(training, fraction, announce))
    train = replace(recipe.train, threads=choice.threads)
    return replace(training, recipe=replace(recipe, train=train)), choice


def reduced_threads(recipe: Recipe, environment: Mapping[str, Any]) -> int | None:
    """Return the available number of threads if a run was given more of them automatically.

    Args:
        recipe: recipe of the run.
        environment: the run's environment.json.

    Returns:
        The number; None if the run can keep its own, or if a user has set that.
    """
    before, available = _chosen_before(recipe, environment), thread_limit().count
    return available if before is not None and before > available else None


def keep_threads(
    training: Training,
    environment: Mapping[str, Any],
    fraction: float = 1.0,
    announce: Callable[[], None] = lambda: None,
) -> tuple[Training, ThreadChoice | None]:
    """Check whether a resumed run can keep the number of threads that was chosen for it.

    The recipe does not change, so a run that is resumed again returns to its first number.

    Args:
        training: the resumed run.
        environment: the run's environment.json.
        fraction: fraction of the run that is not trained yet.
        announce: called before numbers are compared.

    Returns:
        The training and the new choice; None instead of the choice if the run keeps its number, or
        if that was not chosen automatically.
    """
    before = _chosen_before(training.recipe, environment)
    if before is None or training.device.type != "cpu":
        return training, None
    choice = run_on_rank0(lambda: _choose_again(training, before, fraction, announce))
    return replace(training, threads=None if choice is None else choice.threads), choice


def _chosen_before(recipe: Recipe, environment: Mapping[str, Any]) -> int | None:
    """Return the number of threads in a recipe if `choose_threads` has set it."""
    stored, number = environment.get("chosen_threads"), recipe.train.threads
    is_chosen = isinstance(stored, dict) and stored.get("threads") == number
    return number if is_chosen and isinstance(number, int) else None


def candidates(available: int) -> list[int]:
    """Return the numbers of threads to compare: one, half of them, and all.

    >>> candidates(6)
    [1, 3, 6]
    >>> candidates(2)
    [1, 2]
    """
    return sorted({1, max(1, available // 2), available})


def _choose(training: Training, fraction: float, announce: Callable[[], None]) -> ThreadChoice:
    limit = thread_limit()
    numbers = candidates(limit.count)
    times = _compare(training, numbers, fraction, announce)
    if times is None:
        return ThreadChoice(limit.count, *limit, {})
    best = 0
    for index, seconds in enumerate(times.mean_seconds):
        if times.mean_seconds[best] >= MIN_RATIO * seconds:
            best = index
    return _measured(numbers, times, best, limit)


def _choose_again(
    training: Training, before: int, fraction: float, announce: Callable[[], None]
) -> ThreadChoice | None:
    """Return a new choice for a resumed run; None if it keeps its number."""
    limit = thread_limit()
    first = min(before, limit.count)
    numbers = sorted({first, *candidates(limit.count)})
    times = _compare(training, numbers, fraction, announce)
    kept = best = numbers.index(first)
    if times is not None:
        best = min(range(len(numbers)), key=times.mean_seconds.__getitem__)
        if min(times.ratios(kept, best)) < MIN_RATIO_ON_RESUME:
            best = kept
    if numbers[best] == before:
        return None
    if times is None:
        return ThreadChoice(first, *limit, {}, before=before)
    other = None if best == kept else kept
    return replace(_measured(numbers, times, best, limit, other), before=before)


def _compare(
    training: Training, numbers: list[int], fraction: float, announce: Callable[[], None]
) -> StepTimes | None:
    """Time training steps with each number of threads; None for a single one, and short runs."""
    if len(numbers) == 1:
        return None
    plain = replace(training.acceleration, compiled=False)
    seconds, images = fraction * expected_seconds(training), fraction * training.images_seen
    if seconds < MIN_RUN_SECONDS:
        num_steps = round(images / training.recipe.train.batch_size)
        if not seconds or num_steps < MIN_PROBED_STEPS or not _is_slow(training, plain, images):
            return None
        seconds = MIN_RUN_SECONDS
    settings = [replace(plain, threads=number) for number in numbers]
    return compare_settings(
        training, settings, run_seconds=seconds, rounds=ROUNDS, announce=announce
    )


def _is_slow(training: Training, settings: Acceleration, images: float) -> bool:
    """Check by a few timed steps whether a run will take `MIN_RUN_SECONDS` all the same.

    Args:
        training: the run.
        settings: those of the timed steps.
        images: number of images that the run will see.
    """
    planned = planned_size(training, PROBE_SECONDS / 4, assumed_rate(training))
    size = possible_size(training, planned or 0)
    inputs = size * training.recipe.mix.batch_repetitions
    timer = StepTimer(1, PROBE_SECONDS, long_warmup=PROBE_SECONDS)
    seconds = measure_on_copy(
        training, lambda: time_steps(copy_for_timing(training, size), settings, timer)
    )
    return seconds is not None and images / inputs * seconds >= MIN_RUN_SECONDS


def _measured(
    numbers: list[int], times: StepTimes, best: int, limit: CpuLimit, other: int | None = None
) -> ThreadChoice:
    """Build a measured choice, compared with `other`, by default the fastest of the others."""
    means = times.mean_seconds
    if other is None:
        others = (index for index in range(len(numbers)) if index != best)
        other = min(others, key=means.__getitem__)
    return ThreadChoice(
        numbers[best],
        *limit,
        dict(zip(numbers, means, strict=True)),
        compared=numbers[other],
        ratio=means[other] / means[best],
    )
