"""Choose between float32 and bfloat16 on a CPU by timing training steps in both.

CPUs with AVX512-BF16 or AMX train convolutions in bfloat16 almost twice as fast as in float32; on
others it is slower. Which one a CPU is, and whether a network is large enough to profit, is
measured: the steps run on a copy of the network, as those of `speed.py`, and alternate between the
precisions, so that other work on the machine affects both.
"""

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from mixmo_fastai.runtime.devices import cpu_name
from mixmo_fastai.runtime.processes import run_on_rank0
from mixmo_fastai.training.prepare import Training
from mixmo_fastai.training.speed import (
    StepTimer,
    assumed_rate,
    copy_for_timing,
    measure_on_copy,
    smallest_size,
    time_steps,
    training_operations,
)

MIN_RUN_SECONDS = 60.0
"""Expected duration of a run below which nothing is measured, and float32 is used."""
MAX_FRACTION, MAX_SECONDS = 0.02, 60.0
"""Maximum duration of the measurement: fraction of the expected run, and seconds."""
ROUNDS, WARMUP_STEPS, MAX_STEPS = 3, 1, 4
"""Pairs of measurements; steps before each that are not timed; maximum number of timed steps."""
MIN_RATIO = 1.1
"""Ratio of the speeds from which bfloat16 is chosen."""


@dataclass(frozen=True)
class PrecisionTimes:
    """Times of training steps in both precisions.

    Attributes:
        float32, bfloat16: seconds per step, median of the rounds.
        ratio: median of the ratios of float32 to bfloat16 in each round.
        images: inputs of the network in such a step, as in `Train.batch_size`; fewer than in
            training if a step is slow.
        cpu: name of the CPU.
    """

    float32: float
    bfloat16: float
    ratio: float
    images: int
    cpu: str

    @property
    def choice(self) -> str:
        """The faster precision; float32 if the difference is small."""
        return "bfloat16" if self.ratio >= MIN_RATIO else "float32"

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of environment.json."""
        return {
            "precision": self.choice,
            "float32_step_seconds": self.float32,
            "bfloat16_step_seconds": self.bfloat16,
            "ratio": self.ratio,
            "images_per_step": self.images,
            "cpu": self.cpu,
        }


def choose_precision(training: Training) -> tuple[Training, PrecisionTimes | None]:
    """Replace the precision "auto" of a training on a CPU by the faster one, if it is measured.

    In several processes, rank 0 measures and decides. The choice is part of the recipe of the
    returned training, so that a resumed run keeps it.

    Returns:
        The training and the times; the same training and None on other devices, for a given
        precision, for runs of less than a minute, and if the steps cannot be run.
    """
    recipe = training.recipe
    if training.device.type != "cpu" or recipe.train.precision != "auto":
        return training, None
    times = run_on_rank0(lambda: measure_precisions(training))
    if times is None:
        return training, None
    train = replace(recipe.train, precision=times.choice)
    return replace(training, recipe=replace(recipe, train=train)), times


def measure_precisions(training: Training) -> PrecisionTimes | None:
    """Time training steps in float32 and in bfloat16; None if that is not worth it or fails."""
    plan = _plan(training)
    if plan is None:
        return None
    size, seconds_per_block = plan
    rounds = measure_on_copy(training, lambda: _measure(training, size, seconds_per_block))
    if rounds is None:
        return None
    return PrecisionTimes(
        *(median(times) for times in zip(*rounds, strict=True)),
        ratio=median(float32 / bfloat16 for float32, bfloat16 in rounds),
        images=size * training.recipe.mix.batch_repetitions,
        cpu=cpu_name(),
    )


def _plan(training: Training) -> tuple[int, float] | None:
    """Return distinct images per step, and the seconds of one block of steps; None if too short."""
    operations = training_operations(training.learn.model, training.source.train.image_shape)
    if not operations:
        return None
    rate = assumed_rate(training)
    run_seconds = operations * training.images_seen / rate
    if run_seconds < MIN_RUN_SECONDS:
        return None
    seconds_per_block = min(MAX_FRACTION * run_seconds, MAX_SECONDS) / (2 * ROUNDS)
    recipe = training.recipe
    copies = recipe.mix.batch_repetitions
    planned = int(rate * seconds_per_block / (WARMUP_STEPS + 1) / (operations * copies))
    if planned < smallest_size(copies):
        return None
    return min(recipe.loader_batch_size, planned), seconds_per_block


def _measure(training: Training, size: int, seconds_per_block: float) -> list[tuple[float, float]]:
    """Return seconds per step in float32 and bfloat16 for each round."""
    learn = copy_for_timing(training, size)
    plain = replace(training.acceleration, compiled=False, autocast=None)
    settings = plain, replace(plain, autocast=torch.bfloat16)
    timed_seconds = seconds_per_block / (WARMUP_STEPS + 1)
    rounds = []
    for _ in range(ROUNDS):
        float32, bfloat16 = (
            time_steps(learn, setting, StepTimer(WARMUP_STEPS, timed_seconds, MAX_STEPS))
            for setting in settings
        )
        rounds.append((float32, bfloat16))
    return rounds
