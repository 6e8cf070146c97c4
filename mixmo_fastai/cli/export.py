"""`mixmo export`: a trained run as one plain network."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import align
from mixmo_fastai.errors import InputError
from mixmo_fastai.names import EXPORT_SUFFIXES
from mixmo_fastai.runs import free_file, open_run
from mixmo_fastai.wording import percent


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that `mixmo fit` made.")],
    *,
    to: Annotated[
        Path,
        typer.Option(
            help="The file: .safetensors, or .onnx.", metavar="FILE", rich_help_panel=opt.OUTPUT
        ),
    ],
    data_dir: opt.DataDir = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write one encoder, the core and one head, with the logits of the whole ensemble.

    The file is shown real images, and is kept only where its logits are the run's.
    """
    folder = open_run(run)
    suffix = to.suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise InputError(f"--to {str(to)!r} must end in {' or '.join(EXPORT_SUFFIXES)}.")
    path = free_file(to, "", suffix, flag="--to")

    from mixmo_fastai.export import export_run

    found = export_run(folder, path, data_dir)
    rows = [
        ("Network", f"{found['arch']}, {found['parameters']:,} parameters"),
        ("File", f"{path}, {found['num_bytes']:,} bytes"),
        (
            "Checked",
            f"on {found['num_images']} images: logits within {found['relative_difference']:.1e} of "
            f"the largest, the same class for {percent(found['same_class'])}",
        ),
    ]
    output = Output(as_json=as_json)
    output.result(align(rows), {"run": str(folder.path), "file": str(path), **found})
