"""Resolve a recipe from data set, recipe name, flags and assignments, applied in that order.

Standard library only, so that invalid input is refused before torch is imported.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from shlex import quote
from typing import Any

from mixmo_fastai.config.choices import DATASETS, HUB_PREFIX, MASK_REGIONS, TABLE_SUFFIXES, is_table
from mixmo_fastai.config.defaults import fill_defaults
from mixmo_fastai.config.load import load_recipe, override, recipe_from_mapping, recipe_names
from mixmo_fastai.config.recipe import (
    Data,
    Expected,
    Model,
    Optimizer,
    Recipe,
    default_valid_split,
)
from mixmo_fastai.config.schema import parse_value, to_mapping
from mixmo_fastai.errors import InputError, unknown_name_error

METHODS = {"cutmix": "cut-mixmo", "linear": "linear-mixmo", "sum": "mimo"}
"""Recipe of each mask kind, for several members."""
SINGLE_METHODS = {None: "vanilla", "none": "vanilla", "cutmix": "cutmix", "mixup": "mixup"}
"""Recipe of each MSDA kind, for a network of one member."""
_SETTINGS_OF_FILES = (
    *("path_column", "label_column", "split_column", "group_column"),
    *("fold", "image_folder", "label_delimiter", "test_split", "crop_from"),
)
"""Settings of `data` that are for folders and tables of images only."""


def resolve_recipe(
    dataset: str | None = None,
    recipe: str | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    *,
    source: str = "--set",
    must_exist: bool = True,
) -> Recipe:
    """Resolve the recipe of a run.

    Args:
        dataset: a named data set or a folder; by default that of the recipe, or "digits" without
            a recipe.
        recipe: a recipe name or file; by default the shipped recipe for the data set and mask kind
            if there is one, otherwise the default settings.
        flags: settings such as {"model.arch": "wrn28_10"}; None keeps the value of the recipe.
        assignments: assignments such as "optimizer.lr=0.05".
        source: what messages name as the source of the assignments.
        must_exist: whether the data set and a file of weights must exist; otherwise a recipe for
            images of one's own needs no data set.

    Raises:
        InputError: a name is unknown or a value invalid.
    """
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    if dataset is not None and must_exist:
        check_dataset(dataset)
    base = load_recipe(recipe) if recipe else default_recipe(dataset or "digits", flags)
    if dataset is not None:
        flags["data.dataset"] = dataset
    assignments = list(assignments)
    values = {**flags, **_assigned(assignments)}
    _check_members(recipe, base, values)
    base = _without_stale_options(base, values)
    base = _without_other_length(base, values)
    base = _without_settings_of_files(base, values.get("data.dataset"))
    flags_source = "Command line" if source == "--set" else source
    resolved = override(_with_flags(base, flags, flags_source), assignments, source)
    if not resolved.data.dataset and must_exist:
        name = recipe or base.name
        raise InputError(
            f"The recipe {name} is for images of your own.\nPass a folder, a table of labels or "
            f"hf:NAME: mixmo fit PATH --recipe {name}"
        )
    if must_exist:
        check_dataset(resolved.data.dataset)  # recipes and assignments may set it too
    absolute = _make_paths_absolute(resolved, must_exist=must_exist)
    return _clear_stale_name(absolute, base)


def _check_members(recipe: str | None, base: Recipe, values: Mapping[str, Any]) -> None:
    """Check that one member was not chosen with a shipped recipe that mixes several."""
    if not recipe or values.get("model.num_members") != 1 or "mix.kind" in values:
        return
    plain = recipes_for_one_member(base)
    if base.model.num_members > 1 and base.mix.kind != "sum" and plain:
        names = " or ".join(filter(None, (", ".join(plain[:-1]), plain[-1])))
        raise InputError(
            f"The recipe {recipe} is for several members.\nFor one member, use the recipe {names}."
        )


def recipes_for_one_member(recipe: Recipe) -> list[str]:
    """Return the shipped recipes of one member for the same data set, the one to try first first.

    That is mixup, the most accurate one in short trainings on few images, and vanilla without it.
    """
    family, known = recipe.name.rpartition("/")[0], recipe_names()
    names = (f"{family}/{method}" for method in ("mixup", "vanilla", "cutmix"))
    return [name for name in names if name in known]


def _assigned(assignments: Iterable[str]) -> dict[str, Any]:
    pairs = (assignment.partition("=") for assignment in assignments)
    return {key.strip(): parse_value(text) for key, _, text in pairs}


def _without_stale_options(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Drop settings of the recipe's optimizer, transform and weights if others are assigned."""
    recipe = _with_weights(_with_transform(recipe, values), values)
    name = values.get("optimizer.name", recipe.optimizer.name)
    if name == recipe.optimizer.name or not isinstance(name, str):
        return recipe
    default = Optimizer()
    optimizer = replace(
        recipe.optimizer,
        name=name,
        # With an assigned rate, any valid one until it is applied; else None, which is refused.
        lr=recipe.lr if "optimizer.lr" in values else None,
        options={},
        momentum=default.momentum,
        nesterov=default.nesterov,
    )
    return replace(recipe, optimizer=optimizer)


def _without_other_length(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Drop the recipe's length of training if another is assigned, in epochs or images seen."""
    if values.keys().isdisjoint({"train.epochs", "train.images_seen"}):
        return recipe
    return replace(recipe, train=replace(recipe.train, epochs=None, images_seen=None))


def _without_settings_of_files(recipe: Recipe, dataset: object) -> Recipe:
    """Drop the recipe's columns and test split if a named data set replaces its image files."""
    if dataset not in DATASETS or recipe.data.dataset in DATASETS:
        return recipe
    default = {name: getattr(Data, name) for name in _SETTINGS_OF_FILES}
    return replace(recipe, data=replace(recipe.data, **default))


def _with_transform(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """Drop the options of the recipe's transform if another transform is assigned."""
    name = values.get("data.transform", recipe.data.transform)
    if name == recipe.data.transform or not isinstance(name, str):
        return recipe
    return replace(recipe, data=replace(recipe.data, transform=name, transform_options={}))


def _with_weights(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """Drop the recipe's perturbation if no pretrained weights are to be perturbed."""
    model = recipe.model
    has_weights = any(
        values.get(f"model.{key}", getattr(model, key)) for key in ("pretrained", "weights")
    )
    if has_weights:
        return recipe
    return replace(recipe, model=replace(model, perturbation=Model.perturbation))


def _make_paths_absolute(recipe: Recipe, *, must_exist: bool) -> Recipe:
    """Make the paths of data and weights absolute, so that a run works from any directory."""
    if recipe.model.weights:
        weights = os.path.abspath(os.path.expanduser(recipe.model.weights))
        if must_exist and not os.path.isfile(weights):
            raise _no_weights(recipe.model.weights)
        recipe = replace(recipe, model=replace(recipe.model, weights=weights))
    if not recipe.data.dataset or recipe.data.dataset in DATASETS:
        return recipe
    dataset, prefix = recipe.data.dataset, ""
    if dataset.startswith(HUB_PREFIX):
        dataset, prefix = dataset.removeprefix(HUB_PREFIX), HUB_PREFIX
        if not os.path.exists(os.path.expanduser(dataset)):
            return recipe  # a name
    absolute = prefix + os.path.abspath(os.path.expanduser(dataset))
    return replace(recipe, data=replace(recipe.data, dataset=absolute))


def _no_weights(name: str) -> InputError:
    """Build the error for weights that are no file; in a run folder, name its file."""
    if not os.path.isdir(os.path.expanduser(name)):
        return InputError(f"model.weights: there is no file {name!r}.")
    file = os.path.join(name, "model.safetensors")
    found = os.path.isfile(os.path.expanduser(file))
    advice = f"\nName its file: --set {quote(f'model.weights={file}')}" if found else ""
    return InputError(f"model.weights: {name!r} is a folder, not a file of weights.{advice}")


def _clear_stale_name(recipe: Recipe, base: Recipe) -> Recipe:
    """Clear what is no longer true.

    Name, title and published accuracy are cleared if flags changed the method or the data set of
    the recipe; the title also if it states a network or a number of images that they changed.
    """
    if recipe.title == base.title and _states_old_value(base, recipe):
        recipe = replace(recipe, title="")
    methods = {
        (r.mix.kind, r.mix.msda, r.model.num_members, r.model.num_nets) for r in (recipe, base)
    }
    if len(methods) == 1 and base.data.dataset in ("", recipe.data.dataset):
        return recipe
    title = "" if recipe.title == base.title else recipe.title
    return replace(recipe, name="", title=title, expected=Expected())


def _states_old_value(base: Recipe, recipe: Recipe) -> bool:
    """Check whether the title of `base` states a network or a limit that `recipe` does not have."""
    arch, limit, title = base.model.arch, base.data.limit, base.title
    return bool(
        (arch and arch != recipe.model.arch and _plain(arch) in _plain(title))
        or (limit and limit != recipe.data.limit and f"{limit:,} images" in title)
    )


def _plain(text: str) -> str:
    """Return letters and digits in lower case: "WRN-28-10" and "wrn28_10" become equal."""
    return "".join(filter(str.isalnum, text.lower()))


def changed_settings(recipe: Recipe) -> list[str]:
    """List the settings that differ from the shipped recipe of the same name.

    Settings that do not change the expected accuracy are excluded, such as seed, device and loader.
    So are the published schedule and valid_split=0: both are closer to the published training than
    the shipped recipes.
    """
    if recipe.name not in recipe_names():
        return []
    recipes = (recipe, _with_epochs_of(load_recipe(recipe.name), recipe))
    values, shipped = map(_fill_dataset_defaults, recipes)
    return [
        f"{section}.{key}"
        for section in ("data", "model", "mix", "train", "loss", "optimizer", "schedule")
        for key in sorted(values[section].keys() | shipped[section].keys())
        if values[section].get(key) != shipped[section].get(key)
        if key not in _KEYS_WITHOUT_EFFECT_ON_ACCURACY
        if (key, values[section].get(key)) not in _PUBLISHED_SETTINGS
    ]


def _with_epochs_of(shipped: Recipe, recipe: Recipe) -> Recipe:
    """Convert the images seen of a shipped recipe to epochs, as for a run of a recipe."""
    info, images_seen = DATASETS.get(recipe.data.dataset), shipped.train.images_seen
    if recipe.train.epochs is None or images_seen is None or info is None:
        return shipped
    total = info.num_images[0]
    num_images = total * (1 - (recipe.data.valid_split or 0))
    filled = fill_defaults(
        replace(recipe, train=replace(recipe.train, epochs=None, images_seen=images_seen)),
        device="cpu",
        image_shape=info.image_shape,
        num_images=round(min(recipe.data.limit or total, num_images)),
    )
    epochs = filled.train.epochs
    return replace(shipped, train=replace(shipped.train, epochs=epochs, images_seen=None))


def _fill_dataset_defaults(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to a mapping, with defaults of its data set instead of missing values."""
    values, info = to_mapping(recipe), DATASETS.get(recipe.data.dataset)
    if info:
        side = info.image_shape[-1]
        defaults = {
            "crop_padding": info.crop_padding * (recipe.data.image_size or side) // side,
            "flip": info.flip,
            "image_size": 0,
            "valid_split": default_valid_split(info.num_images[0]),
        }
        values["data"] = {**defaults, **values["data"]}
    return values


_KEYS_WITHOUT_EFFECT_ON_ACCURACY = (
    *("seed", "device", "precision", "memory_format", "compile", "threads"),
    *("loader", "num_workers", "skip_damaged"),
)
_PUBLISHED_SETTINGS = (("kind", "published"), ("valid_split", 0.0))


def default_recipe(dataset: str, flags: Mapping[str, Any]) -> Recipe:
    """Load the shipped recipe that best matches data set and flags, or the default settings."""
    kind, msda = flags.get("mix.kind"), flags.get("mix.msda")
    if kind is not None and kind not in MASK_REGIONS:
        raise unknown_name_error("mask kind", str(kind), MASK_REGIONS)
    if flags.get("model.num_members") == 1 and kind in (None, "sum"):
        candidates = [SINGLE_METHODS.get(msda), "vanilla"]
        fallback = {"mix": {"kind": "sum", "batch_repetitions": 1}, "model": {"num_members": 1}}
    else:
        method = METHODS.get(kind or "cutmix", "cut-mixmo")
        candidates = [f"{method}-{msda}" if msda else method, method, "cut-mixmo"]
        fallback = {}
    names = recipe_names()
    matches = (f"{dataset}/{name}" for name in candidates if f"{dataset}/{name}" in names)
    name = next(matches, None)
    return load_recipe(name) if name else recipe_from_mapping(fallback, "defaults")


def check_dataset(dataset: str) -> None:
    """Check that a data set is a known name, or an existing folder or table of labels.

    Raises:
        InputError: it is none of these.
    """
    # os.path accepts any string, while pathlib raises for some that are not valid paths.
    if dataset.startswith(HUB_PREFIX):
        return  # reading it tells
    path = os.path.expanduser(dataset)
    if dataset in DATASETS or os.path.isdir(path) or (is_table(path) and os.path.isfile(path)):
        return
    if is_table(path):
        raise InputError(f"There is no table {dataset!r}.")
    suffixes = ", ".join(TABLE_SUFFIXES)
    allowed = (
        f"Pass a folder with one subfolder per class, a table of labels ({suffixes}), or one of: "
        f"{', '.join(DATASETS)}."
    )
    if os.path.isfile(path):
        is_archive = path.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z"))
        problem = "is an archive; unpack it" if is_archive else "is a file, not a folder"
        raise InputError(f"{dataset!r} {problem}.\n{allowed}")
    if os.sep in dataset or dataset.startswith((".", "~")) or os.path.exists(dataset):
        raise InputError(f"There is no folder {dataset!r}.\n{allowed}")
    raise InputError(
        f"{unknown_name_error('data set', dataset, DATASETS)} "
        "Or pass the path of an image folder or a table of labels."
    )


def check_ood(
    ood: Iterable[str], dataset: str, images_of: Callable[[str], str] = lambda name: name
) -> None:
    """Check out-of-distribution data sets: each exists, is not the run's own, and is given once.

    Args:
        ood: names of data sets, or folders.
        dataset: data set of the run.
        images_of: returns the folder of a data set's test images, to recognise it by them as well.

    Raises:
        InputError: a data set is missing, is the run's own, or is given twice.
    """
    own, given = _location(images_of(dataset)), dict[str, str]()
    for name in ood:
        check_dataset(name)
        if name not in DATASETS and not os.path.isdir(os.path.expanduser(name)):
            raise InputError(
                f"--ood {name}: tables of labels and hf: data sets are not supported.\n"
                f"Give a folder of images, or one of: {', '.join(DATASETS)}."
            )
        location = _location(images_of(name))
        if location == own:
            raise InputError(f"The run was trained on {dataset}; give --ood another data set.")
        if location in given:
            first = given[location]
            same = f"{name} is given twice" if name == first else f"{first} and {name} are the same"
            raise InputError(f"--ood: {same}.\nGive each data set once.")
        given[location] = name


def _location(dataset: str) -> str:
    """Return the name of a named data set, or the path of a folder without links."""
    if dataset in DATASETS:
        return dataset
    return os.path.realpath(os.path.expanduser(dataset))


def _with_flags(base: Recipe, flags: Mapping[str, Any], source: str) -> Recipe:
    values = to_mapping(base)
    for key, value in flags.items():
        section, name = key.split(".")
        values[section][name] = value
    return recipe_from_mapping(values, source)
