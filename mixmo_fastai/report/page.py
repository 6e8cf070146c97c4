"""The page itself: findings and charts, laid out as one HTML file that needs no other."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mixmo_fastai import __version__
from mixmo_fastai.confusion import confusion_matrix, most_confused
from mixmo_fastai.files import write_atomically
from mixmo_fastai.recipe import to_toml
from mixmo_fastai.report import charts
from mixmo_fastai.report.findings import Findings, Mistake, gather
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.wording import (
    FIGURE,
    FIGURES,
    OF_SEVERAL_MEMBERS,
    PART_NAMES,
    decimal,
    expectation,
    final_figures,
    method_name,
    percent,
)

MOST_CLASSES_IN_A_MATRIX = 20
NUM_PAIRS = 15
SMALLEST_THUMBNAIL = 64


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        charts: its drawings.
        note: words above them; also why there are none.
    """

    name: str
    title: str
    charts: list[charts.Chart]
    note: str = ""


def write_report(
    run: RunFolder, path: Path, data_dir: Path | None = None, *, device: str | None = None
) -> Findings:
    """Evaluate a trained run and write its report.

    Args:
        run: finished.
        path: of the HTML file; one that is there is replaced at once, never partly.
        data_dir: where the run's data lies, if not where it was looked for in training.
        device: where to evaluate; the recipe's where not given.

    Returns:
        what the report says.

    Raises:
        InputError: the run is not finished or damaged, or its data is not there.
    """
    findings = gather(run, data_dir, device=device)
    write_atomically(path, render(findings))
    return findings


def render(findings: Findings) -> str:
    """Lay out a report as HTML. Names of classes, files and recipes are escaped."""
    recipe, folder = findings.recipe, files("mixmo_fastai.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = as_data_uri
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        name=findings.run.path.resolve().name,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        method=method_name(recipe),
        lead=_lead(findings),
        tiles=_tiles(findings),
        published=expectation(recipe),
        table=_figure_table(findings),
        averages=_averages(findings),
        notes=_notes(findings),
        sections=_sections(findings),
        pairs=_pairs(findings),
        num_classes=len(findings.classes),
        mistakes=findings.mistakes,
        mistake_text=_mistake_text,
        percent=percent,
        recipe=to_toml(recipe),
        environment=_environment_rows(findings.environment),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def as_data_uri(pixels: Tensor) -> str:
    """Put an image (C, H, W) uint8 into an address, as PNG: in grey, or its first three channels.

    Small images are enlarged by a whole factor, so that their pixels stay what they are.
    """
    shown = pixels[:3] if len(pixels) >= 3 else pixels[0]
    image = Image.fromarray((shown.permute(1, 2, 0) if shown.ndim == 3 else shown).numpy())
    factor = max(1, SMALLEST_THUMBNAIL // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _kind(findings: Findings) -> str:
    """What one vote comes from."""
    return "network" if findings.recipe.model.num_nets > 1 else "member"


def _lead(findings: Findings) -> str:
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
        parts.append(f"trained in {_duration(summary['seconds'])}")
    return ", ".join(parts) + "."


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _tiles(findings: Findings) -> list[tuple[str, str, str]]:
    """The figures that matter most: label, value, and a word beside it."""
    part, test = final_figures(findings.figures)
    ends = findings.figures.get("intervals", {})
    expected = findings.recipe.expected
    tiles = [
        (f"{PART_NAMES[part]} accuracy", percent(test["accuracy"]), _interval(ends, "accuracy")),
        (
            "Published",
            percent(expected.accuracy) if expected.accuracy is not None else "none",
            f"with {expected.arch}" if expected.accuracy is not None else "for this recipe",
        ),
        ("NLL", decimal(test["nll"]), _interval(ends, "nll")),
        ("ECE", percent(test["ece"]), _interval(ends, "ece")),
    ]
    for name, how in (("calibrated", "validation split"), ("cross_fitted", "other half")):
        if found := findings.figures.get(name):
            tiles.append(("ECE, calibrated", percent(found["ece"]), f"temperature of the {how}"))
            break
    if len(test["member_accuracy"]) > 1:
        values = test["member_accuracy"]
        label = f"Mean {_kind(findings)}"
        tiles.append((label, percent(sum(values) / len(values)), f"accuracy of {len(values)}"))
    return tiles


def _interval(ends: Mapping[str, Sequence[float]], name: str) -> str:
    if name not in ends:
        return ""
    low, high = ends[name]
    show = FIGURE[name].show
    return f"{show(low)} to {show(high)}"


def _averages(findings: Findings) -> list[tuple[str, str, Mapping[str, Any]]]:
    """The columns of the table of figures: name, explanation, figures."""
    figures = findings.figures
    part, final = final_figures(figures)
    columns = [(PART_NAMES[part], "mean of the logits, as published", final)]
    if found := figures.get(f"{part}_mean_probabilities"):
        columns.append((f"{PART_NAMES[part]}, mean p", "mean of the probabilities", found))
    if part != "valid" and (found := figures.get("valid")):
        columns.append(("Validation", "mean of the logits", found))
    return columns


def _figure_table(findings: Findings) -> list[tuple[Any, list[tuple[str, str]]]]:
    """Rows of figures: how each is called, and per column its value and why there is none."""
    rows = []
    columns = _averages(findings)
    alone = len(columns[0][2]["member_accuracy"]) == 1
    for figure in FIGURES:
        cells = []
        for _, _, values in columns:
            if figure.name in values:
                cells.append((figure.show(values[figure.name]), ""))
            else:
                cells.append(("-", values.get("absent", {}).get(figure.name, "")))
        if not (alone and figure.name in OF_SEVERAL_MEMBERS):
            rows.append((figure, cells))
    return rows


def _notes(findings: Findings) -> list[str]:
    """Why some figures are not there, each reason once."""
    part, test = final_figures(findings.figures)
    absent: dict[str, str] = findings.figures.get("absent", {}) | test.get("absent", {})
    if len(test["member_accuracy"]) == 1:  # the section of the members says it
        unasked = (*OF_SEVERAL_MEMBERS, f"{part}_mean_probabilities")
        absent = {name: reason for name, reason in absent.items() if name not in unasked}
    names = {
        "calibrated": "Calibration on the validation split",
        "cross_fitted": "Calibration on halves of the images",
        f"{part}_mean_probabilities": "Mean of the probabilities",
    }
    reasons: dict[str, list[str]] = {}
    for name, reason in absent.items():
        label = names.get(name) or (FIGURE[name].label if name in FIGURE else name)
        reasons.setdefault(reason, []).append(label)
    return [f"{', '.join(labels)}: none, as {reason}" for reason, labels in reasons.items()]


def _sections(findings: Findings) -> list[Section]:
    return [
        _training_section(findings),
        _calibration_section(findings),
        Section(
            "risk",
            "Selective prediction",
            [charts.risk_against_coverage(findings.logits, findings.labels)],
        ),
        _member_section(findings),
        _confusion_section(findings),
        _filter_section(findings),
    ]


def _training_section(findings: Findings) -> Section:
    drawn = charts.learning_curves(
        findings.histories, findings.rates, several=findings.recipe.model.num_members > 1
    )
    notes = []
    if not drawn:
        notes.append("The run has no history.csv: it was imported, or not trained here.")
    elif len(findings.histories) > 1:
        notes.append(f"{len(findings.histories)} networks, each with a line style of its own.")
    if drawn and not findings.num_images[0]:
        notes.append("There was no validation split, so training has no accuracy to show.")
    note = " ".join(notes)
    return Section("training", "Training", drawn, note)


def _calibration_section(findings: Findings) -> Section:
    drawn = [
        charts.reliability(
            "reliability-before",
            "Reliability as trained",
            findings.logits,
            findings.labels,
            caption="Bars on the diagonal would be honest; below it, the network is too sure.",
            color=0,
        )
    ]
    if findings.calibrated is None:
        return Section(
            "calibration", "Calibration", drawn, f"No temperature: {findings.calibration}."
        )
    drawn.append(
        charts.reliability(
            "reliability-after",
            "Reliability after temperature scaling",
            findings.calibrated,
            findings.labels,
            caption=f"At {findings.calibration}.",
            color=2,
        )
    )
    return Section("calibration", "Calibration", drawn)


def _member_section(findings: Findings) -> Section:
    (_, test), kind = final_figures(findings.figures), _kind(findings)
    if len(test["member_accuracy"]) == 1:
        return Section("members", "Members", [], "The network has one member: nothing to compare.")
    return Section(
        "members",
        f"{kind.capitalize()}s",
        [
            charts.members(test["member_accuracy"], test["accuracy"], kind),
            charts.agreement(findings.member_logits, findings.labels, kind),
        ],
    )


def _confusion_section(findings: Findings) -> Section:
    if len(findings.classes) > MOST_CLASSES_IN_A_MATRIX:
        note = f"The pairs most often confused, of {len(findings.classes)} classes."
        return Section("confusion", "Confusion", [], note)
    matrix = confusion_matrix(findings.logits, findings.labels)
    return Section("confusion", "Confusion", [charts.confusion(matrix, findings.classes)])


def _filter_section(findings: Findings) -> Section:
    drawn = [charts.filters(findings.uses)]
    if len(findings.norms) == 1:
        drawn.append(charts.encoders(findings.norms[0]))
    return Section("filters", "Filter use", drawn)


def _pairs(findings: Findings) -> list[tuple[str, str, str, str]]:
    """Rows of the most confused pairs: true, predicted, images, share of the true class."""
    matrix = confusion_matrix(findings.logits, findings.labels)
    names = findings.classes
    return [
        (names[pair.true], names[pair.predicted], f"{pair.samples:,}", percent(pair.share))
        for pair in most_confused(matrix, NUM_PAIRS)
    ]


def _mistake_text(mistake: Mistake) -> str:
    """Say in words what a picture of a mistake shows."""
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
