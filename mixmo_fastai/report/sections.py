"""The sections of the page: charts, and tables beside them."""

import math
from typing import NamedTuple

import torch

from mixmo_fastai.calibration import top_predictions
from mixmo_fastai.confusion import confusion_matrix, most_confused
from mixmo_fastai.evaluation import COVERAGES
from mixmo_fastai.report import charts, filters
from mixmo_fastai.report.findings import ReportData
from mixmo_fastai.selective import risk_at_coverage
from mixmo_fastai.wording import (
    decimal,
    duration,
    final_metrics,
    percent,
    round_percent,
    temperature_warning,
)

MOST_CLASSES_IN_A_MATRIX = 20
NUM_PAIRS = 15


class Table(NamedTuple):
    """A small table beside or below charts.

    Attributes:
        title: its caption.
        head: names of its columns; empty for pairs of a name and a value.
        rows: a text for each column.
        numbers: the columns whose texts are numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: tuple[int, ...] = ()


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        charts: its drawings.
        tables: beside the charts; together they are an even number of cells, so that no half of a
            row is empty.
        notes: paragraphs above the charts; also why there are none.
        details: a long table below, folded.
    """

    name: str
    title: str
    charts: list[charts.Chart]
    tables: list[Table] = []  # noqa: RUF012
    notes: list[str] = []  # noqa: RUF012
    details: Table | None = None


def sections(findings: ReportData) -> list[Section]:
    """Lay out the parts of the page between its metrics and its mistakes."""
    return [
        _training_section(findings),
        _calibration_section(findings),
        _risk_section(findings),
        _member_section(findings),
        _confusion_section(findings),
        _filter_section(findings),
    ]


def _training_section(findings: ReportData) -> Section:
    drawn = charts.learning_curves(
        findings.histories, findings.rates, several=findings.recipe.model.num_members > 1
    )
    notes = []
    if not drawn:
        notes.append("The run has no history.csv: it was imported, or not trained here.")
    elif len(findings.histories) > 1:
        notes.append(f"{len(findings.histories)} networks, each with its own line style.")
    if drawn and not findings.num_images[0]:
        notes.append("Without a validation split, training has no accuracy to show.")
    tables = [_training_table(findings)] if len(drawn) % 2 else []
    return Section("training", "Training", drawn, tables, notes)


def _training_table(findings: ReportData) -> Table:
    """Collect facts of the training from the first network's history."""
    history, recipe = findings.histories[0], findings.recipe
    last = history[-1]
    rows = [
        ("Epochs", f"{last['epoch']:,.0f} of {recipe.train.epochs:,}"),
        ("Images seen", f"{last['images_seen']:,.0f}"),
        ("Largest learning rate", f"{recipe.lr:.4g}"),
    ]
    if "seconds" in last:
        seconds = sum(row.get("seconds", 0.0) for row in history)
        rows.append(("Time in epochs", duration(seconds)))
    for name, label, show in (
        ("train_loss", "Training loss", decimal),
        ("valid_loss", "Validation loss", decimal),
        ("accuracy", "Validation accuracy", percent),
    ):
        if name in last:
            rows.append((f"{label}, last epoch", show(last[name])))
    scored = [row for row in history if "accuracy" in row]
    if scored:
        best = max(scored, key=lambda row: row["accuracy"])
        rows.append(
            ("Best validation accuracy", f"{percent(best['accuracy'])}, epoch {best['epoch']:.0f}")
        )
    title = "The first network" if len(findings.histories) > 1 else "In numbers"
    return Table(title, (), rows, (1,))


def _calibration_section(findings: ReportData) -> Section:
    before = charts.reliability(
        "reliability-before",
        "Reliability as trained",
        findings.logits,
        findings.labels,
        caption="Bars on the diagonal are calibrated; below it the network is overconfident, above "
        "it underconfident.",
    )
    if findings.calibrated is None:
        table = Table("After temperature scaling", (), [(f"None: {findings.calibration}.",)])
        return Section("calibration", "Calibration", [before], [table])
    after = charts.reliability(
        "reliability-after",
        "Reliability after temperature scaling",
        findings.calibrated,
        findings.labels,
        caption=f"At {findings.calibration}.",
    )
    remark = temperature_warning(findings.metrics.get(scaled_by(findings), {}))
    return Section("calibration", "Calibration", [before, after], [], [remark] if remark else [])


def _risk_section(findings: ReportData) -> Section:
    confidence, correct = top_predictions(findings.logits, findings.labels)
    total = len(correct)
    rows = []
    for coverage in (10, 20, 30, 40, 50, 60, 70, *COVERAGES, 100):
        accepted = math.ceil(coverage / 100 * total - 1e-9)
        risk = risk_at_coverage(confidence, correct, coverage / 100).item()
        rows.append((f"{coverage} %", f"{accepted:,}", percent(risk)))
    table = Table("Error rate by coverage", ("Accepted", "Images", "Wrong"), rows, (1, 2))
    chart = charts.risk_against_coverage(findings.logits, findings.labels)
    return Section("risk", "Selective prediction", [chart], [table])


def _member_section(findings: ReportData) -> Section:
    (_, test), voter = final_metrics(findings.metrics), kind(findings)
    if len(test["member_accuracy"]) == 1:
        note = "The network has one member: there is nothing to compare."
        return Section("members", "Members", [], [], [note])
    return Section(
        "members",
        f"{voter.capitalize()}s",
        [
            charts.members(test["member_accuracy"], test["accuracy"], voter),
            charts.agreement(findings.member_logits, findings.labels, voter),
        ],
    )


def _confusion_section(findings: ReportData) -> Section:
    matrix = confusion_matrix(findings.logits, findings.labels)
    names, num_classes = findings.classes, len(findings.classes)
    pairs = Table(
        "Most confused pairs",
        ("True", "Predicted", "Images", "Of true"),
        [
            (names[pair.true], names[pair.predicted], f"{pair.samples:,}", percent(pair.share))
            for pair in most_confused(matrix, NUM_PAIRS)
        ],
        (2, 3),
    )
    if not pairs.rows:
        pairs = Table("Most confused pairs", (), [("No image is taken for another class.",)])
    if num_classes <= MOST_CLASSES_IN_A_MATRIX:
        return Section("confusion", "Confusion", [charts.confusion(matrix, names)], [pairs])
    sizes = matrix.sum(dim=1)
    accuracy = matrix.diagonal() / sizes.clamp(min=1)
    present = sizes.nonzero().flatten().tolist()
    worst = sorted(present, key=lambda i: float(accuracy[i]))[:NUM_PAIRS]
    classes = Table(
        "Classes with the lowest accuracy",
        ("Class", "Images", "Accuracy"),
        [(names[i], f"{int(sizes[i]):,}", percent(float(accuracy[i]))) for i in worst],
        (1, 2),
    )
    return Section("confusion", "Confusion", [], [pairs, classes], [f"{num_classes} classes."])


def _filter_section(findings: ReportData) -> Section:
    use = findings.uses[0]
    shares = torch.stack([each.shares for each in findings.uses]).mean(dim=0)
    details = Table(
        "Convolutions by name",
        ("", "Module", *(f"> {round_percent(t)}" for t in use.thresholds)),
        [
            (str(number), name, *map(round_percent, row))
            for number, (name, row) in enumerate(zip(use.layers, shares.tolist(), strict=True), 1)
        ],
        (0, *range(2, 2 + len(use.thresholds))),
    )
    drawn = [filters.filters(findings.uses), filters.encoders(findings.norms)]
    return Section("filters", "Filter use", drawn, details=details)


def kind(findings: ReportData) -> str:
    """Return the name of one voter."""
    return "network" if findings.recipe.model.num_nets > 1 else "member"


def scaled_by(findings: ReportData) -> str:
    """Return which metrics at a temperature the page shows: their name, or "" if there are none."""
    names = ("calibrated", "cross_fitted")
    return next((name for name in names if findings.metrics.get(name)), "")
