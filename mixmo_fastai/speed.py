"""How fast a run trains on this machine, from a few steps of a copy, and how long it will take.

The steps are those of another network, with an optimizer, callbacks and a view of the training data
of its own. The run itself is not touched: neither weights nor BatchNorm statistics nor any draw.
"""

import copy
import gc
import time
from dataclasses import dataclass, replace

import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from torch import nn

from mixmo_fastai.data.glance import preserved_random_states
from mixmo_fastai.errors import InputError
from mixmo_fastai.flops import BACKWARD_COST, training_flops
from mixmo_fastai.learner import learner_from_recipe
from mixmo_fastai.models.create import create_model
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.processes import process_group
from mixmo_fastai.sizing import default_for
from mixmo_fastai.training import Training

USUAL_RATE = 40e9
"""Operations per second that a thread of a CPU makes of such networks, to plan the timed steps."""
PLANNED_SECONDS, MOST_SECONDS = 0.4, 6.0
"""Of one timed step on a CPU: what is aimed at, and what is not begun."""
TINY_SECONDS = 2.0
"""Of a whole training on a CPU, below which nothing is timed."""
TIMED_SECONDS, LONG_STEP, MOST_STEPS, WARMUP_STEPS = 0.6, 2.0, 40, 2
"""How long steps are timed, what counts as long in the warm-up, and how many there are at most.
The first steps of a GPU choose its kernels, which is neither counted nor cut short."""
SHORT_SECONDS = 20 * 60.0
"""How long the shorter training is that is advised in place of one that takes hours."""
CAUTION = 0.8
"""Narrow networks make somewhat less of a processor than wide ones."""


@dataclass(frozen=True)
class Speed:
    """How fast a network trains.

    Attributes:
        images_per_second: that the network sees, in training.
        is_timed: whether steps were timed; otherwise it follows from the operations alone.
        is_lower_bound: whether the run will be compiled, as the timed steps were not.
    """

    images_per_second: float
    is_timed: bool = True
    is_lower_bound: bool = False


@dataclass(frozen=True)
class Shorter:
    """A training that fits into `SHORT_SECONDS`.

    Attributes:
        arch: the network; None for that of the run.
        epochs: how many.
        limit: of the training images; 0 for all.
    """

    arch: str | None
    epochs: int
    limit: int = 0


class StepTimer(Callback):
    """Time training steps after a warm-up, then end the fit; validation is left out.

    Where a step takes long on a CPU, nothing more is waited for: the warm-up is then timed itself.
    """

    order = 100  # after all else that a step does

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seconds = -WARMUP_STEPS, 0.0

    def before_fit(self) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def after_batch(self) -> None:
        """Count a step; end the fit when enough are timed."""
        self.steps += 1
        if self.steps <= 0:
            self._wait()
        self.seconds = time.perf_counter() - self.began
        is_long = self.learn.loss.device.type == "cpu" and self.seconds >= LONG_STEP
        if self.steps <= 0 and is_long:
            self.steps += WARMUP_STEPS
            raise CancelFitException
        if self.steps == 0:
            self.began += self.seconds
        elif self.steps >= MOST_STEPS or (self.steps > 0 and self.seconds >= TIMED_SECONDS):
            self._wait()
            self.seconds = time.perf_counter() - self.began
            raise CancelFitException

    def before_validate(self) -> None:
        """Go on with the next epoch."""
        raise CancelValidException

    def _wait(self) -> None:
        """Wait until the device has done what it was given."""
        device = self.learn.loss.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def measure_speed(training: Training) -> Speed | None:
    """Time a few training steps on this machine; the run is as before afterwards.

    On a CPU a step is of as few images as take about a second. What would take far longer than that
    is not timed but follows from the number of operations. Compilation is left out.

    A training of a few seconds is not timed either.

    Returns:
        None where nothing can be told, such as without the memory for it.
    """
    on_cpu = training.device.type == "cpu"
    rate = USUAL_RATE * (training.acceleration.threads or torch.get_num_threads())
    image_shape, copies = training.source.train.image_shape, training.recipe.mix.batch_repetitions
    operations = training_operations(training.learn.model, image_shape)
    if operations and operations * training.images_seen < rate * TINY_SECONDS:
        return Speed(rate / operations, is_timed=False)
    size = training.recipe.loader_batch_size
    if on_cpu and operations:
        fewest = max(1, 2 // copies)  # BatchNorm takes two images or more
        planned = int(rate * PLANNED_SECONDS / (operations * copies))
        size = min(size, max(fewest, planned))
        size = min(training.recipe.loader_batch_size, size + -size % process_group().count)
        if size * copies * operations > rate * MOST_SECONDS:
            return Speed(rate / operations, is_timed=False)
    try:
        with preserved_random_states(training.learn.dls.train):
            seconds = _seconds_per_step(training, size)
    except (RuntimeError, MemoryError, InputError):
        return None  # the training itself says what is wrong
    finally:
        gc.collect()  # a Learner and its callbacks hold each other
        if not on_cpu:
            torch.cuda.empty_cache()
    return Speed(size * copies / seconds, is_lower_bound=training.acceleration.compiled)


def training_operations(model: nn.Module, image_shape: tuple[int, ...]) -> float | None:
    """Count the operations of one image (C, H, W) in training; None where it cannot be done."""
    try:
        return training_flops(model, image_shape, num_images=1) or None
    except (RuntimeError, NotImplementedError, TypeError):  # of layers without a meta device
        return None


def _seconds_per_step(training: Training, size: int) -> float:
    """Time steps of `size` distinct images with a copy of everything that a step changes."""
    recipe = training.recipe
    train = replace(recipe.train, batch_size=size * recipe.mix.batch_repetitions)
    model = copy.deepcopy(unwrap(training.learn.model))
    dls = _with_batches_of(size, training.learn.dls)
    learn = learner_from_recipe(replace(recipe, train=train), dls, model)
    learn.remove_cbs(ProgressCallback)
    acceleration = replace(training.acceleration, compiled=False)
    acceleration.move_to_device(model)
    timer = StepTimer()
    with learn.no_logging(), acceleration.applied(model):
        epochs = 1 + WARMUP_STEPS + MOST_STEPS  # of one step or more each
        learn.fit(epochs, lr=recipe.lr / 25, cbs=[timer])
    return timer.seconds / timer.steps


def _with_batches_of(size: int, dls: DataLoaders) -> DataLoaders:
    """View the training images in batches of another size, with an epoch count of its own."""
    loader = copy.copy(dls.train)
    loader.bs = size
    return DataLoaders(loader, *dls.loaders[1:], device=dls.device)


def seconds_left(training: Training, speed: Speed, epochs_done: int = 0) -> float:
    """Estimate how long a run takes from here on, its evaluations included.

    Args:
        training: the run.
        speed: of its training; to evaluate an image takes a third of the time.
        epochs_done: by all of its networks together.
    """
    train, nets = training.recipe.train, training.recipe.model.num_nets
    evaluated = sum(len(loader.images) for loader in training.learn.dls.loaders[1:])
    epochs = max(0, train.epochs * nets - epochs_done)
    images = epochs * _images_per_epoch(training) + nets * evaluated / (1 + BACKWARD_COST)
    return images / speed.images_per_second


def _images_per_epoch(training: Training) -> float:
    """Count what the network sees in an epoch, an image of the validation as a third of one."""
    seen = training.steps_per_epoch * training.recipe.train.batch_size
    return seen + len(training.learn.dls.valid.images) / (1 + BACKWARD_COST)


def shorter_training(training: Training, speed: Speed) -> Shorter | None:
    """Find a network and a number of epochs that take about `SHORT_SECONDS` here.

    The network is the one that is trained, or that of the table for a CPU where it is smaller. None
    where the operations of the two are not known.
    """
    recipe = training.recipe
    image_shape = training.source.train.image_shape
    arch: str | None = default_for("cpu", image_shape).arch
    own = training_operations(training.learn.model, image_shape)
    least = training_operations(_model_of(arch, training), image_shape)
    if own is None or least is None:
        return None
    images = SHORT_SECONDS * speed.images_per_second / recipe.model.num_nets
    if least < own:
        images *= CAUTION * own / least
    else:
        arch = None
    if (epochs := int(images / _images_per_epoch(training))) >= 1:
        return Shorter(arch, epochs)
    distinct = int(images / recipe.mix.batch_repetitions)
    rounded = distinct - distinct % 10 ** (len(str(distinct)) - 1)  # one digit is enough
    return Shorter(arch, 1, limit=max(recipe.loader_batch_size, rounded))


def _model_of(arch: str, training: Training) -> nn.Module:
    """Build another network for the data of a training."""
    channels, height, width = training.source.train.image_shape
    num_classes, num_members = len(training.source.classes), training.recipe.model.num_members
    return create_model(arch, num_classes, num_members, channels, image_size=(height, width))
