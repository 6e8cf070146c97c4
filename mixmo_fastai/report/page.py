"""The page: render the data and charts of a report as one self-contained HTML file."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mixmo_fastai import __version__
from mixmo_fastai.config.methods import expected_label, expected_result, method_name
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.evaluation.results import (
    SPLIT_NAMES,
    final_metrics,
    temperature_error,
    temperature_warning,
)
from mixmo_fastai.metrics.label_results import LABELS
from mixmo_fastai.metrics.table import (
    LISTED_METRICS,
    MAIN_METRICS,
    METRIC_BY_NAME,
    MULTI_MEMBER_METRICS,
    MetricSpec,
    percent,
    round_percent,
)
from mixmo_fastai.report.report_data import Mistake, ReportData, collect_report_data
from mixmo_fastai.report.sections import calibration_name, sections, voter_name
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.text import duration, printable

SMALLEST_THUMBNAIL = 64
# Between a number and its unit, and between a mean and its spread.
_UNBROKEN_SPACE = re.compile(r"(?<=\d) (?=(?:%|points|nats|min|h|s)(?!\w))|(?<=±) ")


def write_report(
    run: RunFolder, path: Path, data_dir: Path | None = None, *, device: str | None = None
) -> ReportData:
    """Evaluate a trained run and write its report.

    Args:
        run: a finished run.
        path: path of the HTML file; an existing one is replaced atomically.
        data_dir: folder of the run's data, if not the one that training used.
        device: device to evaluate on; by default, that of the recipe.

    Returns:
        The data of the report.

    Raises:
        InputError: the run is not finished or damaged, or its data is missing.
    """
    data = collect_report_data(run, data_dir, device=device)
    write_atomically(path, render(data))
    return data


def render(data: ReportData) -> str:
    """Render a report as HTML. Names of classes, files and recipes are escaped."""
    recipe = data.recipe
    return render_template(
        "page.html",
        name=data.run.path.resolve().name,
        method=method_name(recipe),
        lead=_lead(data),
        tiles=_tiles(data),
        expected=expected_result(recipe),
        expected_label=expected_label(recipe),
        table=_metric_table(data),
        metric_columns=_metric_columns(data),
        definition=partial(_definition, of_labels=bool(data.label_names)),
        notes=_notes(data),
        sections=sections(data),
        colors=_colors(data),
        mistakes=data.mistakes,
        mistake_text=partial(_mistake_text, SPLIT_NAMES[final_metrics(data.metrics)[0]]),
        percent=percent,
        recipe=to_toml(recipe),
        environment=_environment_rows(data.environment),
    )


def render_template(template: str, **values: Any) -> str:
    """Render a template of this package as a self-contained page; values are escaped.

    The template also gets the style sheet `style`, the version `version` of this package and the
    time `written`.
    """
    folder = files("mixmo_fastai.report")
    environment = Environment(
        loader=PackageLoader("mixmo_fastai", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = as_data_uri
    page = environment.get_template(template).render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
    return printable(_UNBROKEN_SPACE.sub("\u00a0", page))


def as_data_uri(pixels: Tensor) -> str:
    """Encode an image (C, H, W) uint8 as a data URI of a PNG: grey, or its first three channels.

    Small images are enlarged by an integer factor, without interpolation.
    """
    shown = pixels[:3] if len(pixels) >= 3 else pixels[0]
    image = Image.fromarray((shown.permute(1, 2, 0) if shown.ndim == 3 else shown).numpy())
    factor = max(1, SMALLEST_THUMBNAIL // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return png_uri(file.getvalue())


def png_uri(data: bytes) -> str:
    """Encode a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _lead(data: ReportData) -> str:
    recipe, summary = data.recipe, data.summary
    num_valid, num_test = data.num_images
    parts = [
        f"{recipe.model.arch} on {Path(recipe.data.dataset).name}",
        f"{data.parameters:,} parameters",
        f"{len(data.label_names or data.classes)} {'labels' if data.label_names else 'classes'}",
        f"{num_test:,} test images" if num_test else "no labelled test images",
        f"{num_valid:,} validation images" if num_valid else "no validation split",
    ]
    if "images_seen" in summary:
        parts.append(f"{summary['images_seen']:,} images seen in training")
    if "seconds" in summary:
        parts.append(f"trained in {duration(summary['seconds'])}")
    return ", ".join(parts) + "."


def _tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """Return the main metrics: label, value and remark."""
    split, test = final_metrics(data.metrics)
    ends = data.metrics.get("intervals", {})
    expected = data.recipe.expected
    accuracy = "Label accuracy" if data.label_names else f"{SPLIT_NAMES[split]} accuracy"
    tiles = [
        (
            accuracy if metric.name == "accuracy" else metric.title,
            metric.format.value(test[metric.name]),
            _interval(ends, metric),
        )
        for metric in MAIN_METRICS
        if metric.name in test  # missing if the metric is newer than the run's evaluation
    ]
    if "mean_ap" in (labels := data.metrics.get(LABELS, {})):
        ends = " to ".join(map(percent, labels.get("mean_ap_interval", ())))
        tiles.insert(0, (f"{SPLIT_NAMES[split]} mAP", percent(labels["mean_ap"]), ends))
    if expected.accuracy is not None:
        label, value = expected_label(data.recipe), percent(expected.accuracy)
        tiles.insert(1, (label, value, f"with {expected.arch}"))
    if name := calibration_name(data):
        calibrated = data.metrics[name]
        images = "validation split" if name == "calibrated" else "other half"
        remark = f"temperature of the {images}"
        if temperature_warning(calibrated):
            error = round_percent(temperature_error(calibrated))
            remark = f"unreliable: {remark} has a standard error of {error}"
        tiles.append(("ECE, calibrated", percent(calibrated["ece"]), remark))
    if len(test["member_accuracy"]) > 1:
        values = test["member_accuracy"]
        voter = voter_name(data)
        label, remark = f"{voter.capitalize()} accuracy", f"mean of {len(values)} {voter}s"
        tiles.append((label, percent(sum(values) / len(values)), remark))
    return tiles


def _interval(ends: Mapping[str, Sequence[float]], metric: MetricSpec) -> str:
    if metric.name not in ends:
        return ""
    low, high = ends[metric.name]
    return f"{metric.format.value(low)} to {metric.format.value(high)}"


def _metric_columns(data: ReportData) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return the columns of the table of metrics: title, explanation, values."""
    metrics = data.metrics
    split, final = final_metrics(metrics)
    columns = [(SPLIT_NAMES[split], "mean of the logits, as published", final)]
    if values := metrics.get(f"{split}_mean_probabilities"):
        columns.append((f"{SPLIT_NAMES[split]}, mean p", "mean of the probabilities", values))
    if split != "valid" and (values := metrics.get("valid")):
        columns.append(("Validation", "mean of the logits", values))
    return columns


def _metric_table(data: ReportData) -> list[tuple[Any, list[tuple[str, str]]]]:
    """Return the rows of metrics: for each column, the value or the reason if it is undefined."""
    rows = []
    columns = _metric_columns(data)
    has_one_member = len(columns[0][2]["member_accuracy"]) == 1
    for metric in LISTED_METRICS:
        cells = []
        for _, _, values in columns:
            if metric.name in values:
                cells.append((metric.format.value(values[metric.name]), ""))
            else:
                cells.append(("-", values.get("absent", {}).get(metric.name, "")))
        is_hidden = (
            (has_one_member and metric.compares_members)
            or (bool(data.label_names) and metric.min_classes > 2)
            or all(metric.is_redundant(values) for _, _, values in columns)
        )
        if not is_hidden:
            rows.append((metric, cells))
    return rows


def _definition(metric: MetricSpec, *, of_labels: bool) -> str:
    """Return the definition of a metric, of decisions instead of images with several labels."""
    if not of_labels:
        return metric.definition
    changes = {
        "images whose most likely class is the true class": "decisions that are right",
        "accuracy on the images of each class, mean over classes": (
            "right decisions among those of each true answer, mean of no and yes"
        ),
        "images on which two members differ": "decisions on which two members differ",
        "mean over images": "mean over decisions",
        "true class": "true answer",
        "summed over classes": "summed over no and yes",
    }
    text = metric.definition
    for before, after in changes.items():
        text = text.replace(before, after)
    return text


def _notes(data: ReportData) -> list[str]:
    """Return the reasons for undefined metrics, each reason once."""
    split, test = final_metrics(data.metrics)
    absent: dict[str, str] = data.metrics.get("absent", {}) | test.get("absent", {})
    notes = []
    if data.label_names:
        absent = {n: r for n, r in absent.items() if n not in METRIC_BY_NAME}
        notes.append(
            "Each label of each image is a decision, yes or no. The metrics of this table, and the "
            "sections after Labels, are about these decisions instead of images."
        )
    if len(test["member_accuracy"]) == 1:  # stated in the section of the members
        hidden = (*MULTI_MEMBER_METRICS, f"{split}_mean_probabilities")
        absent = {name: reason for name, reason in absent.items() if name not in hidden}
    names = {
        "calibrated": "Calibration on the validation split",
        "cross_fitted": "Calibration on halves of the images",
        "calibration": "Calibration",
        "sets": "Prediction sets",
        "abstention": "Abstention",
        f"{split}_mean_probabilities": "Mean of the probabilities",
    }
    reasons: dict[str, list[str]] = {}
    for name, reason in absent.items():
        label = names.get(name) or (METRIC_BY_NAME[name].title if name in METRIC_BY_NAME else name)
        reasons.setdefault(reason, []).append(label)
    return [
        *notes,
        *(f"{', '.join(labels)} undefined: {reason}" for reason, labels in reasons.items()),
    ]


def _colors(data: ReportData) -> list[tuple[str, str]]:
    """Return the meaning of each colour, by the name of its CSS variable."""
    if len(final_metrics(data.metrics)[1]["member_accuracy"]) == 1:
        colors = [("ensemble", "network"), ("members", "encoder")]
    else:
        colors = [("ensemble", "ensemble"), ("members", f"{voter_name(data)}s")]
    return [
        *colors,
        ("correct", "correct"),
        ("incorrect", "incorrect"),
        ("ink", "training and filters"),
    ]


def _mistake_text(split: str, mistake: Mistake) -> str:
    """Return the alternative text of a misclassified image."""
    return (
        f"{split} image {mistake.name}: {mistake.label}, predicted as {mistake.predicted} with "
        f"probability {percent(mistake.confidence)}"
    )


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)  # noqa: PLW2901
        elif isinstance(value, list):
            value = " ".join(map(str, value))  # noqa: PLW2901
        if value not in (None, ""):
            rows.append((name, str(value)))
    return rows
