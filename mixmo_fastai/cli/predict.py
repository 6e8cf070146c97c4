"""`mixmo predict`: predict the classes of image files."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.decision_options import (
    Coverage,
    MaxRisk,
    OodScore,
    OodThreshold,
    PerClass,
    RawProbabilities,
    RiskScore,
    SetScore,
)
from mixmo_fastai.config.choices import is_table
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.output import free_file


# Long, since each flag is a parameter.
def predict(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, a .safetensors or .onnx of `mixmo export`, a folder of "
            "`mixmo push`, or hf:USER/NAME."
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files, folders of images, or tables with a column of paths."),
    ],
    *,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Add the probability of each class, as p:CLASS."),
    ] = False,
    raw: RawProbabilities = False,
    coverage: Coverage = None,
    set_score: SetScore = None,
    per_class: PerClass = False,
    max_risk: MaxRisk = None,
    risk_score: RiskScore = None,
    ood_threshold: OodThreshold = None,
    ood_score: OodScore = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Folder to which the paths in tables are relative, if not their own."),
    ] = None,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write to a .csv or .json file instead of printing.", rich_help_panel=opt.OUTPUT
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Predict class, probability and the members' votes of each image, as CSV or JSON."""
    is_pushed = str(run).startswith("hf:") or (run / "config.json").is_file()
    if run.suffix and not run.exists() and not is_pushed:
        raise InputError(f"There is no exported network or run folder {str(run)!r}.")
    folder = None if run.is_file() or is_pushed else open_run(run)
    opt.check_device(device)
    opt.check_fractions(coverage=coverage, max_risk=max_risk, ood_threshold=ood_threshold)
    for flag, value, needed, is_given in (
        ("--set-score", set_score, "--coverage", coverage),
        ("--per-class", per_class or None, "--coverage", coverage),
        ("--risk-score", risk_score, "--max-risk", max_risk),
        ("--ood-score", ood_score, "--ood-threshold", ood_threshold),
    ):
        if value is not None and is_given is None:
            raise InputError(f"{flag} has no effect without {needed}.\nAdd {needed}, or remove it.")
    _check_images(images, image_folder)
    if out is not None:
        suffix = out.suffix.lower()
        if suffix not in (".csv", ".json"):
            raise InputError(f"--out {str(out)!r} must end in .csv or .json.")
        out = free_file(out, "predictions", suffix)

    from mixmo_fastai.data.listing import Skipped
    from mixmo_fastai.evaluation.decisions import (
        FAMILIAR_SCORE,
        RISK_SCORE,
        Request,
    )
    from mixmo_fastai.evaluation.predict import predict_images
    from mixmo_fastai.export.files import load_fused
    from mixmo_fastai.runtime.devices import keep_freed_memory

    keep_freed_memory()
    network = load_fused(run) if folder is None else folder
    request = Request(
        raw=raw,
        coverage=coverage,
        set_score=set_score,
        per_class=per_class,
        max_risk=max_risk,
        risk_score=risk_score or RISK_SCORE,
        familiar=ood_threshold,
        familiar_score=ood_score or FAMILIAR_SCORE,
    )
    facts = _facts(network)
    labels = facts.classes if facts is not None and facts.is_multi_label else None
    decisions = _decisions(network, request, str(run), labels)
    skipped = Skipped()
    predictions, unreadable = predict_images(
        network,
        images,
        data_dir,
        device=device,
        skipped=skipped,
        decisions=decisions,
        raw=raw,
        image_folder=image_folder,
        all_probabilities=probabilities,
    )
    if skipped_text := skipped.describe():
        typer.echo(f"Skipped: {skipped_text}", err=True)
    if decisions.note:
        typer.echo(decisions.note, err=True)
    rows = [_row(prediction, request) for prediction in predictions]
    reasons = {str(path): " ".join(text.splitlines()) for path, text in unreadable.items()}
    table = {"run": str(run), "predictions": rows, "unreadable": reasons, "skipped": skipped_text}
    classes = facts.classes if probabilities and facts is not None else ()
    output, lines = Output(as_json=as_json), _csv_lines(rows, request, labels, classes)
    if out is None:
        output.print_result(lines, table)
    elif not rows:
        output.print_result([], {"run": str(run), "predictions": None, "unreadable": reasons})
    else:
        is_json = out.suffix.lower() == ".json"
        text = json.dumps(table, indent=2) if is_json else "\n".join(lines)
        # Names of files may be any bytes.
        write_atomically(out, (text + "\n").encode(errors="surrogateescape"))
        summary = {"run": str(run), "predictions": str(out), "unreadable": reasons}
        output.print_result([f"Predictions: {out}, {len(rows):,} images"], summary)
    if unreadable:
        raise RunFailedError(
            f"{len(unreadable)} of {len(unreadable) + len(rows)} images could not be read: "
            f"{_describe_unreadable(unreadable)}"
        )


def _check_images(images: Sequence[Path], image_folder: Path | None) -> None:
    """Check what is to be predicted.

    Raises:
        InputError: a path does not exist, or is a run, as for `mixmo ensemble`; or there is a
            folder for tables, but no table.
    """
    if image_folder is not None and not any(map(is_table, images)):
        raise InputError("--image-folder has no effect without a table.\nAdd one, or remove it.")
    for image in images:
        if not image.exists():
            raise InputError(f"There is no image or folder {str(image)!r}.")
        if (image / "recipe.toml").is_file():
            raise InputError(
                f"{image} is a run, not a folder of images; mixmo predict takes one run.\n"
                "To average several, write the probabilities of each with --probabilities."
            )


def _decisions(network: Any, request: Any, name: str, labels: Sequence[str] | None) -> Any:
    """Choose thresholds; with several labels per image, the run has its own.

    Raises:
        InputError: as for `decide_for`, or what is requested is for one label per image.
    """
    from mixmo_fastai.evaluation.decisions import Decisions, decide_for

    if labels is None:
        return decide_for(request, network, name)
    if request.needs_calibration:
        raise InputError(
            "--coverage, --max-risk and --ood-threshold are for one label per image; those of "
            f"{name} may have several."
        )
    return Decisions()


def _facts(network: Any) -> Any:
    """Return the facts about the data of a run or an exported network; None if not recorded."""
    from mixmo_fastai.runs.folder import RunFolder

    return network.data_facts() if isinstance(network, RunFolder) else network.facts


def _describe_unreadable(unreadable: dict[Path, str]) -> str:
    """List unreadable images; for a single one, return the reason and what to do."""
    if len(unreadable) == 1:
        return next(iter(unreadable.values()))
    more = f" and {len(unreadable) - 10:,} more" if len(unreadable) > 10 else ""
    num_large = sum("megapixels" in text for text in unreadable.values())
    large = "them" if num_large == len(unreadable) else f"{num_large:,} of them"
    advice = f"Save {large} smaller: too many megapixels. " if num_large else ""
    paths = ", ".join([*map(str, unreadable)][:10])
    return f"{paths}{more}.\n{advice}See the result of --json for the reasons."


def _row(prediction: Any, request: Any) -> dict[str, Any]:
    """Return the entries of a prediction; without those that were not requested."""
    row = dataclasses.asdict(prediction)
    if "labels" in row:
        return row
    classes, is_accepted, is_familiar = map(row.pop, ("classes", "is_accepted", "is_familiar"))
    if request.coverage is not None:
        row["set"] = classes
    if request.max_risk is not None:
        row["decision"] = "accept" if is_accepted else "ask"
    if request.familiar is not None:
        row["familiar"] = is_familiar
    if row["probabilities"] is None:
        del row["probabilities"]
    return row


def _csv_lines(
    rows: list[dict[str, Any]],
    request: Any,
    labels: Sequence[str] | None,
    classes: Sequence[str],
) -> list[str]:
    """Format predictions; without any, the header.

    Args:
        rows: from `_row`.
        request: the request of `evaluation.decisions`, which decides the columns.
        labels: names of the labels if an image may have several; otherwise None.
        classes: the classes whose probabilities are requested; those of the rows if not known.
    """
    if labels is not None:
        return _label_csv_lines(rows, labels)
    names = ["image", "label", "probability", "votes", "agreement", "entropy", "mutual_information"]
    requested = {
        "set": request.coverage,
        "decision": request.max_risk,
        "familiar": request.familiar,
    }
    names += [name for name, value in requested.items() if value is not None]
    classes = [*rows[0].get("probabilities", {})] if rows else classes
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"p:{name}" for name in classes)])
    for row in rows:
        values = {**row, "votes": "|".join(row["votes"])}
        if "set" in row:
            values["set"] = "|".join(row["set"])
        if "familiar" in row:
            values["familiar"] = "yes" if row["familiar"] else "no"
        for name in ("probability", "agreement", "entropy", "mutual_information"):
            values[name] = "" if values[name] is None else f"{values[name]:.6g}"
        shown = (f"{row['probabilities'][name]:.6g}" for name in classes)
        writer.writerow([*(values[name] for name in names), *shown])
    return _lines(text)


def _label_csv_lines(rows: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Format predictions of several labels per image: with a column of probabilities per label."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"p:{name}" for name in names]  # labels may be called "image"
    writer.writerow(["image", "labels", "entropy", "mutual_information", *columns])
    for row in rows:
        numbers = [row["entropy"], row["mutual_information"], *row["probabilities"].values()]
        shown = ("" if number is None else f"{number:.6g}" for number in numbers)
        writer.writerow([row["image"], "|".join(row["labels"]), *shown])
    return _lines(text)


def _lines(text: io.StringIO) -> list[str]:
    """Split at line feeds only; names of files may contain other separators of lines."""
    return text.getvalue().removesuffix("\n").split("\n")
