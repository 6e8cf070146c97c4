"""Everything that a report says of a run, from one pass over its images.

Shapes: N test images, M members (or networks of a deep ensemble), K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmo_fastai.assessment import FinishedRun, open_finished
from mixmo_fastai.calibration import top_predictions
from mixmo_fastai.checkpoints.weights import load_network
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation import cross_scale, evaluate_splits
from mixmo_fastai.filter_use import FilterUse, encoder_norms, filter_use
from mixmo_fastai.recipe import Recipe
from mixmo_fastai.runs import RunFolder
from mixmo_fastai.training import images_of_warmup, schedules

NUM_MISTAKES = 12
"""Confident mistakes that are shown."""
CURVE_POINTS = 400
"""Points of the curve of the learning rate."""


@dataclass(frozen=True, eq=False)
class Mistake:
    """An image that the run gets wrong.

    Attributes:
        pixels: (C, H, W) uint8.
        name: its file, or such as "test/123".
        label, predicted: class names.
        confidence: probability of the predicted class.
        votes: each member's class.
    """

    pixels: Tensor
    name: str
    label: str
    predicted: str
    confidence: float
    votes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ReportData:
    """What a report says of a run.

    Attributes:
        run, recipe: the run.
        classes: names, in the order of the logits.
        num_images: of the validation and test parts.
        parameters: of all networks.
        metrics: as `evaluation.evaluate_splits` gives them.
        summary: the final metrics that training wrote; empty where it wrote none.
        environment: what training ran with; empty where it wrote none.
        member_logits, labels: of the test set, or of the validation images if no test images are
            labelled, (N, M, K) and (N,).
        calibrated: the ensemble's logits (N, K), divided by a temperature that other images gave.
        calibration: which images those are; or why `calibrated` is None.
        histories: the rows of each network's history.csv.
        rates: epochs passed, with parts, and the learning rate then; empty without a history.
        uses: filter use of each network.
        norms: encoder norms (M, D) of each network.
        mistakes: the most confident ones, most confident first.
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

    @property
    def logits(self) -> Tensor:
        """The ensemble's logits (N, K), the mean of the members'."""
        return self.member_logits.mean(dim=1)


def collect_report_data(
    run: RunFolder, data_dir: Path | None = None, *, device: str | None = None
) -> ReportData:
    """Show a trained run its validation and test images once, and collect the data of its report.

    Args:
        run: finished.
        data_dir: where its data lies, if not where it was looked for in training.
        device: where to evaluate; the recipe's where not given.

    Raises:
        InputError: the run is not finished or damaged, or its data is not there.
    """
    finished = open_finished(run, data_dir, device)
    validation, test = finished.logits(finished.loaders())
    metrics = evaluate_splits(validation, test)
    final = test or validation
    member_logits, labels = final[0].double(), final[1]
    networks = [load_network(network) for network in run.networks()]
    calibrated, calibration = _calibrate(metrics, member_logits.mean(dim=1), labels)
    histories = [read_history(network) for network in run.networks()]
    return ReportData(
        run=run,
        recipe=finished.recipe,
        classes=finished.source.classes,
        num_images=tuple(0 if part is None else len(part[1]) for part in (validation, test)),
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
        uses=[filter_use(network) for network in networks],
        norms=[encoder_norms(network) for network in networks],
        mistakes=confident_mistakes(finished, member_logits, labels),
    )


def confident_mistakes(
    finished: FinishedRun, member_logits: Tensor, labels: Tensor, count: int = NUM_MISTAKES
) -> list[Mistake]:
    """Find the images of the final metrics that the ensemble is surest of and wrong about.

    Args:
        finished: the run.
        member_logits: of `FinishedRun.final_images`, in their order, (N, M, K).
        labels: (N,).
        count: mistakes at most.
    """
    logits = member_logits.mean(dim=1)
    confidence, correct = top_predictions(logits, labels)
    wrong = (~correct).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
    images, classes = finished.final_images, finished.source.classes
    votes = member_logits[chosen].argmax(dim=2).tolist()
    return [
        Mistake(
            pixels=images[index],
            name=images.name(index),
            label=classes[int(labels[index])],
            predicted=classes[int(logits[index].argmax())],
            confidence=float(confidence[index]),
            votes=tuple(classes[vote] for vote in votes[place]),
        )
        for place, index in enumerate(chosen.tolist())
    ]


def read_history(run: RunFolder) -> list[dict[str, float]]:
    """Read the epochs of a run as numbers; what an epoch does not have is left out.

    Raises:
        InputError: history.csv is damaged.
    """
    rows: list[dict[str, float]] = []
    try:
        for row in run.history():
            rows.append({name: float(value) for name, value in row.items() if value})
            if not {"epoch", "images_seen"} <= rows[-1].keys():
                raise ValueError("an epoch lacks its number or its images_seen")
    except (ValueError, TypeError) as error:
        raise InputError(f"{run.path / 'history.csv'} is damaged: {error}.") from error
    return rows


def _rates(finished: FinishedRun, history: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Trace the learning rate that the recipe gave this training."""
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
    """Divide the test logits by the temperature of other images, and say which these are."""
    if found := metrics.get("calibrated"):
        temperature = found["temperature"]
        return logits / temperature, f"temperature {temperature:.3f}, from the validation split"
    try:
        scaled, temperatures = cross_scale(logits, labels)
    except InputError:
        return None, f"{metrics['absent']['calibrated']}; {metrics['absent']['cross_fitted']}"
    shown = " and ".join(f"{temperature:.3f}" for temperature in temperatures)
    return scaled, f"temperatures {shown}, each from the other half of these images"
