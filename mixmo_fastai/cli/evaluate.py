"""`mixmo eval`: the figures of a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import figure_lines, incompleteness_lines
from mixmo_fastai.resolve import check_dataset
from mixmo_fastai.runs import open_run
from mixmo_fastai.wording import method_name

CHANGED = (
    "Changed",
    "the training images are no longer those of the run: its validation split, and temperatures "
    "fitted on it, may be of images that it was trained on",
)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder that `mixmo fit` made.")],
    *,
    data_dir: opt.DataDir = None,
    ood: Annotated[
        str | None,
        typer.Option(
            help="Other data: a data set, or a folder of images. How well does it stand out?",
            metavar="DATASET|FOLDER",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(
            help="The folder of CIFAR-10-C or CIFAR-100-C, or built-in.",
            metavar="DIR|built-in",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="As one plain network, as `mixmo export` writes it.",
            rich_help_panel=opt.NETWORK,
        ),
    ] = False,
    device: opt.Device = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a trained run on its test set, calibrated on its validation split."""
    folder = open_run(run)
    recipe = folder.recipe()
    if ood is not None:
        check_dataset(ood)
    opt.check_device(device)

    from mixmo_fastai.assessment import (
        evaluate_finished,
        open_finished,
        trains_on_other_images,
    )

    finished = open_finished(folder, data_dir, device, fused=fused)
    figures = evaluate_finished(finished, data_dir, ood=ood, corruptions=corruptions)
    output = Output(as_json=as_json)
    is_changed = trains_on_other_images(folder, finished.source)
    notes = incompleteness_lines([*finished.source.notes, *([CHANGED] if is_changed else [])])
    if as_json:
        for line in notes:
            output.say(line)
    title = f"{folder.path}: {method_name(recipe)}, {recipe.model.arch}, {recipe.data.dataset}"
    title += ", fused" * fused
    lines = [title, *notes, "", *figure_lines(figures, recipe)]
    output.result(lines, {"run": str(folder.path), **figures})
