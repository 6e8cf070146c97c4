"""`mixmo import`: convert a published checkpoint to a run."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.recipe import Expected, Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import check_free, create_run


def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of the published implementation (.ckpt).")
    ],
    *,
    arch: Annotated[str, typer.Option(help="Its network, such as wrn28_10.")],
    dataset: Annotated[str, typer.Option(help="Its training data, such as cifar100.")],
    recipe: opt.RecipeName = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to create.")] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Convert a published checkpoint to a run that can be evaluated; only its tensors are read.

    The checkpoint does not record its training method: name it with --recipe to compare the run
    with the published result.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset!r} must be one of {', '.join(DATASETS)}.")
    resolve_recipe(dataset, recipe, {"model.arch": arch})  # before torch is imported
    check_free(out)

    from mixmo_fastai.models.reference import import_reference, read_reference_checkpoint
    from mixmo_fastai.runs.weights import save_weights

    info = DATASETS[dataset]
    tensors = read_reference_checkpoint(checkpoint)
    model = import_reference(tensors, arch, info.num_classes, info.image_shape[0])
    run = create_run(_recipe_of(dataset, recipe, arch, model.num_members), out)
    save_weights(model, run)
    Output(as_json=as_json).print_result(
        [
            f"{checkpoint.name}: {arch}, members: {model.num_members}, classes: {info.num_classes}",
            f"Run folder: {run.path}",
            f"Evaluate it with: mixmo eval {run.argument}",
        ],
        {"run": str(run.path), "num_members": model.num_members},
    )


def _recipe_of(dataset: str, name: str | None, arch: str, num_members: int) -> Recipe:
    """Build the recipe of an imported network, from a named recipe or from the network alone."""
    # The published networks were trained on all training images, so no validation split exists.
    fixed = {"model.arch": arch, "data.valid_split": 0.0, "data.image_size": 0}
    if name is None:
        settings = {**fixed, "model.num_members": num_members}
        if num_members == 1:
            settings["mix.kind"] = "sum"
        unnamed = resolve_recipe(dataset, None, settings)
        return replace(unnamed, name="imported", title="", expected=Expected())
    recipe = resolve_recipe(dataset, name, {**fixed, "model.num_nets": 1})
    if recipe.model.num_members != num_members:
        raise InputError(
            f"The checkpoint has num_members={num_members}; the recipe {name!r} has "
            f"{recipe.model.num_members}.\nName the recipe that trained it, or omit --recipe."
        )
    return recipe
