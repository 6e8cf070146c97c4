"""Training: from a recipe to a finished run folder."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from mixmo_fastai.acceleration import Acceleration, choose_acceleration
from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.checkpoints.state import Position, Restored, RunState, Stateful
from mixmo_fastai.checkpoints.store import CheckpointStore
from mixmo_fastai.checkpoints.weights import save_weights
from mixmo_fastai.data.dataloaders import BatchTooLargeError, make_dataloaders
from mixmo_fastai.data.fingerprint import fingerprint
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.data.loaders import Augmentation
from mixmo_fastai.data.parts import DataParts, parts_before_split_json
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.splits import training_parts
from mixmo_fastai.devices import choose_device, describe_device
from mixmo_fastai.distributed import shared
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.evaluation import collect_member_logits, evaluate_splits
from mixmo_fastai.failures import explained
from mixmo_fastai.interruption import StopRequest
from mixmo_fastai.learner import learner_from_recipe
from mixmo_fastai.names import DATASETS
from mixmo_fastai.processes import first_before_others, group
from mixmo_fastai.recipe import Recipe, default_valid_split
from mixmo_fastai.recording import (
    CheckpointCallback,
    HistoryCallback,
    StopInValidation,
    followed,
)
from mixmo_fastai.resuming import resuming
from mixmo_fastai.runs import DataFacts, RunFolder
from mixmo_fastai.schedule import flat_cosine, one_cycle, published_steps
from mixmo_fastai.selection import BestEpochCallback
from mixmo_fastai.settings import to_mapping
from mixmo_fastai.sizing import MAX_CPU_SIDE, fill_defaults, open_settings

TEST_SET = 2
"""Place of the test loader in the DataLoaders of `make_dataloaders`."""
SMALLEST_SAFE_SIZE = 32
"""Height and width from which on every published network takes an image."""


class TrainingDivergedError(RunFailedError):
    """The training loss is not finite."""


@dataclass(frozen=True)
class Training:
    """A run that is ready to start: everything is read, nothing is trained or written yet.

    Attributes:
        recipe: what is trained.
        source: the data.
        learn: the Learner with its loaders and network; of a deep ensemble, of the first network.
        decided: settings that the recipe left open, which `recipe` now has; see
            `sizing.fill_defaults`.
    """

    recipe: Recipe
    source: DataSource
    learn: Learner
    decided: tuple[str, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return len(self.learn.dls.train)

    @property
    def warmup_steps(self) -> int:
        """Steps of the published warm-up."""
        return self.recipe.warmup_steps(images_of_warmup(self.recipe, self.source))

    @property
    def images_seen(self) -> int:
        """Images that the networks see in all, repetitions included."""
        train = self.recipe.train
        each = train.epochs * self.steps_per_epoch * train.batch_size
        return each * self.recipe.model.num_nets

    @property
    def num_parameters(self) -> int:
        """Parameters of all networks."""
        each = sum(p.numel() for p in self.learn.model.parameters())
        return each * self.recipe.model.num_nets

    @cached_property
    def acceleration(self) -> Acceleration:
        """How it trains on its device."""
        shape, images = self.source.train.image_shape, self.images_seen
        images //= self.recipe.model.num_nets
        return choose_acceleration(self.recipe, self.device, self.learn.model, shape, images)

    def accelerated(self) -> AbstractContextManager[None]:
        """Train this way within; see `Acceleration.applied`."""
        return self.acceleration.applied(self.learn.model)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {"recipe": to_mapping(self.recipe), "data": fingerprint(self.source)}

    def summary(self) -> dict[str, Any]:
        """Give what the final figures say of the training itself."""
        return {
            "recipe": self.recipe.name,
            "epochs": self.recipe.train.epochs,
            "images_seen": self.images_seen,
            "parameters": self.num_parameters,
        }

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return torch.device(self.learn.dls.device)

    @property
    def device_name(self) -> str:
        """Where it trains, in words."""
        return describe_device(self.device) + self.in_processes

    @property
    def in_processes(self) -> str:
        """Say how many processes train, where there are several."""
        count = group().count
        return f" in {count} processes" if count > 1 else ""


def prepare(
    recipe: Recipe,
    data_dir: Path | None = None,
    run: RunFolder | None = None,
    *,
    sized_for: str | None = None,
) -> Training:
    """Read the data and build the Learner of a recipe.

    Args:
        recipe: what to train; what it leaves open is decided by data and device.
        data_dir: where its data lies; see `load_source`.
        run: to be resumed, which has left out damaged images.
        sized_for: the device by which that is decided; the one of the recipe where not given.

    Raises:
        InputError: the data, a name or a value cannot be used.
    """
    device = choose_device(recipe.train.device)  # refused before any data is read
    sized_for = sized_for or device.type
    if (left := recipe.train.batch_size % group().count) != 0:
        near = recipe.train.batch_size - left
        raise InputError(
            f"A batch of {recipe.train.batch_size} images cannot be shared evenly by "
            f"{group().count} processes.\nTake a multiple of their number: {near or group().count} "
            f"or {near + group().count} are nearest, if repetitions divide them."
        )
    with first_before_others():  # which leaves what it has decoded in the cache
        may_scale = recipe.data.image_size is None and sized_for == "cpu"
        source = read_source(
            recipe, data_dir, run, largest_side=MAX_CPU_SIDE if may_scale else None
        )
    return prepare_network(recipe, source, sized_for=sized_for)


def prepare_network(
    recipe: Recipe,
    source: DataSource,
    dls: DataLoaders | None = None,
    *,
    sized_for: str | None = None,
) -> Training:
    """Build the Learner of a recipe on data that is read already; see `prepare`.

    Args:
        recipe: what to train.
        source: the data.
        dls: loaders of another network of the recipe's deep ensemble, to be used again, since two
            data sets on a device would be one too many.
        sized_for: see `prepare`.
    """
    device = choose_device(recipe.train.device)
    recipe = _with_test_split(_with_data_settings(recipe, source), source)
    if dls is None:
        dls = _make_dataloaders(recipe, source, device)
    else:
        dls.train.seed = recipe.train.seed
    left_open = tuple(open_settings(recipe))
    recipe = fill_defaults(
        recipe,
        device=sized_for or device.type,
        image_shape=source.train.image_shape,
        num_images=len(dls.train.images),
        scaled_to=source.scaled_to,
    )
    learn = learner_from_recipe(recipe, dls)
    _check_image_size(recipe, source, learn.model)
    _check_evaluated(source, dls)
    learn.remove_cbs(ProgressCallback)  # the caller brings its own display
    training = Training(recipe, source, learn, left_open)
    training.acceleration.place(learn.model)
    return training


def _make_dataloaders(recipe: Recipe, source: DataSource, device: torch.device) -> DataLoaders:
    data = recipe.data
    try:
        return make_dataloaders(
            source,
            batch_size=recipe.loader_batch_size,
            valid_split=data.valid_split,
            limit=data.limit,
            augmentation=Augmentation(
                data.crop_padding, data.flip, data.alternating_flip, augmix=data.augmix
            ),
            seed=recipe.train.seed,
            device=device,
            loader=data.loader,
            num_workers=data.num_workers,
        )
    except BatchTooLargeError as error:
        raise _with_largest_batch(error, recipe) from None


def _with_largest_batch(error: BatchTooLargeError, recipe: Recipe) -> InputError:
    """Name the largest batch size that the training images fill, by its flag."""
    repetitions = recipe.mix.batch_repetitions
    step = math.lcm(repetitions, group().count)
    largest = error.num_images * repetitions // step * step
    each = f", each {repetitions} times" if repetitions > 1 else ""
    advice = f"Lower the batch size: --batch-size {largest} is the largest possible."
    if not largest:
        advice = f"Add training images: {step // repetitions} or more."
    if recipe.data.limit:
        advice += " Or raise --limit."
    return InputError(f"{error.problem}{each}.\n{advice}")


def train(
    training: Training,
    run: RunFolder,
    *,
    cbs: Sequence[Callback] = (),
    resume: bool = False,
    stop: StopRequest | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train one network, evaluate on the test set once, and write the run folder.

    Args:
        training: from `prepare`.
        run: where everything goes.
        cbs: more fastai callbacks, such as a display; a `FollowingCallback` sees the evaluation and
            the end as well.
        resume: continue from the run's newest checkpoint that is intact; anew where there is none.
        stop: whether a signal asked to stop; the state is then saved at that step.
        say: told where a resumed run goes on.

    Returns:
        the final figures, as in metrics.json.

    Raises:
        InputError: no checkpoint is intact, or it is of another run.
        TrainingDivergedError: the loss is not finite.
        RunFailedError: nothing can be written, memory ran out, or a worker process was lost.
        InterruptedBySignal: somebody asked to stop.
    """
    recipe, learn, stop = training.recipe, training.learn, stop or StopRequest()
    best = BestEpochCallback() if recipe.train.select == "best" else None
    parts: list[Stateful] = [part for part in (_averaging(learn), best) if part is not None]
    history = HistoryCallback(run, recipe.train.batch_size)
    state = RunState(learn, history, parts, training.identity)
    store = CheckpointStore(run.checkpoint)
    restored = _restore(store, state, run, say) if resume else None
    if restored is None:
        run.write_history([])
    describe_run(training, run)
    steps = training.steps_per_epoch, training.warmup_steps
    scheduler = ParamScheduler(schedules(recipe, *steps))
    alone = group().count == 1
    precision = training.acceleration.describe()
    done = Position() if restored is None else restored.position
    with followed(cbs, training, run, done) as followers:
        own_store = store if run.is_writer else None
        checkpoints = CheckpointCallback(own_store, state, stop, followers)
        with (
            explained(recipe, precision),
            learn.no_logging(),
            training.accelerated(),
            shared(learn),
            stop.deferred(),
        ):
            learn.fit(
                recipe.train.epochs,
                lr=recipe.lr,
                wd=recipe.optimizer.weight_decay,
                cbs=[
                    scheduler,
                    history,
                    *([best] if best else []),
                    checkpoints,
                    # Several processes have different numbers of batches there.
                    *([StopInValidation(checkpoints)] if alone else []),
                    *cbs,
                    *resuming(restored),
                ],
            )
        if history.diverged_at is not None:
            raise _diverged(recipe, *history.diverged_at)
        _settle_weights(learn, best)
        save_weights(learn.model, run)
        with explained(recipe, precision), training.acceleration.threaded():
            loaders = learn.dls.valid, learn.dls[TEST_SET]
            valid, test = (collect_member_logits(learn.model, loader) for loader in loaders)
            evaluated = evaluate_splits(valid, test)
        figures = {
            **training.summary(),
            **({"selected_epoch": best.number} if best else {}),
            "seconds": round(sum(float(row["seconds"]) for row in run.history()), 1),
            **evaluated,
        }
        run.write_metrics(figures)
        for follower in followers:
            follower.after_evaluation(figures, test or valid)
    return figures


def describe_run(training: Training, run: RunFolder) -> None:
    """Write what a run needs to be resumed and evaluated, with nothing left to be decided again."""
    parts = training.source.parts
    if parts is not None:  # first: a run with data.json alone is one of version 0.1.0
        run.write_split(dataclasses.asdict(parts))
    if training.recipe.data.skip_damaged:
        run.write_left_out(training.source.left_out)
    run.write_data_facts(facts_of(training.source))
    if run.recipe() != training.recipe:
        run.write_recipe(training.recipe)


def _restore(
    store: CheckpointStore, state: RunState, run: RunFolder, say: Callable[[str], None]
) -> Restored | None:
    """Put the newest intact checkpoint into the Learner, and say which one that is."""
    with first_before_others():
        saved = store.newest()
        if saved is None:
            say("Resuming: nothing was saved yet; training begins anew.")
            return None
        restored = state.restore(saved)
        for name, problem in saved.skipped.items():
            say(f"The checkpoint {name} is damaged and was set aside: {problem}.")
        if run.is_writer:
            store.set_aside(saved.skipped)
    epoch, step = restored.position.epoch, restored.position.step
    within = f" and {step} of {restored.steps_per_epoch} steps of the next" if step else ""
    taken = f" (from {saved.path.name}, the one before)" if saved.skipped else ""
    epochs = state.identity["recipe"]["train"]["epochs"]
    say(f"Resuming: {epoch} of {epochs} epochs{within} are done{taken}.")
    for what, before, now in (
        ("torch", restored.torch, torch.__version__),
        ("processes:", restored.num_processes, group().count),
    ):
        if before != now:
            say(f"It was trained with {what} {before} so far, now {now}: equal up to rounding.")
    return restored


def _averaging(learn: Learner) -> EMACallback | None:
    return next((cb for cb in learn.cbs if isinstance(cb, EMACallback)), None)


def _settle_weights(learn: Learner, best: BestEpochCallback | None) -> None:
    """Leave in the network what is evaluated: its averages, or the best epoch's weights."""
    if best is not None:
        best.restore(learn.model)
    elif averaging := _averaging(learn):
        averaging.finish()  # where a resumed run had no epoch left


def schedules(recipe: Recipe, steps_per_epoch: int, warmup_steps: int) -> dict[str, Any]:
    """Give the schedules of learning rate and momentum, as fastai's ParamScheduler takes them."""
    schedule = recipe.schedule
    if schedule.kind == "published":
        lr = published_steps(
            recipe.lr,
            epochs=recipe.train.epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=schedule.milestones,
            gamma=schedule.gamma,
            warmup_steps=warmup_steps,
        )
        return {"lr": lr}
    if schedule.kind == "flat-cosine":
        return {"lr": flat_cosine(recipe.lr, recipe.lr / schedule.div_final, schedule.flat_share)}
    lr = one_cycle(
        recipe.lr / schedule.div, recipe.lr, recipe.lr / schedule.div_final, schedule.pct_start
    )
    start, peak, end = schedule.momentums
    return {"lr": lr, "mom": one_cycle(start, peak, end, schedule.pct_start)}


def images_of_warmup(recipe: Recipe, source: DataSource) -> int:
    """Count the images by which epochs of the published warm-up are measured.

    All of the training set, as published, whatever is kept for validation; where there is a limit,
    those that are trained on.
    """
    if not recipe.data.limit:
        return len(source.train)
    train, _ = training_parts(source, recipe.data.valid_split)
    return min(recipe.data.limit, len(train))


def facts_of(source: DataSource) -> DataFacts:
    """Give what a network must know of its data to predict without it."""
    return DataFacts(source.classes, source.mean, source.std, source.train.image_shape)


def read_source(
    recipe: Recipe,
    data_dir: Path | None,
    run: RunFolder | None = None,
    *,
    largest_side: int | None = None,
) -> DataSource:
    """Read the data that a recipe names.

    Args:
        recipe: names it.
        data_dir: see `load_source`.
        run: whose images are to be read again; None for a new run.
        largest_side: see `load_source`.
    """
    left_out, parts, facts = None, None, None
    if run is not None:
        nothing = None if recipe.data.skip_damaged else {}  # None: it has not looked yet
        left_out = nothing if (kept := run.left_out()) is None else kept
        parts = data_parts(run)
        facts = None if parts is None else run.data_facts()
    return load_source(
        recipe.data.dataset,
        data_dir,
        image_size=recipe.data.image_size or None,
        largest_side=largest_side,
        test_split=recipe.data.test_split,
        parts=parts,
        classes=None if facts is None else facts.classes,
        skip_damaged=recipe.data.skip_damaged,
        left_out=left_out,
    )


def data_parts(run: RunFolder) -> DataParts | None:
    """Read which images of a folder a run took; None for named data and runs that never began."""
    dataset = run.recipe().data.dataset
    if dataset in DATASETS:
        return None
    if (split := run.split()) is not None:
        return DataParts.from_mapping(split, run.path / "split.json")
    has_begun = run.data_facts() is not None
    return parts_before_split_json(Path(dataset)) if has_begun else None


def _with_test_split(recipe: Recipe, source: DataSource) -> Recipe:
    """Fill in the fraction of a test set that was drawn."""
    if source.parts is None or source.parts.drawn is None:
        return recipe
    fraction = source.parts.drawn.test_split
    return replace(recipe, data=replace(recipe.data, test_split=fraction))


def _with_data_settings(recipe: Recipe, source: DataSource) -> Recipe:
    """Fill in the augmentation and the validation split that follow from the data."""
    data = recipe.data
    padding = source.crop_padding if data.crop_padding is None else data.crop_padding
    flip = source.flip if data.flip is None else data.flip
    valid_split = data.valid_split
    if valid_split is None and source.valid is None:
        valid_split = default_valid_split(len(source.train))
    if data.alternating_flip and not flip:
        raise InputError(
            "data.alternating_flip mirrors every second copy, but images are not mirrored here.\n"
            "Set data.flip=true, or leave data.alternating_flip out."
        )
    data = replace(data, crop_padding=padding, flip=flip, valid_split=valid_split)
    return replace(recipe, data=data)


def _check_image_size(recipe: Recipe, source: DataSource, model: nn.Module) -> None:
    """Show the network one image where it may be too small for all the strides."""
    channels, height, width = source.train.image_shape
    if min(height, width) >= SMALLEST_SAFE_SIZE:
        return  # others than the published networks were tried when they were built
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            copy.deepcopy(model).eval()(torch.zeros(1, channels, height, width, device=device))
    except RuntimeError as error:
        raise InputError(
            f"Images of {height}x{width} are too small for {recipe.model.arch}.\n"
            "Take a larger data.image_size, or another network."
        ) from error


def _check_evaluated(source: DataSource, dls: DataLoaders) -> None:
    """Check that there are images for the final figures."""
    if not any(len(loader.images) for loader in (dls.valid, dls[TEST_SET])):
        raise InputError(
            f"{source.name} has no labelled test images and no validation images, so that nothing "
            "would be evaluated.\nSet some aside: --test-split 0.2, or --valid-split 0.1."
        )


def _diverged(recipe: Recipe, epoch: int, step: int) -> TrainingDivergedError:
    own = replace(recipe, optimizer=replace(recipe.optimizer, lr=None))
    return TrainingDivergedError(
        f"The training loss is not finite at step {step} of epoch {epoch}.\n"
        f"Lower the learning rate, as in --lr {min(recipe.lr / 4, own.lr):.3g}; "
        "`mixmo lr-find` suggests one."
    )
