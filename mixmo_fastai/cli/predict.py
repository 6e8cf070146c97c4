"""`mixmo predict`: classes of single images."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs import open_run


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder that `mixmo fit` made.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of images.")],
    *,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Name the class of images, how sure that is, and what the members vote; as CSV or JSON."""
    folder = open_run(run)
    opt.check_device(device)
    if missing := [image for image in images if not image.exists()]:
        raise InputError(f"There is no image or folder {str(missing[0])!r}.")

    from mixmo_fastai.prediction import predict_images

    predictions, unreadable = predict_images(folder, images, data_dir, device=device)
    rows = [dataclasses.asdict(prediction) for prediction in predictions]
    reasons = {str(path): reason for path, reason in unreadable.items()}
    Output(as_json=as_json).result(
        _csv_lines(rows), {"run": str(folder.path), "predictions": rows, "unreadable": reasons}
    )
    if unreadable:
        first = next(iter(unreadable.values()))
        raise RunFailedError(
            f"{len(unreadable)} of {len(unreadable) + len(rows)} images could not be read: {first}"
        )


def _csv_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = ("image", "label", "probability", "votes", "agreement", "entropy", "mutual_information")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = {**row, "votes": "|".join(row["votes"])}
        for name in ("probability", "agreement", "entropy", "mutual_information"):
            values[name] = "" if values[name] is None else f"{values[name]:.6g}"
        writer.writerow(values[name] for name in names)
    return text.getvalue().splitlines()
