"""`mixmo export`: write a trained run as one plain network."""

from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import align
from mixmo_fastai.config.choices import EXPORT_SUFFIXES
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.table import percent
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.output import free_file


def export(
    run: Annotated[Path, typer.Argument(help="A run folder of `mixmo fit`.")],
    *,
    to: Annotated[
        Path,
        typer.Option(
            help="File to write: .safetensors, .onnx or .pt2 (torch.export).",
            metavar="FILE",
            rich_help_panel=opt.OUTPUT,
        ),
    ],
    data_dir: opt.DataDir = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write one plain network (encoder, core, head) that computes the logits of the ensemble.

    The file is kept only if its logits match those of the run on real images.
    """
    folder = open_run(run)
    suffix = to.suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise InputError(f"--to {str(to)!r} must end in {', '.join(EXPORT_SUFFIXES)}.")
    path = free_file(to, "", suffix, flag="--to")

    from mixmo_fastai.export.files import export_run

    result = export_run(folder, path, data_dir)
    rows = [
        ("Network", f"{result['arch']}, {result['parameters']:,} parameters"),
        ("File", f"{path}, {result['num_bytes']:,} bytes"),
        (
            "Checked",
            f"on {result['num_images']} images: logits differ by at most "
            f"{result['relative_difference']:.1e} of the largest logit, same class for "
            f"{percent(result['same_class'])}",
        ),
    ]
    output = Output(as_json=as_json)
    output.print_result(align(rows), {"run": str(folder.path), "file": str(path), **result})
