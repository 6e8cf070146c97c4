"""Deep ensembles: several networks, trained one after another, evaluated as one.

A run of one network is the plain case of the same path.
"""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from fastai.callback.core import Callback

from mixmo_fastai.assessment import collect_logits
from mixmo_fastai.checkpoints.state import Position
from mixmo_fastai.evaluation import evaluate_splits
from mixmo_fastai.failures import explained
from mixmo_fastai.interruption import StopRequest
from mixmo_fastai.locking import locked
from mixmo_fastai.processes import done_by_first, told_by_first
from mixmo_fastai.randomness import derive_seed
from mixmo_fastai.recipe import Expected, Recipe
from mixmo_fastai.recording import followed
from mixmo_fastai.runs import RunFolder, create_run
from mixmo_fastai.training import TEST_SET, Training, describe_run, prepare_network, train


def train_run(
    training: Training,
    run: RunFolder,
    *,
    cbs: Sequence[Callback] = (),
    resume: bool = False,
    stop: StopRequest | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train every network of a run, evaluate them as one, and write the run folder.

    Args:
        training: from `prepare`.
        run: where everything goes; each network of an ensemble gets a folder of its own inside.
        cbs: more fastai callbacks, such as a display; they see one fit per network. A
            `FollowingCallback` sees the evaluations and the end as well.
        resume: continue: networks that are finished stay as they are.
        stop: whether a signal asked to stop.
        say: told which network begins, where there are several, and where a resumed one goes on.

    Returns:
        the final figures, as in metrics.json. Each network counts as one member there.

    Raises:
        InputError: no checkpoint to resume from is intact, or it is of another run.
        InputError: another process trains in the folder.
        RunFailedError: see `train`.
        InterruptedBySignal: somebody asked to stop.
    """
    recipe = training.recipe
    if resume:
        run.check_resumable()
    with _locked(run):
        if recipe.model.num_nets == 1:
            return train(training, run, cbs=cbs, resume=resume, stop=stop, say=say)
        return _train_networks(training, run, cbs=cbs, resume=resume, stop=stop, say=say)


@contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    """Keep a run to the processes that train it together; the first holds the lock."""
    with ExitStack() as held:
        done_by_first(lambda: held.enter_context(locked(run.path)))
        yield


def _train_networks(
    training: Training,
    run: RunFolder,
    *,
    cbs: Sequence[Callback],
    resume: bool,
    stop: StopRequest | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    recipe = training.recipe
    describe_run(training, run)
    folders = run.networks()
    for index, folder in enumerate(folders):
        own = network_recipe(recipe, index)
        place = f"Network {index + 1} of {len(folders)}, seed {own.train.seed}"
        if resume and told_by_first(folder.is_finished):
            say(f"{place}: finished.")
            continue
        say(f"{place}: {folder.path}")
        part = _network(training, own, index)
        begun = told_by_first(run.is_writer and resume and _is_begun(folder))
        if not begun and run.is_writer:
            create_run(
                own,
                folder.path,
                device=training.device_name,
                acceleration=training.acceleration.describe(),
            )
        with _locked(folder):
            train(part, folder, cbs=cbs, resume=begun, stop=stop, say=say)
        del part  # before the next is built
        gc.collect()  # a Learner and its callbacks hold each other
    loaders = training.learn.dls.valid, training.learn.dls[TEST_SET]
    parts = told_by_first(run.is_writer and [folder.metrics() for folder in folders])
    selected = [part["selected_epoch"] for part in parts if "selected_epoch" in part]
    with followed(cbs, training, run, Position(recipe.train.epochs)) as followers:
        with explained(recipe, training.acceleration.describe()):
            valid, test = collect_logits(run, training.learn.model, loaders)
            evaluated = evaluate_splits(valid, test)
        figures = {
            **training.summary(),
            **({"selected_epoch": selected} if selected else {}),
            "seconds": round(sum(float(part["seconds"]) for part in parts), 1),
            **evaluated,
        }
        run.write_metrics(figures)
        for follower in followers:
            follower.after_evaluation(figures, test or valid)
    return figures


def _network(training: Training, recipe: Recipe, index: int) -> Training:
    """Build one network; the first is there already."""
    if index == 0:
        return replace(training, recipe=recipe)
    return prepare_network(recipe, training.source, training.learn.dls)


def network_recipe(recipe: Recipe, index: int) -> Recipe:
    """Give the recipe of one network of an ensemble, counted from 0.

    The first has the ensemble's own seed and is thus the network that the recipe trains alone. The
    seeds of the others follow from it, so that ensembles of other seeds share no network. The
    ensemble's name and published figure are not those of its parts.
    """
    seed = recipe.train.seed
    own = derive_seed(seed, "network", step=index) if index else seed
    return replace(
        recipe,
        name="",
        title="",
        model=replace(recipe.model, num_nets=1),
        train=replace(recipe.train, seed=own),
        expected=Expected(),
    )


def _is_begun(folder: RunFolder) -> bool:
    """Tell whether a network was begun; without its recipe, what is there is of no use."""
    if (folder.path / "recipe.toml").is_file():
        return True
    shutil.rmtree(folder.path, ignore_errors=True)
    return False
