"""Metrics of runs with several labels per image.

Shapes: N images, M members, K classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.evaluation.results import MAX_TEMPERATURE_ERROR
from mixmo_fastai.evaluation.splits import MIN_IMAGES_FOR_TEMPERATURE, evaluate_splits
from mixmo_fastai.metrics.label_results import LABELS
from mixmo_fastai.metrics.multi_label import (
    DEFAULT_THRESHOLD,
    LabelDecisions,
    as_decisions,
    average_precisions,
    best_thresholds,
    decision_metrics,
    exact_match,
    f1_scores,
    image_intervals,
    label_temperature,
    mean_average_precision,
)

_LEFT_OUT = ("calibration", "sets", "abstention", "cross_fitted")


def is_multi_label(labelled: LabelledLogits) -> bool:
    """Check whether labels are several per image."""
    return labelled is not None and labelled[1].ndim == 2


def evaluate_multi_label(
    validation: LabelledLogits,
    test: LabelledLogits,
    classes: Sequence[str],
    *,
    separate: LabelledLogits = None,
    is_separate: bool = False,
) -> dict[str, Any]:
    """Compute all metrics of images with several labels.

    Args:
        validation: member logits (N, M, K) and labels (N, K) of the validation split.
        test: of the test set.
        classes: names of the labels.
        separate: of the images set aside for calibration; None if there are none.
        is_separate: whether only images that were set aside fit the temperature and the thresholds.

    Returns:
        The entries of `evaluate_splits` for the decisions of `metrics.multi_label.as_decisions`,
        without prediction sets, abstention and temperatures of halves; intervals over images. And
        as `LABELS` the metrics of labels, of the test set or else the validation images:

        - mean_ap, and member_mean_ap, a list; mean_ap_interval;
        - f1_micro, f1_macro and exact_match, with the thresholds;
        - thresholds, one per class, and thresholds_from: "validation", or "default" for
          `DEFAULT_THRESHOLD` if the thresholds would be chosen on the evaluated images; they are
          those of probabilities at the temperature, that of "calibrated" if its error is small, or
          else 1;
        - num_threshold_images, from which the thresholds were chosen;
        - deployed, only with that default: thresholds and temperature for predictions, from the
          evaluated images themselves;
        - per_class: a list with name, positives, average_precision, threshold, precision, recall
          and f1 of each class; None where undefined.
    """
    flat = [None if part is None else as_decisions(*part) for part in (validation, test, separate)]
    metrics = evaluate_splits(
        *flat[:2], separate=flat[2], is_separate=is_separate, with_intervals=False
    )
    absent = metrics.get("absent", {})
    for name in _LEFT_OUT:
        metrics.pop(name, None)
        absent.pop(name, None)
    if not absent:
        metrics.pop("absent", None)
    final = test or validation
    assert final is not None
    fitted_on = separate if is_separate else validation
    fitted = _fit_temperature(fitted_on)
    if "calibrated" in metrics:
        _use_images(metrics, fitted_on, fitted)
    logits, targets = final[0].double(), final[1]
    ends = {name: list(each) for name, each in image_intervals(logits.mean(1), targets).items()}
    interval = ends.pop("mean_ap", None)
    metrics["intervals"] = ends
    is_other = test is not None or is_separate
    decide = _choose(fitted_on if is_other else None, len(classes), fitted)
    found = _label_metrics(logits, targets, decide, classes)
    found["thresholds_from"] = "validation" if is_other and fitted_on is not None else "default"
    found["num_threshold_images"] = len(fitted_on[1]) if is_other and fitted_on is not None else 0
    if not is_other:
        chosen = _choose(fitted_on, len(classes), fitted)
        found["deployed"] = {"thresholds": chosen.thresholds, "temperature": chosen.temperature}
    metrics[LABELS] = {**found, **({} if interval is None else {"mean_ap_interval": interval})}
    return metrics


def _fit_temperature(images: LabelledLogits) -> tuple[float, float] | None:
    """Fit the temperature of images, with its error; None if there are too few."""
    if images is None or len(images[1]) < MIN_IMAGES_FOR_TEMPERATURE:
        return None
    return label_temperature(images[0].double().mean(dim=1), images[1])


def _use_images(
    metrics: dict[str, Any], images: LabelledLogits, fitted: tuple[float, float] | None
) -> None:
    """Let the entry "calibrated" count images instead of decisions, or remove it for too few."""
    assert images is not None
    if fitted is not None:
        metrics["calibrated"] |= {"temperature_error": fitted[1], "num_images": len(images[1])}
        return
    del metrics["calibrated"]
    metrics.setdefault("absent", {})["calibrated"] = (
        f"there are {len(images[1])} validation images; fitting a temperature needs "
        f"{MIN_IMAGES_FOR_TEMPERATURE}"
    )


def _choose(
    images: LabelledLogits, num_classes: int, fitted: tuple[float, float] | None
) -> LabelDecisions:
    """Choose thresholds of calibrated probabilities on images, or the default without any.

    A temperature with a large error is not used.
    """
    if images is None:
        return LabelDecisions((DEFAULT_THRESHOLD,) * num_classes)
    temperature = 1.0
    if fitted is not None and fitted[1] <= MAX_TEMPERATURE_ERROR:
        temperature = fitted[0]
    probabilities = (images[0].double().mean(dim=1) / temperature).sigmoid()
    return LabelDecisions(tuple(best_thresholds(probabilities, images[1]).tolist()), temperature)


def _label_metrics(
    logits: Tensor, targets: Tensor, decide: LabelDecisions, classes: Sequence[str]
) -> dict[str, Any]:
    """Compute the metrics of labels from member logits (N, M, K) and targets (N, K)."""
    ensemble = logits.mean(dim=1)
    predicted = decide(ensemble)
    values: dict[str, Any] = {}
    try:
        values["mean_ap"] = mean_average_precision(ensemble, targets)
        members = [mean_average_precision(member, targets) for member in logits.unbind(dim=1)]
        values["member_mean_ap"] = members
        values["f1_micro"], values["f1_macro"] = f1_scores(predicted, targets)
    except InputError as error:
        values["absent"] = str(error)
    per_class = {
        "positives": (targets > 0).sum(dim=0),
        "average_precision": average_precisions(ensemble, targets),
        "threshold": torch.tensor(decide.thresholds),
        **decision_metrics(predicted, targets),
    }
    rows = [
        {"name": name, **{key: _number(column[k]) for key, column in per_class.items()}}
        for k, name in enumerate(classes)
    ]
    return {
        **values,
        "exact_match": exact_match(predicted, targets),
        "thresholds": list(decide.thresholds),
        "temperature": decide.temperature,
        "per_class": rows,
    }


def _number(value: Tensor) -> float | int | None:
    number: float | int = value.item()
    return None if math.isnan(number) else number
