"""Read recipes: shipped ones by name, files, and changes of single settings."""

import dataclasses
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixmo_fastai.config.consistency import check_consistency
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import (
    TOML_ERRORS,
    build_settings,
    drop_none,
    parse_value,
)
from mixmo_fastai.errors import InputError, did_you_mean, nearest


def recipe_from_mapping(values: Mapping[str, Any], source: str) -> Recipe:
    """Build a recipe from nested values, checking every key, type and range.

    Args:
        values: nested values, as read from TOML.
        source: where the values come from, such as a file; error messages name it.

    Raises:
        InputError: a key is unknown, a value is invalid, or values contradict each other.
    """
    recipe: Recipe = build_settings(Recipe, with_present_names(values), source)
    check_consistency(recipe, source)
    return recipe


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the settings of version 0.1.0 in nested values: data.augmix is now data.transform."""
    values = dict(values)
    data = values.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("augmix"), bool):
        values["data"] = data = dict(data)
        is_augmix = data.pop("augmix")
        if is_augmix and data.get("transform", "standard") not in ("standard", "augmix"):
            raise InputError(
                "data.augmix is now data.transform='augmix', and another data.transform is set.\n"
                "Remove data.augmix."
            )
        if is_augmix and data.get("transform", "standard") == "standard":
            data["transform"] = "augmix"
        elif not is_augmix and data.get("transform") == "augmix":
            data["transform"] = "standard"
    return values


def override(recipe: Recipe, assignments: Iterable[str], source: str = "--set") -> Recipe:
    """Apply assignments such as "optimizer.lr=0.05"; a value that is not valid TOML is a string.

    Raises:
        InputError: an assignment has no "=", an unknown key or an invalid value.
    """
    values = dataclasses.asdict(recipe)  # unlike to_mapping, keeps settings that are None
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(
                f"{source} {assignment!r}: write section.key=value, such as train.epochs=5."
            )
        *path, last = key.strip().split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(
                    f"{source} {assignment!r}: {name!r} is not a section.\n"
                    "Write section.key=value, such as train.epochs=5."
                )
        value = parse_value(text)
        if (
            isinstance(section.get(last), dict) and value != {}
        ):  # assignment would reset its other keys
            key = key.strip()
            example = f"{key}.name={text.strip()}" if "name" in section[last] else "train.epochs=5"
            example = f"{source} {example}" if source.startswith("--") else example
            raise InputError(
                f"{source} {assignment!r}: {last!r} is a section.\n"
                f"Set its keys separately, such as {example}."
            )
        section[last] = value
    return recipe_from_mapping(
        {k: drop_none(item) if isinstance(item, dict) else item for k, item in values.items()},
        source,
    )


def load_recipe(name_or_file: str | Path) -> Recipe:
    """Load a recipe by name, such as "cifar100/cut-mixmo", or from a TOML file.

    Raises:
        InputError: the recipe does not exist or is invalid.
    """
    path = find_recipe(name_or_file)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Recipe {path} cannot be read: {error.strerror}.") from error
    except TOML_ERRORS as error:
        raise InputError(
            f"Recipe {path} is not valid TOML: {error}.\n"
            "`mixmo recipes NAME` shows a valid recipe with all settings."
        ) from error
    if path.resolve().is_relative_to(recipe_home()):
        name = path.resolve().relative_to(recipe_home()).with_suffix("").as_posix()
        values.setdefault("name", name)
    return recipe_from_mapping(values, f"Recipe {path}")


def find_recipe(name_or_file: str | Path) -> Path:
    """Return the path of a recipe.

    Raises:
        InputError: `name_or_file` is neither a known name nor an existing file.
    """
    if isinstance(name_or_file, Path) and name_or_file.is_file():
        return name_or_file
    text = str(name_or_file)
    if text in recipe_names():
        return recipe_home() / f"{text}.toml"
    path = os.path.expanduser(text)
    if os.path.isfile(path):  # unlike Path.is_file, accepts any string
        return Path(path)
    guess = nearest(text, recipe_names())
    hint = did_you_mean(guess)
    raise InputError(
        f"There is no recipe {text!r}.{hint}\n"
        "Pass a name that `mixmo recipes` lists, or the path of a TOML file."
    )


def recipe_names() -> list[str]:
    """List the names of the shipped recipes."""
    home = recipe_home()
    return sorted(p.relative_to(home).with_suffix("").as_posix() for p in home.rglob("*.toml"))


def recipe_home() -> Path:
    """Return the folder of shipped recipes: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"
