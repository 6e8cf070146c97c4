"""From what a user says to one recipe: data set, recipe, flags and assignments, in that order.

Standard library only, so that a wrong word is refused before torch is imported.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mixmo_fastai.errors import InputError, unknown
from mixmo_fastai.names import DATASETS, MASK_KINDS
from mixmo_fastai.recipe import (
    Expected,
    Recipe,
    default_valid_split,
    load_recipe,
    override,
    recipe_from_mapping,
    recipe_names,
    to_mapping,
)

METHODS = {"cutmix": "cut-mixmo", "linear": "linear-mixmo", "sum": "mimo"}
"""The recipe that stands for a mask kind of several members."""
SINGLE_METHODS = {None: "vanilla", "none": "vanilla", "cutmix": "cutmix", "mixup": "mixup"}
"""The recipe that stands for the mixing of pixels, for a network of one member."""


def resolve_recipe(
    dataset: str | None = None,
    recipe: str | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> Recipe:
    """Decide what is to be run.

    Args:
        dataset: a named data set or a folder; the recipe's where not given, and "digits" without
            a recipe.
        recipe: a name or a file; where not given, the recipe of the data set and mask kind if there
            is one, and the defaults otherwise.
        flags: settings such as {"model.arch": "wrn28_10"}; None leaves one as it is.
        assignments: such as "optimizer.lr=0.05".

    Raises:
        InputError: a name is unknown or a value impossible.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    if dataset is not None:
        check_dataset(dataset)
    base = load_recipe(recipe) if recipe else default_recipe(dataset or "digits", given)
    if dataset is not None:
        given["data.dataset"] = dataset
    resolved = override(_with_flags(base, given), assignments)
    check_dataset(resolved.data.dataset)  # a recipe or an assignment may name it as well
    return _renamed(_with_whole_path(resolved), base)


def _with_whole_path(recipe: Recipe) -> Recipe:
    """A run is evaluated from other folders than the one it was started in."""
    if recipe.data.dataset in DATASETS:
        return recipe
    whole = os.path.abspath(os.path.expanduser(recipe.data.dataset))
    return replace(recipe, data=replace(recipe.data, dataset=whole))


def _renamed(recipe: Recipe, base: Recipe) -> Recipe:
    """Take name and published figure from a recipe that flags turned into another method."""
    methods = {
        (r.mix.kind, r.mix.msda, r.model.num_members, r.model.num_nets) for r in (recipe, base)
    }
    if len(methods) == 1 and recipe.data.dataset == base.data.dataset:
        return recipe
    return replace(recipe, name="", title="", expected=Expected())


def departures(recipe: Recipe) -> list[str]:
    """List the settings in which a recipe departs from the shipped one of its name.

    Seed, place and loader are left out: they do not decide what figure to expect. So is what was
    published, where this project's own choice is another.
    """
    if recipe.name not in recipe_names():
        return []
    own, shipped = (_with_own_data_settings(r) for r in (recipe, load_recipe(recipe.name)))
    return [
        f"{section}.{key}"
        for section in ("data", "model", "mix", "train", "optimizer", "schedule")
        for key in sorted(own[section].keys() | shipped[section].keys())
        if own[section].get(key) != shipped[section].get(key) and key not in _INDIFFERENT
        if (key, own[section].get(key)) not in _AS_PUBLISHED
    ]


def _with_own_data_settings(recipe: Recipe) -> dict[str, Any]:
    values, info = to_mapping(recipe), DATASETS.get(recipe.data.dataset)
    if info:
        own = {
            "crop_padding": info.crop_padding,
            "flip": info.flip,
            "image_size": 0,
            "valid_split": default_valid_split(info.num_images[0]),
        }
        values["data"] = {**own, **values["data"]}
    return values


_INDIFFERENT = (
    *("seed", "device", "precision", "memory_format", "compile", "threads"),
    *("loader", "num_workers", "skip_damaged"),
)
_AS_PUBLISHED = (("kind", "published"), ("valid_split", 0.0))


def default_recipe(dataset: str, flags: Mapping[str, Any]) -> Recipe:
    """Find the recipe that is nearest to what was asked for; the defaults for other data."""
    kind, msda = flags.get("mix.kind"), flags.get("mix.msda")
    if kind is not None and kind not in MASK_KINDS:
        raise unknown("mask kind", str(kind), MASK_KINDS)
    if flags.get("model.num_members") == 1 and kind in (None, "sum"):
        candidates = [SINGLE_METHODS.get(msda), "vanilla"]
        fallback = {"mix": {"kind": "sum", "batch_repetitions": 1}, "model": {"num_members": 1}}
    else:
        method = METHODS.get(kind or "cutmix", "cut-mixmo")
        candidates = [f"{method}-{msda}" if msda else method, method, "cut-mixmo"]
        fallback = {}
    names = recipe_names()
    found = (f"{dataset}/{name}" for name in candidates if f"{dataset}/{name}" in names)
    name = next(found, None)
    return load_recipe(name) if name else recipe_from_mapping(fallback, "defaults")


def check_dataset(dataset: str) -> None:
    """Check that a data set has a known name or is a folder.

    Raises:
        InputError: with the nearest name.
    """
    # The functions of os.path take any text; pathlib's raise on some that are no path.
    if dataset in DATASETS or os.path.isdir(os.path.expanduser(dataset)):
        return
    if os.sep in dataset or dataset.startswith((".", "~")) or os.path.exists(dataset):
        raise InputError(
            f"There is no folder {dataset!r}.\n"
            f"Give a folder that holds one folder per class, or one of: {', '.join(DATASETS)}."
        )
    raise InputError(f"{unknown('data set', dataset, DATASETS)} Or the path of an image folder.")


def _with_flags(base: Recipe, given: Mapping[str, Any]) -> Recipe:
    values = to_mapping(base)
    for key, value in given.items():
        section, name = key.split(".")
        values[section][name] = value
    return recipe_from_mapping(values, "Command line")
