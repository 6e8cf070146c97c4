"""The page: findings and charts as one self-contained HTML file."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mixmo_fastai import __version__
from mixmo_fastai.files import write_atomically
from mixmo_fastai.recipe import to_toml
from mixmo_fastai.report.findings import Mistake, ReportData, collect_report_data
from mixmo_fastai.report.sections import kind, scaled_by, sections
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.wording import (
    METRIC_BY_NAME,
    METRICS,
    MULTI_MEMBER_METRICS,
    SPLIT_NAMES,
    decimal,
    duration,
    final_metrics,
    method_name,
    percent,
    published_result,
    round_percent,
    temperature_error,
    temperature_warning,
)

SMALLEST_THUMBNAIL = 64
_UNIT = re.compile(r"(?<=\d) (?=(?:%|points|nats|min|h|s)(?!\w))")


def write_report(
    run: RunFolder, path: Path, data_dir: Path | None = None, *, device: str | None = None
) -> ReportData:
    """Evaluate a trained run and write its report.

    Args:
        run: finished.
        path: of the HTML file; an existing one is replaced atomically.
        data_dir: where the run's data lies, if not where training looked for it.
        device: where to evaluate; the recipe's by default.

    Returns:
        The contents of the report.

    Raises:
        InputError: the run is not finished or damaged, or its data is not there.
    """
    findings = collect_report_data(run, data_dir, device=device)
    write_atomically(path, render(findings))
    return findings


def render(findings: ReportData) -> str:
    """Lay out a report as HTML. Names of classes, files and recipes are escaped."""
    recipe, folder = findings.recipe, files("mixmo_fastai.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = as_data_uri
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    page = template.render(
        name=findings.run.path.resolve().name,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        method=method_name(recipe),
        lead=_lead(findings),
        tiles=_tiles(findings),
        published=published_result(recipe),
        table=_metric_table(findings),
        averages=_averages(findings),
        notes=_notes(findings),
        sections=sections(findings),
        colors=_colors(findings),
        mistakes=findings.mistakes,
        mistake_text=_mistake_text,
        percent=percent,
        recipe=to_toml(recipe),
        environment=_environment_rows(findings.environment),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return _UNIT.sub("\u00a0", page)  # a number and its unit stay on one line


def as_data_uri(pixels: Tensor) -> str:
    """Encode an image (C, H, W) uint8 as a data URI of a PNG: grey, or its first three channels.

    Small images are enlarged by an integer factor, so that their pixels stay as they are.
    """
    shown = pixels[:3] if len(pixels) >= 3 else pixels[0]
    image = Image.fromarray((shown.permute(1, 2, 0) if shown.ndim == 3 else shown).numpy())
    factor = max(1, SMALLEST_THUMBNAIL // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _lead(findings: ReportData) -> str:
    recipe, summary = findings.recipe, findings.summary
    num_valid, num_test = findings.num_images
    parts = [
        f"{recipe.model.arch} on {Path(recipe.data.dataset).name}",
        f"{findings.parameters:,} parameters",
        f"{len(findings.classes)} classes",
        f"{num_test:,} test images" if num_test else "no labelled test images",
        f"{num_valid:,} validation images" if num_valid else "no validation split",
    ]
    if "images_seen" in summary:
        parts.append(f"{summary['images_seen']:,} images seen in training")
    if "seconds" in summary:
        parts.append(f"trained in {duration(summary['seconds'])}")
    return ", ".join(parts) + "."


def _tiles(findings: ReportData) -> list[tuple[str, str, str]]:
    """Return the main metrics: label, value, and a remark."""
    part, test = final_metrics(findings.metrics)
    ends = findings.metrics.get("intervals", {})
    expected = findings.recipe.expected
    tiles = [
        (f"{SPLIT_NAMES[part]} accuracy", percent(test["accuracy"]), _interval(ends, "accuracy")),
        ("NLL", decimal(test["nll"]), _interval(ends, "nll")),
        ("ECE", percent(test["ece"]), _interval(ends, "ece")),
    ]
    if expected.accuracy is not None:
        tiles.insert(1, ("Published", percent(expected.accuracy), f"with {expected.arch}"))
    if name := scaled_by(findings):
        found = findings.metrics[name]
        how = "validation split" if name == "calibrated" else "other half"
        remark = f"temperature of the {how}"
        if temperature_warning(found):
            remark = (
                f"unreliable: {remark} is uncertain by {round_percent(temperature_error(found))}"
            )
        tiles.append(("ECE, calibrated", percent(found["ece"]), remark))
    if len(test["member_accuracy"]) > 1:
        values = test["member_accuracy"]
        label = f"Mean {kind(findings)}"
        tiles.append((label, percent(sum(values) / len(values)), f"accuracy of {len(values)}"))
    return tiles


def _interval(ends: Mapping[str, Sequence[float]], name: str) -> str:
    if name not in ends:
        return ""
    low, high = ends[name]
    show = METRIC_BY_NAME[name].format_value
    return f"{show(low)} to {show(high)}"


def _averages(findings: ReportData) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return the columns of the table of metrics: name, explanation, values."""
    metrics = findings.metrics
    part, final = final_metrics(metrics)
    columns = [(SPLIT_NAMES[part], "mean of the logits, as published", final)]
    if found := metrics.get(f"{part}_mean_probabilities"):
        columns.append((f"{SPLIT_NAMES[part]}, mean p", "mean of the probabilities", found))
    if part != "valid" and (found := metrics.get("valid")):
        columns.append(("Validation", "mean of the logits", found))
    return columns


def _metric_table(findings: ReportData) -> list[tuple[Any, list[tuple[str, str]]]]:
    """Return the rows of metrics: name, and per column the value or why it is undefined."""
    rows = []
    columns = _averages(findings)
    alone = len(columns[0][2]["member_accuracy"]) == 1
    for metric in METRICS:
        cells = []
        for _, _, values in columns:
            if metric.name in values:
                cells.append((metric.format_value(values[metric.name]), ""))
            else:
                cells.append(("-", values.get("absent", {}).get(metric.name, "")))
        if not (alone and metric.name in MULTI_MEMBER_METRICS):
            rows.append((metric, cells))
    return rows


def _notes(findings: ReportData) -> list[str]:
    """Return why metrics are undefined, each reason once."""
    part, test = final_metrics(findings.metrics)
    absent: dict[str, str] = findings.metrics.get("absent", {}) | test.get("absent", {})
    if len(test["member_accuracy"]) == 1:  # the section of the members says it
        unasked = (*MULTI_MEMBER_METRICS, f"{part}_mean_probabilities")
        absent = {name: reason for name, reason in absent.items() if name not in unasked}
    names = {
        "calibrated": "Calibration on the validation split",
        "cross_fitted": "Calibration on halves of the images",
        f"{part}_mean_probabilities": "Mean of the probabilities",
    }
    reasons: dict[str, list[str]] = {}
    for name, reason in absent.items():
        label = names.get(name) or (METRIC_BY_NAME[name].label if name in METRIC_BY_NAME else name)
        reasons.setdefault(reason, []).append(label)
    return [f"{', '.join(labels)}: none, as {reason}" for reason, labels in reasons.items()]


def _colors(findings: ReportData) -> list[tuple[str, str]]:
    """Return the meaning of each colour, by the name of its CSS variable."""
    if len(final_metrics(findings.metrics)[1]["member_accuracy"]) == 1:
        colors = [("ensemble", "network"), ("members", "encoder")]
    else:
        colors = [("ensemble", "ensemble"), ("members", f"{kind(findings)}s")]
    return [*colors, ("right", "right"), ("wrong", "wrong"), ("ink", "training and filters")]


def _mistake_text(mistake: Mistake) -> str:
    """Describe the image of a mistake."""
    return (
        f"Test image {mistake.name}: {mistake.label}, taken for {mistake.predicted} with "
        f"{percent(mistake.confidence)}"
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
