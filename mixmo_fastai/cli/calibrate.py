"""`mixmo calibrate`: fit the calibration of a finished run again."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.render import align
from mixmo_fastai.cli.render_calibration import calibration_rows
from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.runs.folder import open_run

METHODS = ("temperature", "vector", "none")


def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder of `mixmo fit`.")],
    *,
    method: Annotated[
        str, typer.Option(help="temperature, vector (a scale and a bias per class) or none.")
    ] = "temperature",
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Fit the calibration of a finished run on its validation images, and store it.

    `mixmo fit` does this at its end. `mixmo predict`, `eval` and `export` use the calibration.
    """
    folder = open_run(run)
    if method not in METHODS:
        raise unknown_name_error("calibration method", method, METHODS)
    opt.check_device(device)

    from mixmo_fastai.data.run_data import changed_images
    from mixmo_fastai.evaluation.calibration import summary
    from mixmo_fastai.evaluation.runs import open_finished
    from mixmo_fastai.runs.calibration import read_calibration, write_calibration
    from mixmo_fastai.runs.labels import check_one_label

    check_one_label(folder, "mixmo calibrate")
    finished = open_finished(folder, data_dir, device)
    if "train" in changed_images(folder, finished.source):
        raise InputError(
            f"The training images differ from those of {folder.path}, so its validation images may "
            "include images it was trained on.\nRestore the data."
        )
    valid, _, separate = finished.loaders()
    calibration = finished.fit_calibration(*finished.logits([valid, separate]), method)
    if calibration is None:
        raise InputError(
            f"{folder.path} has no images to calibrate on.\n"
            "Train with a validation split, --valid-split 0.1, which must have several groups if "
            "there are any."
        )
    stored = None
    with suppress(InputError):  # damaged files are written again
        stored = read_calibration(folder)
    if calibration.scaling is None and method != "none" and stored is not None and stored.scaling:
        raise InputError(
            f"Calibration by {method} is not possible: {calibration.reason}.\n"
            f"The stored calibration of {folder.path} was not changed."
        )
    write_calibration(folder, calibration)
    value = summary(calibration)
    Output(as_json=as_json).print_result(
        align(calibration_rows({"calibration": value})), {"run": str(folder.path), **value}
    )
