"""Charts of a report; those of filter use are in `filters`.

Shapes: N samples, M members, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mixmo_fastai.metrics.calibration import (
    expected_calibration_error,
    reliability_bins,
    top_predictions,
)
from mixmo_fastai.metrics.diversity import accuracy_by_agreement
from mixmo_fastai.metrics.label_results import NUM_SHOWN
from mixmo_fastai.metrics.selective import risk_at_coverage, risk_coverage
from mixmo_fastai.metrics.table import COVERAGES, decimal, percent
from mixmo_fastai.report.drawing import CORRECT, ENSEMBLE, INCORRECT, INK, MEMBERS, Plot
from mixmo_fastai.runtime.text import truncate

MARKERS = ("o", "s", "^", "D")
CURVE_POINTS = 200
MIN_ACCURACY_RANGE = 0.05
"""Smallest range of an accuracy axis, so that random fluctuations do not look like differences."""
MIN_BIN_IMAGES = 10
"""Number of images below which a bin of a reliability diagram is drawn faint."""
History = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Chart:
    """A plot with title and caption.

    Attributes:
        title: title of the chart.
        plot: the plot, which includes an alternative text.
        caption: how to read the plot.
    """

    title: str
    plot: Plot
    caption: str

    @property
    def svg(self) -> Markup:
        """The plot as SVG for a page."""
        return self.plot.svg()

    @property
    def png(self) -> bytes:
        """The plot with its title as PNG data."""
        return self.plot.png(self.title)


def learning_curves(
    histories: Sequence[History], rates: Sequence[tuple[float, float]], *, has_members: bool
) -> list[Chart]:
    """Plot loss, accuracy and learning rate over the epochs.

    Args:
        histories: history of each network; empty ones are skipped.
        rates: pairs of (fractional) epoch and learning rate; not plotted if empty.
        has_members: the network has two or more members.
    """
    histories = [history for history in histories if history]
    if not histories:
        return []
    mixtures = (
        " Mixtures are harder than plain images, so the training loss may be above the validation "
        "loss."
    )
    loss = _curves(
        "Loss",
        histories,
        [("train_loss", "training", INK), ("valid_loss", "validation", ENSEMBLE)],
        f"Cross-entropy in nats, per member.{mixtures * has_members}",
    )
    whole = "ensemble of members" if has_members else "network"
    columns = [("accuracy", whole, ENSEMBLE), ("member_accuracy", "mean of members", MEMBERS)]
    accuracy = _curves(
        "Validation accuracy",
        histories,
        columns[: 1 + has_members],
        "Measured on the validation split. Training does not use the test set.",
        fractions=True,
    )
    rate = _rate_curve(rates) if rates else None
    return [chart for chart in (loss, accuracy, rate) if chart is not None]


def reliability(name: str, title: str, logits: Tensor, labels: Tensor, *, caption: str) -> Chart:
    """Plot accuracy against confidence in bins, with the fraction of the samples in each."""
    bins = reliability_bins(logits, labels)
    num_bins, fractions = len(bins.counts), bins.counts / bins.counts.sum()
    lefts = [i / num_bins for i in range(num_bins)]
    filled, few = bins.counts > 0, bins.counts < MIN_BIN_IMAGES

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        bars = upper.bar(lefts, bins.accuracy, 1 / num_bins, align="edge", color=ENSEMBLE)
        for bar, is_faint in zip(bars, few, strict=True):
            bar.set_alpha(0.15 if is_faint else 0.55)
        for shown, alpha in ((filled & ~few, 1.0), (filled & few, 0.3)):
            points = bins.confidence[shown], bins.accuracy[shown]
            if shown.any():  # an unclipped line without points would distort the layout
                upper.plot(*points, "o", color=ENSEMBLE, alpha=alpha, markersize=4, clip_on=False)
        upper.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
        lower.bar(lefts, fractions, 1 / num_bins, align="edge", color=ENSEMBLE, alpha=0.8)
        lower.set(xlabel="confidence", ylabel="images")
        percent_axis(upper.yaxis, lower.xaxis, lower.yaxis)

    ece = expected_calibration_error(logits, labels).item()
    gap = float((bins.confidence - bins.accuracy) @ fractions.double())
    side = "above" if gap > 0 else "below"
    tendency = "overconfident" if gap > 0 else "underconfident"
    mean = f"mean confidence is {100 * abs(gap):.2f} points {side} the accuracy"
    text = (
        f"Reliability diagram: ECE {percent(ece)}; {mean}; {percent(float(fractions[-1]))} of the "
        "images are in the last bin."
    )
    sentences = [f"ECE {percent(ece)}; {mean}: {tendency} on average.", caption]
    if (filled & few).any():
        sentences.append(f"Bins with fewer than {MIN_BIN_IMAGES} images are faint.")
    return Chart(title, Plot(draw, name, text, size=(4.1, 3.6)), " ".join(sentences).strip())


def risk_against_coverage(logits: Tensor, labels: Tensor) -> Chart:
    """Plot the error rate among the most confident predictions."""
    confidence, correct = top_predictions(logits, labels)
    coverage, risk = risk_coverage(confidence, correct)
    step = max(1, len(risk) // CURVE_POINTS)
    shown = torch.arange(len(risk) - 1, -1, -step).flip(0)
    marks = {c: risk_at_coverage(confidence, correct, c / 100).item() for c in COVERAGES}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(coverage[shown], risk[shown], color=ENSEMBLE)
        for marker, (percentage, value) in zip(MARKERS, marks.items(), strict=False):
            label = f"{percentage} % accepted: {percent(value)} incorrect"
            axes.plot(percentage / 100, value, marker, color=ENSEMBLE, markersize=6, label=label)
        axes.legend(loc="best")
        axes.set(xlabel="images accepted, most confident first")
        axes.set(ylabel="error rate among them")
        axes.set(xlim=(0, 1.02), ylim=(0, max(float(risk.max()) * 1.08, 0.01)))
        percent_axis(axes.xaxis, axes.yaxis)

    risks = ", ".join(f"{percent(value)} at {c} %" for c, value in marks.items())
    text = f"Risk-coverage curve: error rate {risks}, {percent(float(risk[-1]))} on all images."
    caption = "Error rate if only the most confident predictions are accepted."
    return Chart("Risk and coverage", Plot(draw, "risk", text), caption)


def confusion(matrix: Tensor, classes: Sequence[str]) -> Chart:
    """Plot the confusion matrix of a few classes, each row as fractions of the true class."""
    fractions = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    num_classes = len(classes)
    names = [truncate(name, 14) for name in classes]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for true in range(num_classes):
            for predicted in range(num_classes):
                fraction, count = float(fractions[true, predicted]), int(matrix[true, predicted])
                color = CORRECT if true == predicted else INCORRECT
                corner = (predicted - 0.5, true - 0.5)
                axes.add_patch(
                    Rectangle(corner, 1, 1, facecolor=color, alpha=0.6 * fraction**0.5, linewidth=0)
                )
                if count:
                    axes.text(
                        predicted,
                        true,
                        f"{count:,}",
                        ha="center",
                        va="center",
                        fontsize=7 if num_classes <= 12 else 5,
                    )
        axes.set_xticks(range(num_classes), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(num_classes), names)
        axes.set(xlim=(-0.5, num_classes - 0.5), ylim=(num_classes - 0.5, -0.5))
        axes.set(xlabel="predicted", ylabel="true", aspect="equal")
        axes.grid(visible=False)

    side = 3.6 + 0.12 * num_classes
    best, worst = int(fractions.diagonal().argmax()), int(fractions.diagonal().argmin())
    text = (
        f"Confusion matrix of {num_classes} classes; highest accuracy: {classes[best]}, "
        f"{percent(float(fractions[best, best]))}; lowest: {classes[worst]}, "
        f"{percent(float(fractions[worst, worst]))}."
    )
    return Chart(
        "Confusion matrix",
        Plot(draw, "confusion", text, size=(side, side)),
        "Number of images by true and predicted class; a stronger colour is a larger fraction of "
        "the true class.",
    )


def members(accuracies: Sequence[float], ensemble: float, kind: str) -> Chart:
    """Plot each member's accuracy beside the ensemble's."""
    names = [f"{kind} {number}" for number in range(1, len(accuracies) + 1)] + ["ensemble"]
    values = [*accuracies, ensemble]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colors = [MEMBERS] * len(accuracies) + [ENSEMBLE]
        bars = axes.barh(names, values, color=colors, alpha=0.75, height=0.6)
        axes.bar_label(bars, [percent(value) for value in values], padding=3, fontsize=8)
        edge = max(values) * 1.25 or 1.0
        axes.set(xlabel="accuracy", xlim=(0, edge), xticks=_fraction_ticks(edge))
        percent_axis(axes.xaxis)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    listed = ", ".join(f"{n} {percent(v)}" for n, v in zip(names, values, strict=True))
    height = 1.2 + 0.28 * len(values)
    return Chart(
        f"Accuracy of the {kind}s",
        Plot(draw, "members", f"Accuracy: {listed}.", size=(4.1, height)),
        f"Accuracy of each {kind}, and of the ensemble, the mean of their logits.",
    )


def label_precisions(values: Mapping[str, Any]) -> Chart:
    """Plot the average precision of the most frequent labels.

    Args:
        values: metrics of labels; see `evaluation.multi_label`.
    """
    rows = sorted(values["per_class"], key=lambda row: -row["positives"])[:NUM_SHOWN]
    rows = [row for row in rows if row["average_precision"] is not None]
    names, precisions = [row["name"] for row in rows], [row["average_precision"] for row in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(range(len(rows)), precisions, color=ENSEMBLE, alpha=0.75, height=0.6)
        axes.set_yticks(range(len(rows)), names)
        axes.bar_label(bars, [percent(value) for value in precisions], padding=3, fontsize=8)
        axes.set(xlabel="average precision", xlim=(0, 1.25), xticks=(0, 0.25, 0.5, 0.75, 1))
        percent_axis(axes.xaxis)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    listed = ", ".join(f"{n} {percent(v)}" for n, v in zip(names, precisions, strict=True))
    size = 4.1, 1.2 + 0.28 * max(1, len(rows))
    return Chart(
        "Average precision by label",
        Plot(draw, "labels", f"Average precision: {listed}.", size=size),
        "Average precision of each label, the area under its precision-recall curve.",
    )


def agreement(member_logits: Tensor, labels: Tensor, kind: str) -> Chart:
    """Plot how many members vote for the ensemble's class, and how often it is correct."""
    counts, accuracy = accuracy_by_agreement(member_logits, labels)
    num_members, total = member_logits.shape[1], int(counts.sum())
    votes = [number for number in range(num_members, -1, -1) if counts[number]]
    names = [f"{number} of {num_members}" for number in votes]
    fractions = [int(counts[number]) / total for number in votes]
    accuracies = [float(accuracy[number]) for number in votes]
    correct = [a * fraction for a, fraction in zip(accuracies, fractions, strict=True)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        style = {"alpha": 0.75, "height": 0.6}
        axes.barh(names, correct, color=CORRECT, label="correct", **style)
        incorrect = [fraction - part for fraction, part in zip(fractions, correct, strict=True)]
        bars = axes.barh(
            names, incorrect, left=correct, color=INCORRECT, label="incorrect", **style
        )
        axes.bar_label(bars, [f"{percent(a)} correct" for a in accuracies], padding=3, fontsize=8)
        edge = max(fractions) * 1.4
        axes.set(xlabel="images", xlim=(0, edge), xticks=_fraction_ticks(edge))
        percent_axis(axes.xaxis)
        axes.set_ylabel(f"agreeing {kind}s")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper right", ncols=2)

    listed = "; ".join(
        f"{name} on {percent(fraction)} of the images, {percent(a)} of them correct"
        for name, fraction, a in zip(names, fractions, accuracies, strict=True)
    )
    return Chart(
        "Agreement",
        Plot(
            draw,
            "agreement",
            f"{kind}s that agree with the ensemble: {listed}.",
            size=(4.1, 1.7 + 0.32 * len(names)),
        ),
        f"Images by the number of {kind}s that predict the ensemble's class.",
    )


def percent_axis(*each: Axis) -> None:
    """Format the fractions on axes as percentages."""
    for axis in each:
        axis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g} %")


def _fraction_ticks(edge: float) -> list[float]:
    """Return ticks from 0 to the upper limit of an axis, none of them above 1."""
    highest = min(edge, 1)
    return [tick for tick in MaxNLocator(nbins=5).tick_values(0, highest) if tick <= highest]


def _curves(
    title: str,
    histories: Sequence[History],
    columns: Sequence[tuple[str, str, str]],
    caption: str,
    *,
    fractions: bool = False,
) -> Chart | None:
    """Plot columns (name, label, colour) of histories; None if none of them has a value."""
    columns = [
        column for column in columns if any(column[0] in row for h in histories for row in h)
    ]
    if not columns:
        return None
    num_epochs = int(max(row["epoch"] for history in histories for row in history))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, history in enumerate(histories):
            for index, (column, label, color) in enumerate(columns):
                rows = [row for row in history if column in row]
                axes.plot(
                    [row["epoch"] for row in rows],
                    [row[column] for row in rows],
                    color=color,
                    linestyle=("-", "--", "-.", ":")[number % 4],
                    marker=MARKERS[index] if num_epochs <= 20 else "",
                    label=label if number == 0 else None,
                )
        axes.set(xlabel="epoch", ylabel=title.lower(), xlim=(0.5, num_epochs + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if fractions:
            low, high = axes.get_ylim()
            middle, half_range = (low + high) / 2, max(high - low, MIN_ACCURACY_RANGE) / 2
            axes.set_ylim(max(middle - half_range, 0), min(middle + half_range, 1.01))
            percent_axis(axes.yaxis)
        if len(columns) > 1:
            axes.legend()

    show = percent if fractions else decimal
    ends = [
        f"{label} {show(history[-1][column])}"
        for history in histories
        for column, label, _ in columns
        if column in history[-1]
    ]
    text = f"{title} over {num_epochs} epochs; after the last: {', '.join(ends)}."
    return Chart(title, Plot(draw, title.lower().replace(" ", "-"), text), caption)


def _rate_curve(rates: Sequence[tuple[float, float]]) -> Chart:
    epochs, values = zip(*rates, strict=True)
    peak = max(range(len(values)), key=values.__getitem__)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(epochs, values, color=INK)
        axes.set(xlabel="epochs completed", ylabel="learning rate", xlim=(0, epochs[-1]))
        axes.set_ylim(0, values[peak] * 1.08)

    text = (
        f"Learning rate over {epochs[-1]:g} epochs: {values[0]:.3g} at the start, at most "
        f"{values[peak]:.3g}, after {epochs[peak]:.3g} epochs, and {values[-1]:.3g} at the end."
    )
    return Chart("Learning rate", Plot(draw, "learning-rate", text), "The schedule of the recipe.")
