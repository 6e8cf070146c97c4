"""`mixmo compare`: compare runs on the same test images."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import comparison_lines
from mixmo_fastai.runs.folder import open_runs
from mixmo_fastai.runs.output import free_file


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.")],
    *,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG of the plot. Default: the first free compare.png.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate runs on the same test images, compare each with the first, and plot the results."""
    folders = open_runs(runs, "A comparison")
    opt.check_device(device)
    plot_path = free_file(out, "compare", ".png")

    from mixmo_fastai.evaluation.compare import compare_runs
    from mixmo_fastai.plots.png import plot_comparison

    compared = compare_runs(folders, data_dir, device=device)
    names = [folder.path.resolve().name for folder in folders]
    if len({*names}) < len(names):
        names = [str(folder.path) for folder in folders]
    plot_comparison(names, compared, plot_path)
    value = [
        {
            "run": str(each.run.path),
            "parameters": each.parameters,
            "images_seen": each.images_seen,
            "seconds": each.seconds,
            each.split: each.metrics,
            "intervals": each.intervals,
            "difference": None
            if each.differences is None
            else {
                name: each.metrics[name] - compared[0].metrics[name] for name in each.differences
            },
            "differences": each.differences,
            "expected": dataclasses.asdict(each.recipe.expected),
        }
        for each in compared
    ]
    Output(as_json=as_json).print_result(
        [*comparison_lines(compared), "", f"Plot: {plot_path}"],
        {"runs": value, "picture": str(plot_path)},
    )
