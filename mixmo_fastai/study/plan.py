"""The runs of a study, read from a TOML file. Nothing that it imports needs torch.

    name = "small-cifar10"
    dataset = "images/cifar10"
    seeds = [0, 1, 2]
    images_seen = [300_000, 1_500_000]
    set = ["data.limit=2000", "model.arch=wrn10_4"]

    [methods.vanilla]
    recipe = "cifar10/vanilla"

    [methods.ensemble]
    recipe = "cifar10/deep-ensemble"
    set = ["mix.msda=cutmix"]
    budget = "each"

`set` holds assignments as for `mixmo fit --set`; those of a method follow those of the study. A
method may have its own `seeds` and `images_seen`. The networks of a deep ensemble share the images
seen, unless `budget` is "each": then each network sees as many.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixmo_fastai.config.recipe import Data, Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.config.schema import TOML_ERRORS
from mixmo_fastai.errors import InputError, did_you_mean, nearest
from mixmo_fastai.runs.folder import RunFolder

BUDGETS = ("in all", "each")
MAX_SEED, MAX_IMAGES = 2**63 - 1, 10**15
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_OWN_KEYS = {
    "train.seed": "seeds",
    "train.epochs": "images_seen",
    "train.images_seen": "images_seen",
    "data.dataset": "dataset",
}
"""Settings of a recipe that a study sets by its own keys."""
_CHARACTERS = "letters, digits, '.', '_' and '-'"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        method: name of the method.
        images_seen: the length of training in the table of the study; with the budget "each", the
            networks of a deep ensemble together see more.
        seed: seed.
        recipe: its recipe; the number of epochs is open.
    """

    method: str
    images_seen: int
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.method}-{self.images_seen}-seed{self.seed}"

    def folder(self, study_folder: Path) -> RunFolder:
        """Return the run's folder in the folder of its study; it may not exist yet."""
        return RunFolder(study_folder / "runs" / self.name)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: its name.
        methods: names of the methods, in the order of the file.
        runs: its runs, in the order in which they are trained: short ones first, so that every
            method has its first results early.
    """

    name: str
    methods: tuple[str, ...]
    runs: tuple[PlannedRun, ...]

    def check_method(self, name: str | None) -> str:
        """Return the name of a method; the first one for None.

        Raises:
            InputError: there is no such method.
        """
        if name is not None and name not in self.methods:
            guess = nearest(name, self.methods, shortened=True)
            hint = did_you_mean(guess)
            raise InputError(
                f"There is no method {name!r}.{hint}\nMethods: {', '.join(self.methods)}."
            )
        return name or self.methods[0]

    def choose(
        self,
        methods: Sequence[str] = (),
        seeds: Sequence[int] = (),
        images_seen: Sequence[int] = (),
    ) -> tuple[PlannedRun, ...]:
        """Return the runs of some methods, seeds and training lengths; empty ones mean all.

        Raises:
            InputError: one of them does not occur in the study, or no run has all three.
        """
        for name in methods:
            self.check_method(name)
        chosen = tuple(run for run in self.runs if not methods or run.method in methods)
        for key, values in {"seed": seeds, "images_seen": images_seen}.items():
            known = sorted({getattr(run, key) for run in self.runs})
            for value in values:
                if value not in known:
                    raise InputError(
                        f"No run of the study has {key}={value}.\n"
                        f"Available: {', '.join(map(str, known))}."
                    )
            if values:
                chosen = tuple(run for run in chosen if getattr(run, key) in values)
        if not chosen:
            raise InputError(
                "No run of the study has this combination of method, seed and length.\n"
                "A method may have its own seeds and images_seen in the file."
            )
        return chosen


def read_study(path: Path, dataset: str | None = None, *, must_exist: bool = True) -> Study:
    """Read a study and resolve the recipes of all runs.

    Args:
        path: a TOML file.
        dataset: data set or image folder instead of that of the file.
        must_exist: whether the data set and files of weights must exist.

    Raises:
        InputError: the file is missing or invalid, or a recipe is.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The study {str(path)!r} cannot be read: {error.strerror}.") from error
    except TOML_ERRORS as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error
    source = str(path)
    defaults = {"name": path.stem, "dataset": "digits", "seeds": [0], "images_seen": [], "set": []}
    _check_keys(values, {**defaults, "methods": {}}, source)
    given, values = values, {**defaults, **values}
    if dataset is not None:
        values["dataset"] = dataset
    for key in ("name", "dataset"):
        _check(isinstance(values[key], str), f"{source}: {key}", values[key], "a string")
    if not _NAME.fullmatch(values["name"].lower()):
        hint = "" if "name" in given else "\nThe file has no name, so that of the file is used."
        raise InputError(
            f"{source}: name is {values['name']!r}; it may contain {_CHARACTERS}.{hint}"
        )
    methods = values.get("methods")
    if not isinstance(methods, Mapping) or not methods:
        raise InputError(f"{source} has no methods.\nAdd a section such as [methods.vanilla].")
    runs = [
        run
        for name, method in methods.items()
        for run in _runs_of(name, method, values, f"{source}: methods.{name}", must_exist)
    ]
    _check_equal_data(runs, source)
    order = sorted(runs, key=lambda run: (run.images_seen, run.seed))
    return Study(str(values["name"]), tuple(methods), tuple(order))


def _runs_of(
    name: str, method: Any, study: Mapping[str, Any], source: str, must_exist: bool
) -> list[PlannedRun]:
    if not _NAME.fullmatch(name):
        raise InputError(f"{source}: names consist of lower-case {_CHARACTERS}.")
    _check(isinstance(method, Mapping), source, method, "a section")
    known = {"recipe": "", "set": [], "seeds": [], "images_seen": [], "budget": ""}
    _check_keys(method, known, source)
    if not isinstance(recipe := method.get("recipe"), str):
        raise InputError(f"{source}.recipe is missing.\nSet it to a name of `mixmo recipes`.")
    budget = method.get("budget", BUDGETS[0])
    _check(budget in BUDGETS, f"{source}.budget", budget, " or ".join(map(repr, BUDGETS)))
    file = source.partition(":")[0]
    assignments = [
        *_assignments(study["set"], f"{file}: set"),
        *_assignments(method.get("set", []), f"{source}.set"),
    ]
    if "images_seen" not in method and study["images_seen"] == []:
        raise InputError(
            f"{file}: images_seen is missing.\nSet the number of images that a training shows, "
            "such as images_seen = [60_000]."
        )
    seeds, lengths = (
        _numbers(method[key], f"{source}.{key}", *limits)
        if key in method
        else _numbers(study[key], f"{file}: {key}", *limits)
        for key, limits in (("seeds", (0, MAX_SEED)), ("images_seen", (1, MAX_IMAGES)))
    )
    runs = []
    for length in lengths:
        resolved = _resolve(
            study["dataset"],
            recipe,
            [*assignments, f"train.images_seen={length}"],
            source,
            must_exist=must_exist,
        )
        total = length * (resolved.model.num_nets if budget == "each" else 1)
        for seed in seeds:
            train = replace(resolved.train, seed=seed, images_seen=total)
            runs.append(PlannedRun(name, length, seed, replace(resolved, train=train)))
    return runs


def _resolve(
    dataset: str, recipe: str, assignments: Sequence[str], source: str, *, must_exist: bool
) -> Recipe:
    try:
        return resolve_recipe(
            dataset, recipe, {}, assignments, source=source, must_exist=must_exist
        )
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


def _check_equal_data(runs: Sequence[PlannedRun], source: str) -> None:
    """Check that all runs have the same data, and thus the same test images."""
    for key in _EQUAL_KEYS:
        _check_equal(key, runs, source)
    if _is_evaluated_on_validation(runs[0].recipe.data):
        _check_equal("valid_split", runs, source)


def _check_equal(key: str, runs: Sequence[PlannedRun], source: str) -> None:
    found = {getattr(run.recipe.data, key) for run in runs}
    if len(found) > 1:
        names = ", ".join(sorted(map(repr, found)))
        raise InputError(
            f"{source}: data.{key} differs between methods: {names}.\n"
            f"Set it for all methods: set = ['data.{key}=…']."
        )


_EQUAL_KEYS = (
    *("dataset", "image_size", "test_split", "fold"),
    *("path_column", "label_column", "split_column", "group_column", "image_folder"),
)
"""Settings of the data that decide which images are the test images."""


def _is_evaluated_on_validation(data: Data) -> bool:
    """Whether `valid_split` surely decides on which images runs are evaluated."""
    if data.test_split != 0:
        return False
    path = Path(os.path.expanduser(data.dataset))
    if path.is_dir():
        from mixmo_fastai.data.layout import find_split_folders  # imports torch

        try:
            folders = find_split_folders(path)
        except InputError:  # each run tells
            return False
        return folders.valid is None and folders.test is None
    return path.is_file() and not data.split_column and not data.fold


def _check_keys(values: Mapping[str, Any], known: Mapping[str, Any], source: str) -> None:
    for key in values:
        if key not in known:
            guess = nearest(key, known)
            hint = did_you_mean(guess)
            raise InputError(f"{source}: unknown key {key!r}.{hint}\nAllowed: {', '.join(known)}.")


def _check(is_valid: bool, label: str, value: object, expected: str) -> None:
    if not is_valid:
        raise InputError(f"{label} is {str(value)[:60]!r}; it must be {expected}.")


def _assignments(value: Any, label: str) -> list[str]:
    is_valid = isinstance(value, list) and all(isinstance(each, str) for each in value)
    _check(is_valid, label, value, "a list of assignments such as 'train.batch_size=32'")
    for key in (assignment.partition("=")[0].strip() for assignment in value):
        if key in _OWN_KEYS:
            raise InputError(f"{label} contains {key}.\nUse the study's {_OWN_KEYS[key]} instead.")
    return list(value)


def _numbers(value: Any, label: str, minimum: int, maximum: int) -> list[int]:
    is_valid = isinstance(value, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and minimum <= each <= maximum
        for each in value
    )
    expected = f"a list of integers from {minimum} to {maximum}"
    _check(is_valid and bool(value), label, value, expected)
    _check(len(set(value)) == len(value), label, value, "a list without repetitions")
    return list(value)
