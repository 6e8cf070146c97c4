"""Data of a report, collected in one pass over a run's images.

Shapes: N test images, M members (or networks of a deep ensemble), K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.runs import FinishedRun, open_finished
from mixmo_fastai.evaluation.splits import cross_scale, evaluate_splits
from mixmo_fastai.metrics.calibration import top_predictions
from mixmo_fastai.metrics.label_results import LABELS
from mixmo_fastai.metrics.multi_label import DECISIONS, as_decisions
from mixmo_fastai.models.filters import FilterUse, encoder_norms, filter_use
from mixmo_fastai.models.mixmo_model import MixMoModel
from mixmo_fastai.report.decisions import DecisionData, decision_data
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_network
from mixmo_fastai.training.prepare import images_of_warmup
from mixmo_fastai.training.train import schedules

NUM_MISTAKES = 12
"""Number of confident mistakes in the report."""
CURVE_POINTS = 400
"""Number of points of the learning-rate curve."""


@dataclass(frozen=True, eq=False)
class Mistake:
    """A misclassified image.

    Attributes:
        pixels: (C, H, W) uint8.
        name: path of its file, or a name such as "test/123".
        label, predicted: class names.
        confidence: probability of the predicted class.
        votes: class predicted by each member.
    """

    pixels: Tensor
    name: str
    label: str
    predicted: str
    confidence: float
    votes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Data of the report of a run.

    Attributes:
        run, recipe: the run and its recipe.
        classes: class names, in the order of the logits; with several labels per image "no" and
            "yes", since each label is a decision: a sample of these classes.
        num_images: number of images of the validation and test splits.
        parameters: number of parameters of all networks.
        metrics: from `evaluation.evaluate_splits`.
        summary: final metrics written by training; empty if there are none.
        environment: environment of training; empty if it was not recorded.
        member_logits, labels: logits (N, M, K) and labels (N,) of the test set, or of the
            validation images if there are no labelled test images; of decisions, see `classes`.
        calibrated: the ensemble's logits (N, K), divided by a temperature fitted on other images.
        calibration: description of these images, or the reason why `calibrated` is None.
        histories: rows of each network's history.csv.
        rates: pairs of (fractional) epoch and learning rate; empty without a history.
        uses: filter use of each network; empty without convolutions.
        norms: encoder norms (M, D) of each network; as many as `uses`.
        mistakes: the most confident mistakes, most confident first.
        decisions: what is accepted, asked about and ambiguous; None without calibration images, or
            without test images.
        label_names: names of the labels of images with several; empty with one.
        without_filters: why `uses` is empty.
    """

    run: RunFolder
    recipe: Recipe
    classes: tuple[str, ...]
    num_images: tuple[int, int]
    parameters: int
    metrics: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    member_logits: Tensor
    labels: Tensor
    calibrated: Tensor | None
    calibration: str
    histories: list[list[dict[str, float]]]
    rates: list[tuple[float, float]]
    uses: list[FilterUse]
    norms: list[Tensor]
    mistakes: list[Mistake]
    decisions: DecisionData | None = None
    label_names: tuple[str, ...] = ()
    without_filters: str = ""

    @property
    def logits(self) -> Tensor:
        """The ensemble's logits (N, K), the mean of the members'."""
        return self.member_logits.mean(dim=1)


def collect_report_data(
    run: RunFolder, data_dir: Path | None = None, *, device: str | None = None
) -> ReportData:
    """Evaluate a trained run once on its validation and test images, and collect the report data.

    Args:
        run: a finished run.
        data_dir: folder of the run's data, if not the one that training used.
        device: device to evaluate on; by default, that of the recipe.

    Raises:
        InputError: the run is not finished or damaged, or its data is missing.
    """
    finished = open_finished(run, data_dir, device)
    validation, test, separate = finished.logits(finished.loaders())
    final = test or validation
    member_logits, labels = final[0].double(), final[1]
    classes, label_names = finished.source.classes, ()
    if finished.source.is_multi_label:
        record, metrics = None, finished.multi_label_metrics((validation, test, separate))
        member_logits, labels = as_decisions(member_logits, labels)
        classes, label_names = DECISIONS, classes
    else:
        record = finished.calibration(validation, separate)
        metrics = evaluate_splits(
            validation, test, record, separate=separate, is_separate=finished.is_separate
        )
    networks = [load_network(network) for network in run.networks()]
    uses, norms, without_filters = _filters(networks)
    calibrated, calibration = _calibrate(metrics, member_logits.mean(dim=1), labels)
    histories = [read_history(network) for network in run.networks()]
    return ReportData(
        run=run,
        recipe=finished.recipe,
        classes=classes,
        num_images=tuple(0 if split is None else len(split[1]) for split in (validation, test)),
        parameters=sum(p.numel() for network in networks for p in network.parameters()),
        metrics=metrics,
        summary=run.metrics() if run.is_finished else {},
        environment=run.environment(),
        member_logits=member_logits,
        labels=labels,
        calibrated=calibrated,
        calibration=calibration,
        histories=histories,
        rates=_rates(finished, histories[0]),
        uses=uses,
        norms=norms,
        without_filters=without_filters,
        mistakes=confident_mistakes(finished, member_logits, labels),
        decisions=(
            None
            if record is None or test is None
            else decision_data(record, finished, member_logits, labels)
        ),
        label_names=label_names,
    )


def _filters(networks: Sequence[MixMoModel]) -> tuple[list[FilterUse], list[Tensor], str]:
    """Measure the filters of each network; without convolutions, return the reason instead."""
    try:
        uses = [filter_use(network) for network in networks]
        return uses, [encoder_norms(network) for network in networks], ""
    except InputError as error:
        return [], [], str(error)


def confident_mistakes(
    finished: FinishedRun, member_logits: Tensor, labels: Tensor, count: int = NUM_MISTAKES
) -> list[Mistake]:
    """Find the misclassified images for which the ensemble is most confident.

    Args:
        finished: the run.
        member_logits: logits of `FinishedRun.final_images`, in their order, (N, M, K); or of the
            decisions about their labels.
        labels: (N,).
        count: largest number of mistakes.
    """
    logits = member_logits.mean(dim=1)
    confidence, correct = top_predictions(logits, labels)
    incorrect = (~correct).nonzero().flatten()
    chosen = incorrect[confidence[incorrect].argsort(descending=True, stable=True)][:count]
    images, classes = finished.final_images, finished.source.classes
    votes = member_logits[chosen].argmax(dim=2).tolist()
    several = len(classes) if finished.source.is_multi_label else 0
    mistakes = []
    for rank, sample in enumerate(chosen.tolist()):
        index, name_of = sample, classes
        if several:
            index, label = divmod(sample, several)
            name_of = (f"no {classes[label]}", classes[label])
        mistakes.append(
            Mistake(
                pixels=images[index],
                name=images.name(index),
                label=name_of[int(labels[sample])],
                predicted=name_of[int(logits[sample].argmax())],
                confidence=float(confidence[sample]),
                votes=tuple(name_of[vote] for vote in votes[rank]),
            )
        )
    return mistakes


def read_history(run: RunFolder) -> list[dict[str, float]]:
    """Read the history of a run as numbers; empty cells are omitted.

    Raises:
        InputError: history.csv is damaged.
    """
    rows: list[dict[str, float]] = []
    try:
        for row in run.history():
            rows.append({name: float(value) for name, value in row.items() if value})
            if not {"epoch", "images_seen"} <= rows[-1].keys():
                raise ValueError("an epoch has no epoch number or no images_seen")
    except (ValueError, TypeError) as error:
        raise InputError(f"{run.path / 'history.csv'} is damaged: {error}.") from error
    return rows


def _rates(finished: FinishedRun, history: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Compute the learning rate over the epochs of a training from its recipe."""
    if not history:
        return []
    recipe = finished.recipe
    steps = int(history[0]["images_seen"]) // recipe.train.batch_size
    warmup = recipe.warmup_steps(images_of_warmup(recipe, finished.source))
    rate, epochs = schedules(recipe, steps, warmup)["lr"], recipe.train.epochs
    return [
        (epochs * i / CURVE_POINTS, float(rate(i / CURVE_POINTS))) for i in range(CURVE_POINTS + 1)
    ]


def _calibrate(
    metrics: dict[str, Any], logits: Tensor, labels: Tensor
) -> tuple[Tensor | None, str]:
    """Divide logits by a temperature fitted on other images; also describe these images.

    Returns:
        The scaled logits and a description; or None and the reason.
    """
    if found := metrics.get("calibrated"):
        temperature = found["temperature"]
        return logits / temperature, f"temperature {temperature:.3f}, from the validation split"
    if LABELS in metrics:  # halves of decisions would share images
        return None, metrics.get("absent", {}).get("calibrated", "there are no other images")
    try:
        scaled, temperatures = cross_scale(logits, labels)
    except InputError:
        return None, f"{metrics['absent']['calibrated']}; {metrics['absent']['cross_fitted']}"
    shown = " and ".join(f"{temperature:.3f}" for temperature in temperatures)
    return scaled, f"temperatures {shown}, each from the other half of these images"
