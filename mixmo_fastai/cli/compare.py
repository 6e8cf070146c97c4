"""`mixmo compare`: runs side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import comparison_lines
from mixmo_fastai.runs import free_file, open_runs


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.")],
    *,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The PNG. Default: the first free compare.png.", rich_help_panel=opt.OUTPUT
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate runs on the same test images, each against the first; plot them by parameters."""
    folders = open_runs(runs, "A comparison")
    opt.check_device(device)
    picture = free_file(out, "compare", ".png")

    from mixmo_fastai.comparison import compare_runs
    from mixmo_fastai.figures import plot_comparison

    compared = compare_runs(folders, data_dir, device=device)
    names = [folder.path.resolve().name for folder in folders]
    plot_comparison(names, compared, picture)
    value = [
        {
            "run": str(part.run.path),
            "parameters": part.parameters,
            "images_seen": part.images_seen,
            "seconds": part.seconds,
            part.part: part.figures,
            "intervals": part.intervals,
            "difference": None
            if part.differences is None
            else {
                name: part.figures[name] - compared[0].figures[name] for name in part.differences
            },
            "differences": part.differences,
            "expected": dataclasses.asdict(part.recipe.expected),
        }
        for part in compared
    ]
    Output(as_json=as_json).result(
        [*comparison_lines(compared), "", f"Picture: {picture}"],
        {"runs": value, "picture": str(picture)},
    )
