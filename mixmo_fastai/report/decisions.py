"""The section on what to do with predictions: accept, ask, or consider several classes.

Shapes: N test images, M members, K classes.
"""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import COVERAGE, MAX_RISK
from mixmo_fastai.evaluation.runs import FinishedRun
from mixmo_fastai.metrics.abstention import Abstain, abstention_metrics
from mixmo_fastai.metrics.conformal import set_metrics
from mixmo_fastai.metrics.scaling import ensemble_logits
from mixmo_fastai.metrics.selective import risk_coverage
from mixmo_fastai.metrics.table import percent, round_percent
from mixmo_fastai.report.charts import CURVE_POINTS, Chart, percent_axis
from mixmo_fastai.report.drawing import ENSEMBLE, INK, Plot
from mixmo_fastai.runs.calibration import Calibration

MAX_RISKS = (MAX_RISK, 0.1, 0.2, 0.3)
"""Limits of the risk: the smallest with which any calibration image is accepted is shown."""
MAX_CLASSES = 15
"""Number of classes in the table; with more classes, those of the lowest coverage."""


@dataclass(frozen=True, eq=False)
class Example:
    """An image with what is decided about it.

    Attributes:
        title: the decision.
        pixels: (C, H, W) uint8.
        name: name of the image.
        label: its class.
        text: prediction and probability, or the set.
    """

    title: str
    pixels: Tensor
    name: str
    label: str
    text: str


@dataclass(frozen=True, eq=False)
class DecisionData:
    """What the section shows.

    Attributes:
        confidence: (N,), calibrated.
        correct: (N,) bool.
        abstain: chosen for one of `MAX_RISKS`.
        sets: (N, K) bool, prediction sets for `COVERAGE`; None if there are too few images.
        reason: why `sets` is None.
        labels: (N,).
        classes: class names.
        examples: images with decisions.
    """

    confidence: Tensor
    correct: Tensor
    abstain: Abstain
    sets: Tensor | None
    reason: str
    labels: Tensor
    classes: tuple[str, ...]
    examples: list[Example]


def decision_data(
    calibration: Calibration, finished: FinishedRun, member_logits: Tensor, labels: Tensor
) -> DecisionData:
    """Decide about the test images.

    Args:
        calibration: of the run.
        finished: the run.
        member_logits: (N, M, K), of `FinishedRun.final_images`.
        labels: (N,).
    """
    probabilities = ensemble_logits(member_logits, calibration.scaling).softmax(dim=1)
    confidence = probabilities.amax(dim=1)
    attempts = [calibration.abstain(limit) for limit in MAX_RISKS]
    abstain = next((each for each in attempts if each.coverage), attempts[0])
    sets, reason = None, ""
    try:
        sets = calibration.sets(COVERAGE)(probabilities)
    except InputError as error:
        reason = str(error)
    correct = probabilities.argmax(dim=1) == labels
    return DecisionData(
        confidence=confidence,
        correct=correct,
        abstain=abstain,
        sets=sets,
        reason=reason,
        labels=labels,
        classes=finished.source.classes,
        examples=_examples(finished, probabilities, labels, abstain(confidence), sets),
    )


def _examples(
    finished: FinishedRun,
    probabilities: Tensor,
    labels: Tensor,
    accepted: Tensor,
    sets: Tensor | None,
) -> list[Example]:
    """Choose the median accepted image, the median one to ask about, and the most ambiguous one."""
    confidence, classes = probabilities.max(dim=1)
    names = finished.source.classes

    def example(title: str, index: int, text: str) -> Example:
        images = finished.final_images
        label = names[int(labels[index])]
        return Example(title, images[index], images.name(index), label, text)

    found = []
    for title, chosen in (("accept", accepted), ("ask", ~accepted)):
        indices = chosen.nonzero().flatten()
        if len(indices):
            index = int(indices[confidence[indices].argsort(stable=True)[len(indices) // 2]])
            text = f"{names[int(classes[index])]}, probability {percent(float(confidence[index]))}"
            found.append(example(title, index, text))
    if sets is not None and int(sets.sum(dim=1).max()) > 1:
        index = int(sets.sum(dim=1).argmax())
        order = probabilities[index].argsort(descending=True).tolist()
        members = [names[label] for label in order if bool(sets[index, label])]
        shown = ", ".join(members[:6]) + (", …" if len(members) > 6 else "")
        found.append(example("most ambiguous", index, f"{len(members)} classes: {shown}"))
    return found


def notes(data: DecisionData, summary: dict[str, object]) -> list[str]:
    """Return the sentences above the chart.

    Args:
        data: of the section.
        summary: entry "calibration" of the metrics.
    """
    lines = [_calibration_note(summary)]
    reached = abstention_metrics(data.abstain(data.confidence), data.correct)
    limit = round_percent(data.abstain.max_risk)
    guarantee, smallest = round_percent(data.abstain.guarantee), round_percent(MAX_RISK)
    none = (
        f"No threshold guarantees with a certainty of {guarantee} that at most {smallest} of the "
        f"accepted predictions are wrong, from {data.abstain.num_images:,} calibration images."
    )
    if data.abstain.coverage:
        if data.abstain.max_risk > MAX_RISK:
            lines.append(
                f"{none} The next limit that can be met, {limit}, is shown instead; "
                "since it was chosen so, its certainty is somewhat lower."
            )
        text = (
            f"Accept predictions with a probability of {percent(data.abstain.threshold)} or more: "
            f"with a certainty of {guarantee}, at most {limit} of them are wrong. On the test "
            f"images that accepts {percent(reached['coverage'])}"
        )
        if reached["risk"] is not None:
            text += f", of which {percent(reached['risk'])} are wrong"
        lines.append(f"{text}.")
    else:
        lines.append(none)
    if data.sets is None:
        lines.append(f"No prediction sets: {data.reason}")
    else:
        found = set_metrics(data.sets, data.labels)
        low, high = map(percent, found["interval"])
        lines.append(
            f"Sets for {round_percent(COVERAGE)} contain the label of {percent(found['coverage'])} "
            f"of the test images ({low} to {high}) and have {found['mean_size']:.2f} classes on "
            "average. That holds for all classes together; --per-class makes it hold for each."
        )
    command = (
        f"mixmo predict RUN IMAGES --max-risk {data.abstain.max_risk:g} --coverage {COVERAGE:g}"
    )
    return [*lines, f"The same for your own images: {command}"]


def _calibration_note(summary: dict[str, object]) -> str:
    if summary["method"] == "none":
        return f"The probabilities are not calibrated: {summary['reason']}."
    before, after = summary["before"], summary["after"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    name = "vector scaling"
    if (temperature := summary["temperature"]) is not None:
        name = f"temperature {temperature:.3f}"
    return (
        f"Predictions are calibrated by {name}, from {summary['num_images']:,} images; in "
        f"cross-validation on them the NLL is {after['nll']:.4f} instead of {before['nll']:.4f}, "
        f"the ECE {percent(after['ece'])} instead of {percent(before['ece'])}."
    )


def threshold_chart(data: DecisionData) -> Chart:
    """Plot the error rate by coverage, with the chosen threshold."""
    coverage, risk = risk_coverage(data.confidence, data.correct)
    step = max(1, len(risk) // CURVE_POINTS)
    shown = torch.arange(len(risk) - 1, -1, -step).flip(0)
    reached = abstention_metrics(data.abstain(data.confidence), data.correct)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(coverage[shown], risk[shown], color=ENSEMBLE)
        label = f"limit {round_percent(data.abstain.max_risk)}"
        axes.axhline(
            data.abstain.max_risk, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=label
        )
        if reached["risk"] is not None:
            axes.plot(reached["coverage"], reached["risk"], "o", color=ENSEMBLE, label="threshold")
        axes.legend(loc="best")
        axes.set(xlabel="images accepted, most confident first", ylabel="error rate among them")
        top = max(float(risk.max()) * 1.08, data.abstain.max_risk * 1.3)
        axes.set(xlim=(0, 1.02), ylim=(0, top))
        percent_axis(axes.xaxis, axes.yaxis)

    text = f"Error rate by accepted fraction; the threshold accepts {percent(reached['coverage'])}."
    caption = "The threshold is chosen on calibration images, the curve is of the test images."
    return Chart("Accept or ask", Plot(draw, "decisions", text), caption)


def class_rows(data: DecisionData) -> list[tuple[str, ...]]:
    """Return coverage and mean size of the sets of each class, lowest coverage first."""
    assert data.sets is not None
    coverages, sizes = set_metrics(data.sets, data.labels)["class_coverage"], data.sets.sum(dim=1)
    rows = []
    for label, coverage in enumerate(coverages):
        if coverage is not None:
            mean_size = float(sizes[data.labels == label].double().mean())
            rows.append((coverage, data.classes[label], mean_size))
    rows.sort(key=lambda row: row[0])
    return [(name, percent(value), f"{size:.2f}") for value, name, size in rows]
