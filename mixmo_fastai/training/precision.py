"""Choose between float32 and bfloat16 on a CPU by timing training steps in both.

CPUs with AVX512-BF16 or AMX train convolutions in bfloat16 almost twice as fast as in float32; on
others it is slower. Which one a CPU is, and whether a network is large enough to profit, is
measured by `trials.compare_settings`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixmo_fastai.runtime.devices import cpu_name
from mixmo_fastai.runtime.processes import run_on_rank0
from mixmo_fastai.training.prepare import Training
from mixmo_fastai.training.trials import compare_settings, expected_seconds

MIN_RUN_SECONDS = 60.0
"""Expected duration of a run below which nothing is measured, and float32 is used."""
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


def choose_precision(
    training: Training, announce: Callable[[], None] = lambda: None
) -> tuple[Training, PrecisionTimes | None]:
    """Replace the precision "auto" of a training on a CPU by the faster one, if it is measured.

    In several processes, rank 0 measures and decides. The choice is part of the recipe of the
    returned training, so that a resumed run keeps it.

    Args:
        training: a new run.
        announce: called before steps are timed.

    Returns:
        The training and the times; the same training and None on other devices, for a given
        precision, for runs of less than a minute, and if the steps cannot be run.
    """
    recipe = training.recipe
    if training.device.type != "cpu" or recipe.train.precision != "auto":
        return training, None
    times = run_on_rank0(lambda: measure_precisions(training, announce))
    if times is None:
        return training, None
    train = replace(recipe.train, precision=times.choice)
    return replace(training, recipe=replace(recipe, train=train)), times


def measure_precisions(
    training: Training, announce: Callable[[], None] = lambda: None
) -> PrecisionTimes | None:
    """Time training steps in float32 and in bfloat16; None if that is not worth it or fails."""
    run_seconds = expected_seconds(training)
    if run_seconds < MIN_RUN_SECONDS:
        return None
    float32 = replace(training.acceleration, compiled=False, autocast=None)
    settings = float32, replace(float32, autocast=torch.bfloat16)
    times = compare_settings(training, settings, run_seconds=run_seconds, announce=announce)
    if times is None:
        return None
    ratio = times.median_ratio(0, 1)
    return PrecisionTimes(*times.seconds, ratio, times.images, cpu_name())
