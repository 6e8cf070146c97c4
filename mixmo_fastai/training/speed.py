"""Estimate training speed and time of a run from a few timed steps on a copy of the network.

The copy has its own optimizer, callbacks and view of the training data. The run itself is not
changed: neither its weights and BatchNorm statistics nor any random draw.
"""

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from mixmo_fastai.config.defaults import default_for
from mixmo_fastai.data.first_batch import preserved_random_states
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import learner_from_recipe
from mixmo_fastai.models.create import create_model
from mixmo_fastai.models.flops import BACKWARD_COST, UNCOUNTABLE, training_flops
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runtime.acceleration import Acceleration
from mixmo_fastai.runtime.processes import process_group
from mixmo_fastai.training.prepare import Training

_Result = TypeVar("_Result")

CPU_THREAD_FLOPS = 40e9
"""Typical operations per second of one CPU thread on these networks, to plan the timed steps."""
TARGET_STEP_SECONDS, MAX_STEP_SECONDS = 0.4, 6.0
"""Target duration of a timed step on a CPU, and the expected duration above which none is timed."""
MIN_RUN_SECONDS = 2.0
"""Expected duration of a run on a CPU below which nothing is timed."""
TIMED_SECONDS, LONG_WARMUP_SECONDS, MAX_STEPS, WARMUP_STEPS = 0.6, 2.0, 40, 2
"""Duration of the timed steps; warm-up duration above which the warm-up itself is timed; maximum
number of timed steps; number of warm-up steps, in which a GPU selects its kernels."""
SHORT_RUN_SECONDS = 20 * 60.0
"""Duration of the shorter run that is suggested instead of one that takes hours."""
NARROW_NETWORK_EFFICIENCY = 0.8
"""Relative efficiency of narrow networks: they use a processor less well than wide ones."""

_operations: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()
"""Operations of training on one image, by network: they take up to half a second to count."""


@dataclass(frozen=True)
class Speed:
    """Training speed.

    Attributes:
        images_per_second: images per second in training.
        is_timed: whether steps were timed; otherwise the speed is computed from the operations.
        is_lower_bound: whether the run will be compiled; the timed steps are not.
    """

    images_per_second: float
    is_timed: bool = True
    is_lower_bound: bool = False


@dataclass(frozen=True)
class ShorterRun:
    """A run that takes about `SHORT_RUN_SECONDS`.

    Attributes:
        arch: the network; None for that of the run.
        epochs: number of epochs.
        limit: number of training images; 0 for all.
    """

    arch: str | None
    epochs: int
    limit: int = 0


class StepTimer(Callback):
    """Time training steps after a warm-up, then end the fit; validation is skipped.

    If a step takes long on a CPU, the warm-up itself is timed and no further step is run.

    Args:
        warmup_steps: steps before the timed ones.
        timed_seconds: duration of the timed steps, of which there is at least one.
        max_steps: maximum number of timed steps.
        long_warmup: duration in seconds from which the warm-up itself is timed.
    """

    order = 100  # after all other callbacks

    def __init__(
        self,
        warmup_steps: int = WARMUP_STEPS,
        timed_seconds: float | None = None,
        max_steps: int = MAX_STEPS,
        long_warmup: float = LONG_WARMUP_SECONDS,
    ) -> None:
        super().__init__()
        self.warmup_steps, self.steps, self.seconds = warmup_steps, -warmup_steps, 0.0
        self.max_steps, self.long_warmup = max_steps, long_warmup
        self.timed_seconds = TIMED_SECONDS if timed_seconds is None else timed_seconds
        self.started_at: float | None = None

    def before_batch(self) -> None:
        """Start the clock with the first batch: starting worker processes is not part of a step."""
        if self.started_at is None:
            self.started_at = time.perf_counter()

    def after_batch(self) -> None:
        """Count a step; end the fit when enough steps are timed."""
        self.steps += 1
        if self.steps <= 0:
            self._synchronize()
        self.seconds = time.perf_counter() - self.started_at
        is_long = self.learn.loss.device.type == "cpu" and self.seconds >= self.long_warmup
        if self.steps <= 0 and is_long:
            self.steps += self.warmup_steps
            raise CancelFitException
        if self.steps == 0:
            self.started_at += self.seconds
        elif self.steps >= self.max_steps or (
            self.steps > 0 and self.seconds >= self.timed_seconds
        ):
            self._synchronize()
            self.seconds = time.perf_counter() - self.started_at
            raise CancelFitException

    def before_validate(self) -> None:
        """Skip validation."""
        raise CancelValidException

    def _synchronize(self) -> None:
        """Wait for all pending work of a GPU."""
        device = self.learn.loss.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def measure_speed(training: Training) -> Speed | None:
    """Time a few training steps on this machine, without changing the run.

    On a CPU the batch is reduced so that a step takes less than a second. If even the smallest
    batch would take far longer, the speed is computed from the number of operations. The same holds
    for runs of a few seconds. Timed steps are not compiled.

    Returns:
        None if the speed cannot be determined, for example if there is not enough memory.
    """
    rate, copies = assumed_rate(training), training.recipe.mix.batch_repetitions
    operations = operations_per_image(training)
    if operations and operations * training.images_seen < rate * MIN_RUN_SECONDS:
        return Speed(rate / operations, is_timed=False)
    size = training.recipe.loader_batch_size
    if training.device.type == "cpu" and operations:
        size = possible_size(training, planned_size(training, TARGET_STEP_SECONDS, rate) or 0)
        size = min(training.recipe.loader_batch_size, size + -size % process_group().count)
        if size * copies * operations > rate * MAX_STEP_SECONDS:
            return Speed(rate / operations, is_timed=False)
    seconds = measure_on_copy(training, lambda: _seconds_per_step(training, size))
    if seconds is None:
        return None
    return Speed(size * copies / seconds, is_lower_bound=training.acceleration.compiled)


def assumed_rate(training: Training) -> float:
    """Return the operations per second of a CPU that the timed steps are planned for."""
    return CPU_THREAD_FLOPS * (training.acceleration.threads or torch.get_num_threads())


def planned_size(training: Training, seconds: float, rate: float) -> int | None:
    """Return the number of distinct images of a step that is planned to take `seconds`.

    Args:
        training: the run.
        seconds: duration of the step.
        rate: assumed operations per second.

    Returns:
        The number, which may be 0; None if the operations cannot be counted.
    """
    operations = operations_per_image(training)
    if operations is None:
        return None
    return int(rate * seconds / (operations * training.recipe.mix.batch_repetitions))


def possible_size(training: Training, planned: int) -> int:
    """Return the possible number of distinct images of a step that is nearest to the planned one.

    BatchNorm needs two inputs, and a step has no more images than one of training.
    """
    smallest = max(1, 2 // training.recipe.mix.batch_repetitions)
    return min(training.recipe.loader_batch_size, max(smallest, planned))


def measure_on_copy(training: Training, measure: Callable[[], _Result]) -> _Result | None:
    """Measure on a copy of a training, without changing random states or keeping memory.

    Returns:
        The result; None if a step fails, since training itself will report the error.
    """
    try:
        with preserved_random_states(training.learn.dls.train):
            return measure()
    except (RuntimeError, MemoryError, InputError):
        return None
    finally:
        gc.collect()  # a Learner and its callbacks form reference cycles
        if training.device.type != "cpu":
            torch.cuda.empty_cache()


def operations_per_image(training: Training) -> float | None:
    """Return the operations of training on one image; None if they cannot be counted."""
    model = training.learn.model
    if model not in _operations:
        _operations[model] = training_operations(model, training.source.train.image_shape)
    return _operations[model]


def training_operations(model: nn.Module, image_shape: tuple[int, ...]) -> float | None:
    """Count the operations of one image (C, H, W) in training; None if they cannot be counted."""
    try:
        return training_flops(model, image_shape, num_images=1) or None
    except UNCOUNTABLE:
        return None


def _seconds_per_step(training: Training, size: int) -> float:
    """Time steps of `size` distinct images on a copy of everything that a step changes."""
    learn = copy_for_timing(training, size)
    return time_steps(learn, replace(training.acceleration, compiled=False), StepTimer())


def copy_for_timing(training: Training, size: int) -> Learner:
    """Copy everything that a training step changes.

    Returns:
        A Learner of its own, with batches of `size` distinct images.
    """
    recipe = training.recipe
    train = replace(recipe.train, batch_size=size * recipe.mix.batch_repetitions)
    model = copy.deepcopy(unwrap(training.learn.model))
    dls = _with_batch_size(size, training.learn.dls)
    learn = learner_from_recipe(replace(recipe, train=train), dls, model)
    learn.remove_cbs(ProgressCallback)
    training.acceleration.move_to_device(model)
    learn.lr = recipe.lr / 25
    return learn


def time_steps(learn: Learner, acceleration: Acceleration, timer: StepTimer) -> float:
    """Return the seconds per step of a Learner from `copy_for_timing`."""
    with learn.no_logging(), acceleration.applied(learn.model):
        epochs = 1 + timer.warmup_steps + timer.max_steps  # an epoch has at least one step
        learn.fit(epochs, cbs=[timer])
    return timer.seconds / timer.steps


def _with_batch_size(size: int, dls: DataLoaders) -> DataLoaders:
    """Return loaders with another batch size for training and a separate epoch counter."""
    loader = copy.copy(dls.train)
    loader.bs = size
    return DataLoaders(loader, *dls.loaders[1:], device=dls.device)


def seconds_left(training: Training, speed: Speed, epochs_done: int = 0) -> float:
    """Estimate the remaining seconds of a run, including its evaluations.

    Args:
        training: the run.
        speed: its training speed; evaluating an image takes a third of the time.
        epochs_done: epochs completed by all of its networks together.
    """
    train, nets = training.recipe.train, training.recipe.model.num_nets
    evaluated = sum(len(loader.images) for loader in training.learn.dls.loaders[1:])
    epochs = max(0, train.epochs * nets - epochs_done)
    images = epochs * _images_per_epoch(training) + nets * evaluated / (1 + BACKWARD_COST)
    return images / speed.images_per_second


def _images_per_epoch(training: Training) -> float:
    """Return the images per epoch in training cost; a validation image counts as a third."""
    seen = training.steps_per_epoch * training.recipe.train.batch_size
    return seen + len(training.learn.dls.valid.images) / (1 + BACKWARD_COST)


def shorter_training(training: Training, speed: Speed) -> ShorterRun | None:
    """Find a network and a number of epochs that take about `SHORT_RUN_SECONDS` on this machine.

    The network is that of the run, or the default network for a CPU if that is smaller.

    Returns:
        None if the operations of one of the two networks are unknown.
    """
    recipe = training.recipe
    image_shape = training.source.train.image_shape
    arch: str | None = default_for("cpu", image_shape).arch
    current = operations_per_image(training)
    default = training_operations(_build_network(arch, training), image_shape)
    if current is None or default is None:
        return None
    images = SHORT_RUN_SECONDS * speed.images_per_second / recipe.model.num_nets
    if default < current:
        images *= NARROW_NETWORK_EFFICIENCY * current / default
    else:
        arch = None
    if (epochs := int(images / _images_per_epoch(training))) >= 1:
        return ShorterRun(arch, epochs)
    distinct = int(images / recipe.mix.batch_repetitions)
    rounded = distinct - distinct % 10 ** (len(str(distinct)) - 1)  # to one significant digit
    return ShorterRun(arch, 1, limit=max(recipe.loader_batch_size, rounded))


def _build_network(arch: str, training: Training) -> nn.Module:
    """Build another network for the data of a run."""
    channels, height, width = training.source.train.image_shape
    num_classes, num_members = len(training.source.classes), training.recipe.model.num_members
    return create_model(arch, num_classes, num_members, channels, image_size=(height, width))
