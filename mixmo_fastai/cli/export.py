"""`mixmo export`: write a trained run as one plain network."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.decision_options import RawLogits
from mixmo_fastai.cli.render import align
from mixmo_fastai.config.choices import EXPORT_SUFFIXES
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.results import SPLIT_NAMES
from mixmo_fastai.metrics.table import percent
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.output import free_file

CALIBRATIONS = {
    "temperature": "the logits contain the temperature of the run's calibration",
    "vector": "the logits contain the vector scaling of the run's calibration",
    "none": "no: the logits are those of the network",
}


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
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Quantise an .onnx file to 8-bit integers: a quarter of the size, faster on CPUs.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Percentage points of accuracy that --int8 may cost. Default: 0.5.",
            min=0,
            max=100,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    raw: RawLogits = False,
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
    _check_int8(to, max_drop, int8=int8)
    path = free_file(to, "", suffix, flag="--to")

    from mixmo_fastai.export.files import export_run
    from mixmo_fastai.export.int8 import MAX_DROP

    allowed = (MAX_DROP if max_drop is None else max_drop) if int8 else None
    result = export_run(folder, path, data_dir, max_drop=allowed, raw=raw)
    rows = [
        ("Network", f"{result['arch']}, {result['parameters']:,} parameters"),
        ("File", f"{path}, {result['num_bytes']:,} bytes"),
        (
            "Checked",
            f"{'before quantisation, ' * int8}on {result['num_images']} images: logits differ by "
            f"at most {result['relative_difference']:.1e} of the largest logit, {_same(result)}",
        ),
    ]
    rows.append(("Calibrated", CALIBRATIONS[result["calibration"]]))
    if measured := result.get("int8"):
        rows.append(("int8", _int8_text(measured)))
    output = Output(as_json=as_json)
    output.print_result(align(rows), {"run": str(folder.path), "file": str(path), **result})


def _same(result: dict[str, Any]) -> str:
    several = "same_labels" in result
    same = result["same_labels" if several else "same_class"]
    return f"same {'labels' if several else 'class'} for {percent(same)}"


def _check_int8(to: Path, max_drop: float | None, *, int8: bool) -> None:
    if int8 and to.suffix.lower() != ".onnx":
        raise InputError(f"--int8 needs --to FILE.onnx; got {str(to)!r}.")
    if max_drop is not None and not int8:
        raise InputError("--max-drop limits the loss of --int8; add --int8, or remove --max-drop.")


def _int8_text(measured: dict[str, Any]) -> str:
    """Describe the accuracies of `int8.Quantised`."""
    change = 100 * (measured["after"] - measured["before"])
    return (
        f"accuracy {percent(measured['after'])} instead of {percent(measured['before'])} on "
        f"{measured['num_images']:,} {SPLIT_NAMES[measured['split']].lower()} images: "
        f"{change:+.2f} ± {100 * measured['half_width']:.2f} points; same class for "
        f"{percent(measured['same_class'])}"
    )
