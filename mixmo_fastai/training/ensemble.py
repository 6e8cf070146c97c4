"""Deep ensembles: networks that are trained one after another and evaluated together.

`train_run` also trains runs of a single network.
"""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from fastai.callback.core import Callback

from mixmo_fastai.config.recipe import Expected, Recipe
from mixmo_fastai.data.run_data import changed_images
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.logits import collect_logits
from mixmo_fastai.rng import derive_seed
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.lock import FolderInUseError, locked
from mixmo_fastai.runtime.processes import broadcast_from_rank0, run_on_rank0
from mixmo_fastai.runtime.signals import StopRequest
from mixmo_fastai.training.failures import readable_errors
from mixmo_fastai.training.final import evaluate_and_calibrate
from mixmo_fastai.training.prepare import Training, prepare_network
from mixmo_fastai.training.run_callbacks import entered_run_callbacks
from mixmo_fastai.training.state import Position
from mixmo_fastai.training.train import describe_run, train


def train_run(
    training: Training,
    run: RunFolder,
    *,
    cbs: Sequence[Callback] = (),
    resume: bool = False,
    stop: StopRequest | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train every network of a run, evaluate the ensemble, and write the run folder.

    Args:
        training: from `prepare`.
        run: the run folder; each network of an ensemble gets its own folder inside.
        cbs: additional fastai callbacks, such as a progress display; they see one fit per network.
            A `RunCallback` also sees the evaluations and the end.
        resume: continue the run; finished networks are not trained again.
        stop: whether a signal asked to stop.
        say: called with a line when a network of an ensemble starts and when training resumes.

    Returns:
        the final metrics, as in metrics.json. Each network counts as one member there.

    Raises:
        InputError: no checkpoint is intact, the checkpoint belongs to another run, or another
        process trains in the folder.
        RunFailedError: see `train`.
        InterruptedBySignal: a signal asked to stop.
    """
    recipe = training.recipe
    if resume:
        run.check_resumable()
    with _locked(run):
        if recipe.model.num_nets == 1:
            return train(training, run, cbs=cbs, resume=resume, stop=stop, say=say)
        describe_run(training, run)
        numbers = range(1, recipe.model.num_nets + 1)
        _train_networks(training, run, numbers, cbs=cbs, resume=resume, stop=stop, say=say)
        return _evaluate_networks(training, run, cbs)


def train_nets(
    training: Training,
    run: RunFolder,
    nets: Sequence[int],
    *,
    cbs: Sequence[Callback] = (),
    stop: StopRequest | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Train some networks of a deep ensemble; other processes may train the others meanwhile.

    Networks that have a state are resumed, and finished ones are not trained again. The process
    that finishes last evaluates the ensemble.

    Args:
        training: see `train_run`.
        run: see `train_run`.
        nets: numbers of the networks, from 1, as in the names of their folders.
        cbs: see `train_run`.
        stop: see `train_run`.
        say: see `train_run`.

    Returns:
        the final metrics, or None if networks are missing or another process evaluates them.

    Raises:
        InputError: as for `train_run`, or there is no network of a number.
        RunFailedError: see `train`.
        InterruptedBySignal: a signal asked to stop.
    """
    check_nets(nets, training.recipe.model.num_nets)
    if run.data_facts() is None:  # no process has described it before
        describe_run(training, run)
    _train_networks(training, run, nets, cbs=cbs, resume=True, stop=stop, say=say)
    return _evaluate_if_complete(training, run, cbs, say)


def check_nets(nets: Sequence[int], num_nets: int) -> None:
    """Check the numbers of networks.

    Raises:
        InputError: the run is no deep ensemble, or has no network of a number.
    """
    if num_nets == 1:
        raise InputError("--nets is for deep ensembles; this run has one network.")
    for number in nets:
        if not 1 <= number <= num_nets:
            raise InputError(
                f"There is no network {number}: the networks are numbered from 1 to {num_nets}."
            )


def _evaluate_if_complete(
    training: Training, run: RunFolder, cbs: Sequence[Callback], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Evaluate the ensemble if all networks are finished and no other process does."""
    finished = broadcast_from_rank0(
        run.is_writer and [folder.is_finished for folder in run.networks()]
    )
    if not all(finished):
        say(
            f"{sum(finished)} of {len(finished)} networks are finished; the last one to finish "
            "evaluates the ensemble."
        )
        return None
    try:
        with _locked(run):
            if broadcast_from_rank0(run.is_writer and run.is_finished):
                return run.metrics()
            return _evaluate_networks(training, run, cbs)
    except FolderInUseError:
        say("All networks are finished; another process evaluates the ensemble.")
        return None


@contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    """Lock a run against other trainings; rank 0 holds the lock."""
    with ExitStack() as stack:
        run_on_rank0(lambda: stack.enter_context(locked(run.path)))
        yield


def _train_networks(
    training: Training,
    run: RunFolder,
    numbers: Sequence[int],
    *,
    cbs: Sequence[Callback],
    resume: bool,
    stop: StopRequest | None,
    say: Callable[[str], None],
) -> None:
    """Train networks, given by their numbers from 1."""
    folders = run.networks()
    if resume:
        _check_same_images(training, run)
    for number in numbers:
        index, folder = number - 1, folders[number - 1]
        net_recipe = network_recipe(training.recipe, index)
        label = f"Network {number} of {len(folders)}, seed {net_recipe.train.seed}"
        if resume and broadcast_from_rank0(folder.is_finished):
            say(f"{label}: finished.")
            continue
        say(f"{label}: {folder.path}")
        has_started = broadcast_from_rank0(run.is_writer and resume and _has_started(folder))
        net_training = _network_training(
            training, net_recipe, index, folder if has_started else None
        )
        if not has_started and run.is_writer:
            create_run(
                net_recipe,
                folder.path,
                device=training.device_name,
                acceleration=training.acceleration.describe(),
            )
        with _locked(folder):
            train(net_training, folder, cbs=cbs, resume=has_started, stop=stop, say=say)
        del net_training  # free its memory before the next network is built
        gc.collect()  # a Learner and its callbacks form reference cycles


def _check_same_images(training: Training, run: RunFolder) -> None:
    """Check that the images are those of the first network, if it is finished.

    Raises:
        InputError: they are not.
    """
    first = run.networks()[0]
    changed = broadcast_from_rank0(
        run.is_writer and first.is_finished and changed_images(run, training.source)
    )
    if changed:
        raise InputError(
            f"The images ({', '.join(sorted(changed))}) differ from those of {first.path}.\n"
            "Restore the data, or start a new run."
        )


def _evaluate_networks(
    training: Training, run: RunFolder, cbs: Sequence[Callback]
) -> dict[str, Any]:
    """Evaluate the trained networks as one ensemble, and write the final metrics."""
    recipe, folders = training.recipe, run.networks()
    loaders = training.learn.dls.loaders[1:]
    per_network = broadcast_from_rank0(run.is_writer and [folder.metrics() for folder in folders])
    selected = [each["selected_epoch"] for each in per_network if "selected_epoch" in each]
    with entered_run_callbacks(cbs, training, run, Position(recipe.train.epochs)) as run_callbacks:
        acceleration = training.acceleration
        with readable_errors(recipe, acceleration.describe()), acceleration.threaded():
            logits = collect_logits(run, training.learn.model, loaders)
            evaluated = evaluate_and_calibrate(run, loaders, logits)
            valid, test = logits[:2]
        metrics = {
            **training.summary(),
            **({"selected_epoch": selected} if selected else {}),
            "seconds": round(sum(float(each["seconds"]) for each in per_network), 1),
            **evaluated,
        }
        run.write_metrics(metrics)
        for callback in run_callbacks:
            callback.after_evaluation(metrics, test or valid)
    return metrics


def _network_training(
    training: Training, recipe: Recipe, index: int, resumed: RunFolder | None
) -> Training:
    """Prepare the training of one network; the first one is built already.

    It must be built again after another one, whose seed the loaders then have.
    """
    if index == 0 and training.learn.dls.train.seed == recipe.train.seed:
        return replace(training, recipe=recipe)
    return prepare_network(
        recipe, training.source, training.learn.dls, threads=training.threads, resumed=resumed
    )


def network_recipe(recipe: Recipe, index: int) -> Recipe:
    """Return the recipe of one network of an ensemble, counted from 0.

    The first network has the ensemble's seed, so it equals the network of the same recipe with
    `num_nets = 1`. The other seeds are derived from that seed, so ensembles with different seeds
    share no network. Name, title and published result of the ensemble are removed.
    """
    seed = recipe.train.seed
    net_seed = derive_seed(seed, "network", step=index) if index else seed
    return replace(
        recipe,
        name="",
        title="",
        model=replace(recipe.model, num_nets=1),
        train=replace(recipe.train, seed=net_seed),
        expected=Expected(),
    )


def _has_started(folder: RunFolder) -> bool:
    """Check whether a network has a run folder; remove an incomplete one without a recipe."""
    if (folder.path / "recipe.toml").is_file():
        return True
    shutil.rmtree(folder.path, ignore_errors=True)
    return False
