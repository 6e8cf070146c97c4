"""Create run folders."""

import json
from pathlib import Path
from typing import Any

from mixmo_fastai.config.methods import run_label
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.environment import describe_environment
from mixmo_fastai.runs.files import flush_folder, make_folder, write_atomically, write_new
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.output import check_writable, expand_user


def create_run(
    recipe: Recipe,
    path: Path | None = None,
    *,
    device: str = "",
    acceleration: str = "",
    **more: Any,
) -> RunFolder:
    """Create a run folder and write its recipe.toml and environment.json.

    Args:
        recipe: the resolved recipe.
        path: the folder; None for the first free `runs/<data set>-<name>-<n>`.
        device: description of the device.
        acceleration: description of precision, memory format and compilation.
        more: further entries of environment.json.

    Raises:
        InputError: the folder is not empty, or cannot be created.
    """
    try:
        folder = _claim(path) if path is not None else _claim_next(Path("runs"), run_label(recipe))
        _write_recipe(folder / "recipe.toml", recipe)
        environment = {**describe_environment(recipe, device, acceleration), **more}
        write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"Cannot write the run folder {path or 'runs/'}: {error.strerror}.\n"
            "Choose another folder with --out DIR."
        ) from error
    return RunFolder(folder)


def check_free(path: Path | None) -> None:
    """Check that a run folder can be created at a path, or below `runs/` if it is None.

    Raises:
        InputError: the folder is not empty, or cannot be written to.
    """
    if path is None:
        check_writable(Path("runs"))
        return
    path = expand_user(path)
    if path.is_dir() and any(path.iterdir()):
        kind = "already a run" if (path / "recipe.toml").exists() else "not empty"
        raise InputError(
            f"The folder {str(path)!r} is {kind}. It was not changed.\n"
            "Choose another --out DIR, or continue a run with --resume RUN."
        )
    check_writable(path)


def _claim(path: Path) -> Path:
    check_free(path)
    path = expand_user(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_folder(path)
    return path


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """Write recipe.toml, which makes the folder a run folder; only one process can succeed."""
    try:
        write_new(path, to_toml(recipe))
    except FileExistsError as error:
        raise InputError(
            f"Another process has just created a run in {str(path.parent)!r}.\n"
            "Choose another --out DIR."
        ) from error


def _claim_next(parent: Path, label: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            (parent / f"{label}-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            flush_folder(parent)
            return parent / f"{label}-{number}"
