"""`mixmo recipes`: list the recipes, or show all settings of one."""

from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.config.load import load_recipe, recipe_names
from mixmo_fastai.config.methods import expected_label
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.config.schema import to_mapping, to_toml


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to show, or a file.")] = None,
    assignments: opt.Assignments = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """List the recipes with their expected accuracy, or show all settings of one."""
    output = Output(as_json=as_json)
    if name is not None:
        if assignments:
            recipe = resolve_recipe(None, name, {}, assignments, must_exist=False)
        else:
            recipe = load_recipe(name)
        output.print_result([to_toml(recipe).rstrip()], to_mapping(recipe))
        return
    if assignments:
        raise typer.BadParameter("--set changes one recipe; name it: mixmo recipes NAME --set …")
    known = [load_recipe(known_name) for known_name in recipe_names()]
    rows = [("recipe", "network", "networks", "members", "mix", "pixels", "epochs", "accuracy")]
    rows += [
        (
            recipe.name,
            recipe.model.arch or "-",
            str(recipe.model.num_nets),
            str(recipe.model.num_members),
            recipe.mix.kind,
            recipe.mix.msda,
            _length(recipe),
            _expected(recipe),
        )
        for recipe in known
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    output.print_result(
        [
            *(line.rstrip() for line in lines),
            "",
            "Accuracies are published; those with * were measured by this project.",
            "Train one: mixmo fit --recipe NAME",
        ],
        {recipe.name: to_mapping(recipe) for recipe in known},
    )


def _length(recipe: Recipe) -> str:
    """Return the length of training: epochs, or images seen by all networks."""
    if recipe.train.images_seen is None:
        return "-" if recipe.train.epochs is None else str(recipe.train.epochs)
    return f"{recipe.train.images_seen / 1e6:g}M images"


def _expected(recipe: Recipe) -> str:
    if recipe.expected.accuracy is None:
        return "-"
    mark = "*" * (expected_label(recipe) != "Published")
    return f"{100 * recipe.expected.accuracy:.2f} %{mark}"
