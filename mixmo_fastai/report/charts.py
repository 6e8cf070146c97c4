"""The drawings of a report.

Shapes: N samples, M members, K classes, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mixmo_fastai.calibration import (
    expected_calibration_error,
    reliability_bins,
    top_predictions,
)
from mixmo_fastai.diversity import accuracy_by_agreement
from mixmo_fastai.evaluation import COVERAGES
from mixmo_fastai.filter_use import FilterUse
from mixmo_fastai.report.drawing import INK, SERIES, Drawing
from mixmo_fastai.selective import risk_at_coverage, risk_coverage
from mixmo_fastai.wording import percent

MARKERS = ("o", "s", "^", "D")
CURVE_POINTS = 200
History = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Chart:
    """A drawing and the words below it.

    Attributes:
        title: what it is.
        drawing: it carries what it shows in words.
        caption: how to read it.
    """

    title: str
    drawing: Drawing
    caption: str

    @property
    def svg(self) -> Markup:
        """The drawing, for a page."""
        return self.drawing.svg()

    @property
    def png(self) -> bytes:
        """The drawing with its title, as a picture."""
        return self.drawing.png(self.title)


def learning_curves(
    histories: Sequence[History], rates: Sequence[tuple[float, float]], *, several: bool
) -> list[Chart]:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        histories: of each network; one that is empty is left out.
        rates: epochs, with parts, and the learning rate then; without any, it is not drawn.
        several: whether the network has several members.
    """
    histories = [history for history in histories if history]
    if not histories:
        return []
    columns = [("train_loss", "training"), ("valid_loss", "validation")]
    loss = _curves(
        "Loss",
        histories,
        columns,
        "Cross-entropy in nats, the training loss per member. MixMo trains on mixtures, which "
        "are harder: its training loss may lie above the validation loss.",
    )
    columns = [("accuracy", "ensemble of members"), ("member_accuracy", "mean of members")]
    accuracy = _curves(
        "Validation accuracy",
        histories,
        columns[: 1 + several],
        "Share of the validation split; the test set is not looked at in training.",
    )
    rate = _rate_curve(rates) if rates else None
    return [chart for chart in (loss, accuracy, rate) if chart is not None]


def reliability(
    name: str, title: str, logits: Tensor, labels: Tensor, *, caption: str, color: int
) -> Chart:
    """Draw accuracy against confidence in bins, with the share of the samples in each."""
    bins = reliability_bins(logits, labels)
    num_bins, shares = len(bins.counts), bins.counts / bins.counts.sum()
    lefts = [i / num_bins for i in range(num_bins)]
    filled = bins.counts > 0

    def plot(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        upper.bar(lefts, bins.accuracy, 1 / num_bins, align="edge", color=SERIES[color], alpha=0.55)
        points = bins.confidence[filled], bins.accuracy[filled]
        upper.plot(*points, "o", color=SERIES[color], markersize=4, clip_on=False)
        upper.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
        lower.bar(lefts, shares, 1 / num_bins, align="edge", color=SERIES[color], alpha=0.8)
        lower.set(xlabel="confidence", ylabel="share")

    ece = expected_calibration_error(logits, labels).item()
    gap = float((bins.confidence - bins.accuracy) @ shares.double())
    lean = "too sure" if gap > 0 else "not sure enough"
    text = (
        f"Reliability diagram: ECE {percent(ece)}; confidence is {percent(abs(gap))} {lean} on "
        f"average; {percent(float(shares[-1]))} of the images are in the last bin."
    )
    return Chart(
        title, Drawing(plot, name, text, size=(4.6, 3.9)), f"ECE {percent(ece)}. {caption}"
    )


def risk_against_coverage(logits: Tensor, labels: Tensor) -> Chart:
    """Draw the share of errors among the surest predictions."""
    confidence, correct = top_predictions(logits, labels)
    coverage, risk = risk_coverage(confidence, correct)
    step = max(1, len(risk) // CURVE_POINTS)
    shown = torch.arange(len(risk) - 1, -1, -step).flip(0)
    marks = {c: risk_at_coverage(confidence, correct, c / 100).item() for c in COVERAGES}

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(coverage[shown], risk[shown], color=SERIES[0])
        for marker, (percentage, value) in zip(MARKERS, marks.items(), strict=False):
            label = f"{percent(value)} of the surest {percentage} %"
            axes.plot(percentage / 100, value, marker, color=SERIES[1], markersize=6, label=label)
        axes.legend(loc="best")
        axes.set(xlabel="coverage: share accepted, surest first", ylabel="risk: errors among them")
        axes.set(xlim=(0, 1.02), ylim=(0, max(float(risk.max()) * 1.08, 0.01)))

    said = ", ".join(f"{percent(value)} at {c} %" for c, value in marks.items())
    text = f"Risk-coverage curve: errors {said}, and {percent(float(risk[-1]))} of all images."
    caption = "If only the surest images are accepted, how many of those are wrong?"
    return Chart("Risk and coverage", Drawing(plot, "risk", text), caption)


def confusion(matrix: Tensor, classes: Sequence[str]) -> Chart:
    """Draw the confusion matrix of a few classes, each row as shares of the true class."""
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    num_classes = len(classes)
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in classes]

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for true in range(num_classes):
            for predicted in range(num_classes):
                share, count = float(shares[true, predicted]), int(matrix[true, predicted])
                color = SERIES[0] if true == predicted else SERIES[1]
                corner = (predicted - 0.5, true - 0.5)
                axes.add_patch(
                    Rectangle(corner, 1, 1, facecolor=color, alpha=0.6 * share**0.5, linewidth=0)
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

    side = 4.0 + 0.12 * num_classes
    best, worst = int(shares.diagonal().argmax()), int(shares.diagonal().argmin())
    text = (
        f"Confusion matrix of {num_classes} classes; the best recognised is {classes[best]} with "
        f"{percent(float(shares[best, best]))}, the worst {classes[worst]} with "
        f"{percent(float(shares[worst, worst]))}."
    )
    return Chart(
        "Confusion matrix",
        Drawing(plot, "confusion", text, size=(side, side)),
        "Images per true and predicted class; the deeper, the larger the share of the true class.",
    )


def members(accuracies: Sequence[float], ensemble: float, kind: str) -> Chart:
    """Draw each member's accuracy beside the ensemble's."""
    names = [f"{kind} {number}" for number in range(1, len(accuracies) + 1)] + ["together"]
    values = [*accuracies, ensemble]

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        colors = [SERIES[1]] * len(accuracies) + [SERIES[0]]
        bars = axes.barh(names, values, color=colors, alpha=0.75, height=0.6)
        axes.bar_label(bars, [percent(value) for value in values], padding=3, fontsize=8)
        axes.set(xlabel="accuracy", xlim=(0, min(1.0, max(values)) * 1.25))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    told = ", ".join(f"{n} {percent(v)}" for n, v in zip(names, values, strict=True))
    height = 1.2 + 0.28 * len(values)
    return Chart(
        "Accuracy of the members",
        Drawing(plot, "members", f"Test accuracy: {told}.", size=(4.6, height)),
        "What each gives alone, and the mean of their logits.",
    )


def agreement(member_logits: Tensor, labels: Tensor, kind: str) -> Chart:
    """Draw how many members vote for the ensemble's class, and how often that is right."""
    counts, accuracy = accuracy_by_agreement(member_logits, labels)
    num_members, total = member_logits.shape[1], int(counts.sum())
    kept = [number for number in range(num_members, -1, -1) if counts[number]]
    names = [f"{number} of {num_members}" for number in kept]
    shares = [int(counts[number]) / total for number in kept]
    right = [share * float(accuracy[number]) for number, share in zip(kept, shares, strict=True)]

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(names, right, color=SERIES[0], alpha=0.75, height=0.6, label="right")
        wrong = [share - part for share, part in zip(shares, right, strict=True)]
        bars = axes.barh(
            names, wrong, left=right, color=SERIES[1], alpha=0.75, height=0.6, label="wrong"
        )
        said = [f"{percent(float(accuracy[number]))} right" for number in kept]
        axes.bar_label(bars, said, padding=3, fontsize=8)
        axes.set(xlabel="share of the images", xlim=(0, max(shares) * 1.35))
        axes.set_ylabel(f"{kind}s that agree")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right")

    told = "; ".join(
        f"{name} on {percent(share)} of the images, of which {percent(float(accuracy[number]))} "
        "are right"
        for name, share, number in zip(names, shares, kept, strict=True)
    )
    return Chart(
        "Agreement",
        Drawing(
            plot,
            "agreement",
            f"{kind}s that agree with the ensemble: {told}.",
            size=(4.6, 1.5 + 0.32 * len(names)),
        ),
        f"How many {kind}s vote for the ensemble's class: where they differ, doubt is due.",
    )


def filters(uses: Sequence[FilterUse]) -> Chart:
    """Draw the share of active filters per layer, the mean over networks."""
    first = uses[0]
    shares = torch.stack([use.shares for use in uses]).mean(dim=0)  # (L, T)
    average = shares.mean(dim=0).tolist()

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(1, len(first.layers) + 1)
        for column, threshold in enumerate(first.thresholds):
            axes.plot(
                places,
                shares[:, column],
                marker=MARKERS[column % len(MARKERS)],
                color=SERIES[column % len(SERIES)],
                label=f"above {threshold:.0%}: {average[column]:.0%} on average",
            )
        axes.set(xlabel="convolution of the core", ylabel="share of active filters", ylim=(0, 1.05))
        axes.legend()

    told = ", ".join(
        f"{percent(share)} above {threshold:.0%}"
        for threshold, share in zip(first.thresholds, average, strict=True)
    )
    networks = f" Mean over {len(uses)} networks." if len(uses) > 1 else ""
    return Chart(
        "Active filters",
        Drawing(
            plot, "filters", f"Active filters, average over {len(first.layers)} layers: {told}."
        ),
        f"Filters whose L1 norm exceeds a part of the layer's largest.{networks}",
    )


def encoders(norms: Tensor) -> Chart:
    """Draw the L1 norm of each member's filter (M, D), channels from the first's to the last's."""
    num_members, num_channels = norms.shape
    order = (
        (norms[0] - norms[-1]).argsort(descending=True)
        if num_members > 1
        else norms[0].argsort(descending=True)
    )

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for member in range(num_members):
            axes.plot(
                range(1, num_channels + 1),
                norms[member][order],
                color=SERIES[member % len(SERIES)],
                marker=MARKERS[member % len(MARKERS)] if num_channels <= 40 else "",
                label=f"encoder {member + 1}",
            )
        axes.set(xlabel="feature channel, sorted", ylabel="L1 norm", ylim=(0, None))
        axes.legend()

    largest = norms.argmax(dim=0).bincount(minlength=num_members).tolist()
    owned = ", ".join(f"encoder {m + 1} of {count}" for m, count in enumerate(largest))
    text = f"L1 norms of the encoders' filters for {num_channels} channels; largest is {owned}."
    caption = (
        "Where one encoder's norm is large and the others' small, the channel is that member's."
        if num_members > 1
        else "Norms of the first convolution's filters."
    )
    return Chart("Encoders", Drawing(plot, "encoders", text), caption)


def _curves(
    title: str,
    histories: Sequence[History],
    columns: Sequence[tuple[str, str]],
    caption: str,
) -> Chart | None:
    """Draw columns of histories over the epochs; None where none of them has a value."""
    columns = [part for part in columns if any(part[0] in row for h in histories for row in h)]
    if not columns:
        return None
    num_epochs = int(max(row["epoch"] for history in histories for row in history))

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for number, history in enumerate(histories):
            for place, (column, label) in enumerate(columns):
                rows = [row for row in history if column in row]
                axes.plot(
                    [row["epoch"] for row in rows],
                    [row[column] for row in rows],
                    color=SERIES[place],
                    linestyle=("-", "--", "-.", ":")[number % 4],
                    marker=MARKERS[place] if num_epochs <= 20 else "",
                    label=label if number == 0 else None,
                )
        axes.set(xlabel="epoch", ylabel=title.lower(), xlim=(0.5, num_epochs + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(columns) > 1:
            axes.legend()

    ends = [
        f"{label} {history[-1][column]:.4g}"
        for history in histories
        for column, label in columns
        if column in history[-1]
    ]
    text = f"{title} over {num_epochs} epochs; after the last: {', '.join(ends)}."
    return Chart(title, Drawing(plot, title.lower().replace(" ", "-"), text), caption)


def _rate_curve(rates: Sequence[tuple[float, float]]) -> Chart:
    epochs, values = zip(*rates, strict=True)
    peak = max(range(len(values)), key=values.__getitem__)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(epochs, values, color=SERIES[0])
        axes.set(xlabel="epochs passed", ylabel="learning rate", xlim=(0, epochs[-1]))
        axes.set_ylim(0, values[peak] * 1.08)

    text = (
        f"Learning rate over {epochs[-1]:g} epochs: {values[0]:.3g} at first, {values[peak]:.3g} "
        f"at most, after {epochs[peak]:.3g} epochs, and {values[-1]:.3g} at the end."
    )
    return Chart(
        "Learning rate", Drawing(plot, "learning-rate", text), "As scheduled, step by step."
    )
