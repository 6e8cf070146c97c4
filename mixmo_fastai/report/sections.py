"""Sections of the page, made of charts and tables."""

import math
from typing import NamedTuple

import torch

from mixmo_fastai.evaluation.results import final_metrics, temperature_warning
from mixmo_fastai.metrics.calibration import top_predictions
from mixmo_fastai.metrics.confusion import confusion_matrix, most_confused
from mixmo_fastai.metrics.label_results import LABELS, NUM_SHOWN, label_table, origin_in_use
from mixmo_fastai.metrics.selective import risk_at_coverage
from mixmo_fastai.metrics.table import COVERAGES, decimal, percent, round_percent
from mixmo_fastai.report import charts, decisions, filters
from mixmo_fastai.report.report_data import ReportData
from mixmo_fastai.runtime.text import duration

MAX_MATRIX_CLASSES = 20
NUM_PAIRS = 15


class Table(NamedTuple):
    """A small table.

    Attributes:
        title: caption.
        head: names of the columns; empty for pairs of name and value.
        rows: texts of each row, one per column.
        numbers: indices of the columns that hold numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: tuple[int, ...] = ()


class Section(NamedTuple):
    """A section of the page.

    Attributes:
        name: anchor.
        title: heading.
        charts: charts of the section.
        tables: tables next to the charts; charts and tables are an even number, so that no row of
            the two-column grid is half empty.
        notes: paragraphs above the charts, such as the reason why there are none.
        details: a long table below them, collapsed.
        examples: images below them.
    """

    name: str
    title: str
    charts: list[charts.Chart]
    tables: list[Table] = []  # noqa: RUF012
    notes: list[str] = []  # noqa: RUF012
    details: Table | None = None
    examples: list[decisions.Example] = []  # noqa: RUF012


def sections(data: ReportData) -> list[Section]:
    """Build the sections of the page between its metrics and its mistakes."""
    return [
        *([_label_section(data)] if data.label_names else []),
        _training_section(data),
        _calibration_section(data),
        _risk_section(data),
        *([] if data.label_names else [_decision_section(data)]),
        _member_section(data),
        _confusion_section(data),
        _filter_section(data),
    ]


def _training_section(data: ReportData) -> Section:
    drawn = charts.learning_curves(
        data.histories, data.rates, has_members=data.recipe.model.num_members > 1
    )
    notes = []
    if not drawn:
        notes.append("The run has no history.csv, for example because it was imported.")
    elif len(data.histories) > 1:
        notes.append(f"{len(data.histories)} networks, each with its own line style.")
    if drawn and not data.num_images[0]:
        notes.append("There is no validation accuracy, since the run has no validation split.")
    tables = [_training_table(data)] if len(drawn) % 2 else []
    return Section("training", "Training", drawn, tables, notes)


def _training_table(data: ReportData) -> Table:
    """Build a table of facts about the training, from the first network's history."""
    history, recipe = data.histories[0], data.recipe
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
    title = "The first network" if len(data.histories) > 1 else "In numbers"
    return Table(title, (), rows, (1,))


def _calibration_section(data: ReportData) -> Section:
    before = charts.reliability(
        "reliability-before",
        "Reliability as trained",
        data.logits,
        data.labels,
        caption="Bars that end on the diagonal are calibrated; below it, the network is "
        "overconfident, above it, underconfident.",
    )
    if data.calibrated is None:
        table = Table("After temperature scaling", (), [(f"Undefined: {data.calibration}.",)])
        return Section("calibration", "Calibration", [before], [table])
    after = charts.reliability(
        "reliability-after",
        "Reliability after temperature scaling",
        data.calibrated,
        data.labels,
        caption=f"At {data.calibration}.",
    )
    remark = temperature_warning(data.metrics.get(calibration_name(data), {}))
    return Section("calibration", "Calibration", [before, after], [], [remark] if remark else [])


def _risk_section(data: ReportData) -> Section:
    confidence, correct = top_predictions(data.logits, data.labels)
    total = len(correct)
    rows = []
    for coverage in (10, 20, 30, 40, 50, 60, 70, *COVERAGES, 100):
        accepted = math.ceil(coverage / 100 * total - 1e-9)
        risk = risk_at_coverage(confidence, correct, coverage / 100).item()
        rows.append((f"{coverage} %", f"{accepted:,}", percent(risk)))
    table = Table("Error rate by coverage", ("Accepted", "Images", "Error rate"), rows, (1, 2))
    chart = charts.risk_against_coverage(data.logits, data.labels)
    return Section("risk", "Selective prediction", [chart], [table])


def _decision_section(data: ReportData) -> Section:
    title, found = "What to do with it", data.decisions
    if found is None:
        note = (
            "Without validation images, there is no calibration. Train with --valid-split."
            if "calibration" not in data.metrics
            else "There are no labelled test images, on which what the calibration's sets and "
            "decisions promise could be measured."
        )
        return Section("decisions", title, [], [], [note])
    chart, texts = (
        decisions.threshold_chart(found),
        decisions.notes(found, data.metrics["calibration"]),
    )
    if found.sets is None:
        table = Table("Prediction sets", (), [(found.reason,)])
        return Section("decisions", title, [chart], [table], texts, None, found.examples)
    rows = decisions.class_rows(found)
    head = ("Class", "Coverage", "Classes per set")
    shown, few = rows[: decisions.MAX_CLASSES], len(rows) > decisions.MAX_CLASSES
    name = "Prediction sets by class" + ", lowest coverage first" * few
    details = Table("Prediction sets of all classes", head, rows, (1, 2)) if few else None
    table = Table(name, head, shown, (1, 2))
    return Section("decisions", title, [chart], [table], texts, details, found.examples)


def _label_section(data: ReportData) -> Section:
    values = data.metrics[LABELS]
    head, *rows = label_table(values)
    head = ("Label", *(name[:1].upper() + name[1:] for name in head[1:]))
    chosen = [0, *(head.index(name) for name in ("Images", "Threshold", "F1"))]
    short = [tuple(row[i] for i in chosen) for row in rows[:NUM_SHOWN]]
    caption = "The most frequent labels" if len(rows) > NUM_SHOWN else "By label"
    shown = Table(caption, tuple(head[i] for i in chosen), short, (1, 2, 3))
    details = Table("Precision and recall of all labels", head, rows, tuple(range(1, len(head))))
    notes = [f"Labels are predicted {origin_in_use(values)}."]
    if "f1_micro" in values:
        notes.append(
            f"F1 of all decisions: {decimal(values['f1_micro'])} (micro); mean over labels: "
            f"{decimal(values['f1_macro'])} (macro). All labels of "
            f"{percent(values['exact_match'])} of the images are right."
        )
    drawn = [charts.label_precisions(values)]
    return Section("labels", "Labels", drawn, [shown], notes, details)


def _member_section(data: ReportData) -> Section:
    (_, test), voter = final_metrics(data.metrics), voter_name(data)
    if len(test["member_accuracy"]) == 1:
        note = "The network has one member, so there is nothing to compare."
        return Section("members", "Members", [], [], [note])
    return Section(
        "members",
        f"{voter.capitalize()}s",
        [
            charts.members(test["member_accuracy"], test["accuracy"], voter),
            charts.agreement(data.member_logits, data.labels, voter),
        ],
    )


def _confusion_section(data: ReportData) -> Section:
    matrix = confusion_matrix(data.logits, data.labels)
    names, num_classes = data.classes, len(data.classes)
    pairs = Table(
        "Most confused pairs",
        ("True", "Predicted", "Images", "Of true class"),
        [
            (names[pair.true], names[pair.predicted], f"{pair.samples:,}", percent(pair.fraction))
            for pair in most_confused(matrix, NUM_PAIRS)
        ],
        (2, 3),
    )
    if not pairs.rows:
        pairs = Table("Most confused pairs", (), [("Every image is classified correctly.",)])
    if num_classes <= MAX_MATRIX_CLASSES:
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


def _filter_section(data: ReportData) -> Section:
    if not data.uses:
        return Section("filters", "Filter use", [], [], [data.without_filters])
    use = data.uses[0]
    fractions = torch.stack([each.fractions for each in data.uses]).mean(dim=0)
    details = Table(
        "Convolutions by name",
        ("", "Module", *(f"> {round_percent(t)}" for t in use.thresholds)),
        [
            (str(number), name, *map(round_percent, row))
            for number, (name, row) in enumerate(
                zip(use.layers, fractions.tolist(), strict=True), 1
            )
        ],
        (0, *range(2, 2 + len(use.thresholds))),
    )
    drawn = [filters.filters(data.uses), filters.encoders(data.norms)]
    return Section("filters", "Filter use", drawn, details=details)


def voter_name(data: ReportData) -> str:
    """Return the name of one voter of the ensemble: "network" or "member"."""
    return "network" if data.recipe.model.num_nets > 1 else "member"


def calibration_name(data: ReportData) -> str:
    """Return the name of the calibrated metrics that the page shows, or "" if there are none."""
    names = ("calibrated", "cross_fitted")
    return next((name for name in names if data.metrics.get(name)), "")
