"""`mixmo report`: write an HTML report of a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.output import free_file


def report(
    run: Annotated[Path, typer.Argument(help="A run folder of `mixmo fit`.")],
    *,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML file. Default: report.html in the run folder, replaced if it exists.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a trained run and write a self-contained HTML report."""
    folder = open_run(run)
    folder.check_trained()
    opt.check_device(device)
    page = folder.report if out is None else free_file(out, "report", ".html")

    from mixmo_fastai.report.page import write_report

    data = write_report(folder, page, data_dir, device=device)
    Output(as_json=as_json).print_result(
        [f"Report: {page}"],
        {"run": str(folder.path), "report": str(page), **data.metrics},
    )
