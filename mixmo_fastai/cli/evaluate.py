"""`mixmo eval`: evaluate a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import incompleteness_lines, metric_lines
from mixmo_fastai.cli.shift import shift_lines
from mixmo_fastai.config.methods import method_name
from mixmo_fastai.config.resolve import check_ood
from mixmo_fastai.runs.folder import open_run

CHANGED = (
    "Changed",
    "the training images differ from those of the run, so its validation split, and temperatures "
    "fitted on it, may include images it was trained on",
)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of `mixmo fit`.")],
    *,
    data_dir: opt.DataDir = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            help="Out-of-distribution data to detect: a data set, or a folder of images; may be "
            "repeated.",
            metavar="DATASET|FOLDER",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(
            help="Corrupted test images: the folder of CIFAR-10-C or CIFAR-100-C, or built-in.",
            metavar="DIR|built-in",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="Evaluate the plain network that `mixmo export` writes.",
            rich_help_panel=opt.NETWORK,
        ),
    ] = False,
    device: opt.Device = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a trained run on its test set; calibrate on its validation split."""
    folder = open_run(run)
    recipe = folder.recipe()
    check_ood(ood or (), recipe.data.dataset)
    opt.check_device(device)

    from mixmo_fastai.evaluation.runs import (
        evaluate_finished,
        open_finished,
        training_images_changed,
    )

    finished = open_finished(folder, data_dir, device, fused=fused)
    requested = ood[0] if ood and len(ood) == 1 else ood
    metrics = evaluate_finished(finished, data_dir, ood=requested, corruptions=corruptions)
    output = Output(as_json=as_json)
    is_changed = training_images_changed(folder, finished.source)
    notes = incompleteness_lines([*finished.source.notes, *([CHANGED] if is_changed else [])])
    if as_json:
        for line in notes:
            output.print(line)
    title = f"{folder.path}: {method_name(recipe)}, {recipe.model.arch}, {recipe.data.dataset}"
    title += ", fused" * fused
    lines = [title, *notes, "", *shift_lines(metrics), *metric_lines(metrics, recipe)]
    output.print_result(lines, {"run": str(folder.path), **metrics})
