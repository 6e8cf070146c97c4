"""Training: from a recipe to a finished run folder."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner

from mixmo_fastai.callbacks.best_epoch import BestEpochCallback
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.callbacks.freeze import FreezeCallback, frozen_steps
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.data.run_data import facts_of
from mixmo_fastai.errors import RunFailedError
from mixmo_fastai.evaluation.logits import LabelledLogits, collect_member_logits
from mixmo_fastai.learner.distributed import shared
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import save_weights
from mixmo_fastai.runtime.processes import process_group, rank0_first
from mixmo_fastai.runtime.signals import StopRequest
from mixmo_fastai.training.checkpointing import CheckpointCallback, StopInValidation
from mixmo_fastai.training.failures import readable_errors
from mixmo_fastai.training.final import evaluate_and_calibrate
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.prepare import Training
from mixmo_fastai.training.resume import resume_callbacks
from mixmo_fastai.training.run_callbacks import entered_run_callbacks
from mixmo_fastai.training.schedule import fine_tune, flat_cosine, one_cycle, published_steps
from mixmo_fastai.training.state import Position, Restored, RunState, Stateful


class TrainingDivergedError(RunFailedError):
    """The training loss is not finite."""


def train(
    training: Training,
    run: RunFolder,
    *,
    cbs: Sequence[Callback] = (),
    resume: bool = False,
    stop: StopRequest | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train one network, evaluate it once on the test set, and write the run folder.

    Args:
        training: from `prepare`.
        run: the run folder.
        cbs: additional fastai callbacks, such as a progress display; a `RunCallback` also sees the
            evaluation and the end.
        resume: continue from the newest intact checkpoint, or start from scratch if there is none.
        stop: whether a signal asked to stop; the state is then saved at that step.
        say: called with a line that says where training resumes.

    Returns:
        the final metrics, as in metrics.json.

    Raises:
        InputError: no checkpoint is intact, or the checkpoint belongs to another run.
        TrainingDivergedError: the loss is not finite.
        RunFailedError: a file cannot be written, memory ran out, or a worker process was lost.
        InterruptedBySignal: a signal asked to stop.
    """
    recipe, learn, stop = training.recipe, training.learn, stop or StopRequest()
    best = _selection(training)
    parts: list[Stateful] = [part for part in (_averaging(learn), best) if part is not None]
    history = HistoryCallback(run, recipe.train.batch_size)
    freezing = _freezing(training)
    state = RunState(learn, history, parts, training.identity, freezing)
    store = CheckpointStore(run.checkpoint)
    restored = _restore(store, state, run, say, training.num_threads) if resume else None
    done = Position() if restored is None else restored.position
    _record_threads(training, run, restored, done)
    if restored is None:
        run.write_history([])
    describe_run(training, run)
    scheduler = _scheduler(training)
    is_single_process = process_group().count == 1
    precision = training.acceleration.describe()
    with entered_run_callbacks(cbs, training, run, done) as run_callbacks:
        store_or_none = store if run.is_writer else None
        checkpoints = CheckpointCallback(store_or_none, state, stop, run_callbacks)
        with (
            readable_errors(recipe, precision),
            learn.no_logging(),
            training.accelerated(),
            shared(learn),
            stop.deferred(),
        ):
            learn.fit(
                recipe.train.epochs,
                lr=recipe.lr,
                cbs=[
                    *([freezing] if freezing else []),
                    scheduler,
                    history,
                    *([best] if best else []),
                    checkpoints,
                    # Processes validate different numbers of batches, so they cannot stop together.
                    *([StopInValidation(checkpoints)] if is_single_process else []),
                    *cbs,
                    *resume_callbacks(restored),
                ],
            )
        if history.diverged_at is not None:
            raise _diverged(recipe, *history.diverged_at)
        _load_final_weights(learn, best)
        save_weights(learn.model, run)
        with readable_errors(recipe, precision), training.acceleration.threaded():
            metrics, logits = _evaluate(training, run, best)
        run.write_metrics(metrics)
        for callback in run_callbacks:
            callback.after_evaluation(metrics, logits)
    return metrics


def _evaluate(
    training: Training, run: RunFolder, best: BestEpochCallback | None
) -> tuple[dict[str, Any], LabelledLogits]:
    """Return the final metrics, and the logits of the test images or else validation images."""
    learn = training.learn
    loaders = learn.dls.loaders[1:]
    logits = [collect_member_logits(learn.model, loader) for loader in loaders]
    evaluated = evaluate_and_calibrate(run, loaders, logits)
    valid, test = logits[:2]
    metrics = {
        **training.summary(),
        **({"selected_epoch": best.number} if best else {}),
        "seconds": round(sum(float(row["seconds"]) for row in run.history()), 1),
        **evaluated,
    }
    return metrics, test or valid


def _selection(training: Training) -> BestEpochCallback | None:
    """Return the callback that keeps the weights of the best epoch, if the recipe says so."""
    is_selected = training.recipe.train.select == "best"
    return BestEpochCallback(by_loss=training.source.is_multi_label) if is_selected else None


def _freezing(training: Training) -> FreezeCallback | None:
    """Return the callback that trains the heads alone at first, if the schedule says so."""
    schedule = training.recipe.schedule
    if schedule.kind != "fine-tune":
        return None
    return FreezeCallback(frozen_steps(schedule.frozen_share, training.num_steps))


def _scheduler(training: Training) -> ParamScheduler:
    """Create the optimizer, and the callback that sets its learning rate and momentum."""
    learn = training.learn
    if learn.opt is None:
        learn.create_opt()
    hypers = learn.opt.hypers[0]  # some optimizers have no momentum
    functions = schedules(training.recipe, training.steps_per_epoch, training.warmup_steps)
    return ParamScheduler({name: f for name, f in functions.items() if name in hypers})


def describe_run(training: Training, run: RunFolder) -> None:
    """Write the data split, data facts and resolved recipe, for resuming and evaluation."""
    parts = training.source.parts
    if parts is not None:  # before data.json: a run with data.json only is from version 0.1.0
        run.write_split(dataclasses.asdict(parts))
    if training.recipe.data.skip_damaged:
        run.write_left_out(training.source.left_out)
    run.write_data_facts(facts_of(training.source))
    if run.recipe() != training.recipe:
        run.write_recipe(training.recipe)


def _restore(
    store: CheckpointStore,
    state: RunState,
    run: RunFolder,
    say: Callable[[str], None],
    threads: int | None,
) -> Restored | None:
    """Load the newest intact checkpoint into the Learner, and report its position.

    Args:
        store: the checkpoints of the run.
        state: the state into which to load.
        run: the run folder.
        say: see `train`.
        threads: number of threads if results depend on it; otherwise None.
    """
    with rank0_first():
        saved = store.newest()
        if saved is None:
            say("Resuming: there is no checkpoint yet; training starts from the beginning.")
            return None
        restored = state.restore(saved)
        for name, problem in saved.skipped.items():
            say(f"The checkpoint {name} is damaged and was set aside: {problem}.")
        if run.is_writer:
            store.set_aside(saved.skipped)
    epoch, step = restored.position.epoch, restored.position.step
    within = f" and {step} of {restored.steps_per_epoch} steps of the next" if step else ""
    fallback = f" (from the earlier checkpoint {saved.path.name})" if saved.skipped else ""
    epochs = state.identity["recipe"]["train"]["epochs"]
    say(f"Resuming: {epoch} of {epochs} epochs{within} are done{fallback}.")
    for label, before, now in (
        ("torch", restored.torch, torch.__version__),
        ("processes:", restored.num_processes, process_group().count),
        ("threads:", restored.num_threads, threads),
    ):
        if before != now and None not in (before, now):
            say(f"Trained so far with {label} {before}, now {now}: results agree up to rounding.")
    return restored


def _record_threads(
    training: Training, run: RunFolder, restored: Restored | None, done: Position
) -> None:
    """Record that the number of threads is no longer that of the recipe, or is so again."""
    now, before = training.num_threads, training.recipe.train.threads
    if not before or before == "auto":  # torch's default, unless the run has been trained
        before = now if restored is None else restored.num_threads
    is_left = done.epoch * training.steps_per_epoch + done.step < training.num_steps
    if now is not None and before is not None and is_left:
        run.record_threads(now, before, **dataclasses.asdict(done))


def _averaging(learn: Learner) -> EMACallback | None:
    return next((cb for cb in learn.cbs if isinstance(cb, EMACallback)), None)


def _load_final_weights(learn: Learner, best: BestEpochCallback | None) -> None:
    """Load the weights to evaluate: those of the best epoch, or the averages if there are any."""
    if best is not None:
        best.restore(learn.model)
    elif averaging := _averaging(learn):
        averaging.finish()  # has an effect only if a resumed run had no epochs left


def schedules(recipe: Recipe, steps_per_epoch: int, warmup_steps: int) -> dict[str, Any]:
    """Return the learning rate and momentum schedules for fastai's ParamScheduler."""
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
    if schedule.kind == "fine-tune":
        num_steps = (recipe.train.epochs or 1) * steps_per_epoch
        return fine_tune(
            recipe.lr,
            num_steps=num_steps,
            frozen_steps=frozen_steps(schedule.frozen_share, num_steps),
            body_div=schedule.body_div,
            pct_start=schedule.pct_start,
            div=schedule.div,
            div_final=schedule.div_final,
            momentums=schedule.momentums,
        )
    lr = one_cycle(
        recipe.lr / schedule.div, recipe.lr, recipe.lr / schedule.div_final, schedule.pct_start
    )
    start, peak, end = schedule.momentums
    return {"lr": lr, "mom": one_cycle(start, peak, end, schedule.pct_start)}


def _diverged(recipe: Recipe, epoch: int, step: int) -> TrainingDivergedError:
    default = replace(recipe, optimizer=replace(recipe.optimizer, lr=None))
    return TrainingDivergedError(
        f"The training loss is not finite at step {step} of epoch {epoch}.\n"
        f"Lower the learning rate, as in --lr {min(recipe.lr / 4, default.lr):.3g}; "
        "`mixmo lr-find` suggests one."
    )
