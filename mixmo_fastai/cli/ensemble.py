"""`mixmo ensemble`: evaluate several runs as one deep ensemble."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render_metrics import ensemble_lines
from mixmo_fastai.runs.folder import open_runs


def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.")],
    *,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate finished runs as one ensemble, the mean of their logits, on the test set."""
    folders = open_runs(runs, "An ensemble")
    opt.check_device(device)

    from mixmo_fastai.evaluation.runs import evaluate_ensemble

    metrics = evaluate_ensemble(folders, data_dir, device=device)
    names = [str(folder.path) for folder in folders]
    Output(as_json=as_json).print_result(ensemble_lines(names, metrics), {"runs": names, **metrics})
