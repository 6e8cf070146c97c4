"""`mixmo inspect`: filter use of a trained network."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import filter_lines
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.output import free_file


def inspect(
    runs: Annotated[list[Path], typer.Argument(help="A run folder, or two to compare.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG of the plot. Default: the first free inspect-<run>.png.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure active filters per convolution, and the norms of the encoders' filters."""
    if len(runs) > 2:
        raise InputError(f"inspect needs one or two runs; got {len(runs)}.")
    folders = [open_run(run) for run in runs]
    for folder in folders:
        if folder.recipe().model.num_nets > 1:
            raise InputError(
                f"{folder.path} is a deep ensemble.\nInspect one of its networks: "
                f"mixmo inspect {folder.networks()[0].argument}"
            )
    names = [folder.path.resolve().name for folder in folders]
    plot_path = free_file(out, f"inspect-{'-'.join(names)}", ".png")

    from mixmo_fastai.models.filters import encoder_norms, filter_use
    from mixmo_fastai.report.filters import side_by_side
    from mixmo_fastai.runs.weights import load_network

    networks = [load_network(folder) for folder in folders]
    uses = [filter_use(network) for network in networks]
    norms = [encoder_norms(network) for network in networks]
    titles = [str(folder.path) for folder in folders]
    write_atomically(plot_path, side_by_side(titles, uses, norms).png())
    Output(as_json=as_json).print_result(
        [*filter_lines(titles, uses, norms), "", f"Plot: {plot_path}"],
        {
            "runs": [
                {
                    "run": title,
                    "thresholds": list(use.thresholds),
                    "average": use.average.tolist(),
                    "layers": dict(zip(use.layers, use.fractions.tolist(), strict=True)),
                    "convolutions": [
                        {"number": number, "module": name}
                        for number, name in enumerate(use.layers, 1)
                    ],
                    "encoder_norms": norm.tolist(),
                }
                for title, use, norm in zip(titles, uses, norms, strict=True)
            ],
            "picture": str(plot_path),
        },
    )
