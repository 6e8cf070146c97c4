"""The recipe with which each run of a study was started, to notice changes of the study.

A run is found by its name, METHOD-IMAGES-seedS. If settings of the study change, its runs with the
former settings keep their names; they must not be taken for runs with the present ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote

from mixmo_fastai.config.choices import HUB_PREFIX
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import differing_settings, to_toml
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.study.plan import PlannedRun

_OF_THE_MACHINE = {
    ("data", "num_workers"),
    *(("train", key) for key in ("memory_format", "compile", "threads")),
}
"""Settings that do not change what is trained, apart from rounding."""


def record_path(run: PlannedRun, folder: Path) -> Path:
    """Return the file with the recipe of a run, in the folder of its study."""
    return folder / "recipes" / f"{run.name}.toml"


def write_record(run: PlannedRun, folder: Path) -> Path:
    """Write the recipe of a run; return the file.

    Raises:
        RunFailedError: it cannot be written.
    """
    path = record_path(run, folder)
    with writing_study(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_toml(run.recipe), is_shared=True)
    return path


@contextmanager
def writing_study(path: Path) -> Iterator[None]:
    """Convert an OSError while writing a file of a study into a RunFailedError.

    Raises:
        RunFailedError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunFailedError(
            f"Cannot write {path}: {error.strerror or error}.\n"
            "States and results of the runs are kept. Fix the cause, then repeat the command."
        ) from error


def check_unchanged(runs: Sequence[PlannedRun], folder: Path) -> None:
    """Check that the runs which were started have the settings of the study.

    The folder of the data set and the file of weights may be others of the same name, as on another
    machine, and settings of the machine may differ: runs that were started keep theirs.

    Raises:
        InputError: a setting differs; the message names it.
    """
    for run, recorded in _started(runs, folder):
        before, now = map(_without_folders, (recorded, run.recipe))
        for section, key, old, new in differing_settings(before, now):
            if (section, key) in _OF_THE_MACHINE:
                continue
            if (section, key) == ("data", "dataset"):
                raise InputError(
                    f"{run.name} was started with the data set {old!r}; the study now has "
                    f"{new!r}.\nAdd --dataset {quote(recorded.data.dataset)}, or use another --out."
                )
            raise InputError(
                f"{run.name} was started with {_assignment(section, key, old)}; the study now has "
                f"{_assignment(section, key, new)}.\n{_way_out(run, folder)}"
            )


def other_runs(runs: Sequence[PlannedRun], folder: Path) -> list[str]:
    """Return the names of the finished runs in the folder of a study that it does not plan."""
    planned = {run.name for run in runs}
    found = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir())
    return [
        name
        for name in found
        if name not in planned and RunFolder(folder / "runs" / name).is_finished
    ]


def _way_out(run: PlannedRun, folder: Path) -> str:
    run_folder = run.folder(folder)
    ways = "Name a changed method differently, use another --out"
    if run_folder.is_finished:
        return f"{ways}, or undo the change."
    return f"{ways}, or delete {run_folder.path} to train the run again."


def _started(runs: Sequence[PlannedRun], folder: Path) -> Iterator[tuple[PlannedRun, Recipe]]:
    """Yield the runs that were started, with their recorded recipes."""
    for run in runs:
        path = record_path(run, folder)
        if path.exists() and run.folder(folder).path.exists():
            yield run, load_recipe(path)


def _assignment(section: str, key: str, value: object) -> str:
    return f"no {section}.{key}" if value is None else f"{section}.{key}={value!r}"


def check_not_moved(run: PlannedRun, folder: Path) -> None:
    """Check that the data set of an interrupted run, and weights it needs, are where they were.

    Args:
        run: a run that no process trains.
        folder: folder of the study.

    Raises:
        InputError: they are not; the message names both places.
    """
    for _, recorded in _started([run], folder):
        paths = [(recorded.data.dataset, run.recipe.data.dataset)]
        # A state replaces the weights, except those of a deep ensemble's later networks.
        if recorded.model.num_nets > 1 or not run.folder(folder).has_state:
            paths.append((recorded.model.weights, run.recipe.model.weights))
        for old, new in paths:
            if old != new and Path(old).is_absolute() and not Path(old).exists():
                raise InputError(
                    f"{run.name} was started with {old}, which no longer exists.\n"
                    f"Restore it there, or delete {run.folder(folder).path} to train the run again "
                    f"with {new}."
                )


def _without_folders(recipe: Recipe) -> Recipe:
    """Return a recipe with the names of data and weights instead of their paths."""
    dataset = recipe.data.dataset
    if Path(dataset.removeprefix(HUB_PREFIX)).is_absolute():  # not a name of the Hub
        dataset = Path(dataset).name
    data = replace(recipe.data, dataset=dataset)
    model = replace(recipe.model, weights=Path(recipe.model.weights).name)
    return replace(recipe, data=data, model=model)
