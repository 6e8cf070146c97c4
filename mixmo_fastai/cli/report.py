"""`mixmo report`: a page about a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.runs import free_file, open_run


def report(
    run: Annotated[Path, typer.Argument(help="A run folder that `mixmo fit` made.")],
    *,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page. Default: report.html in the run folder, made anew each time.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a trained run and write one self-contained HTML page about it."""
    folder = open_run(run)
    folder.check_trained()
    opt.check_device(device)
    page = folder.report if out is None else free_file(out, "report", ".html")

    from mixmo_fastai.report.page import write_report

    findings = write_report(folder, page, data_dir, device=device)
    Output(as_json=as_json).result(
        [f"Report: {page}"],
        {"run": str(folder.path), "report": str(page), **findings.figures},
    )
