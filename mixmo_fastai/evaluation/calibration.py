"""Fit the calibration of a run on its calibration images, and evaluate what it promises.

Shapes: n calibration images, N test images, M members, K classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.metrics.abstention import Abstain, abstention_metrics
from mixmo_fastai.metrics.bootstrap import intervals
from mixmo_fastai.metrics.calibration import expected_calibration_error, nll
from mixmo_fastai.metrics.conformal import SCORES, ConformalSets, set_metrics
from mixmo_fastai.metrics.ood import UNCERTAINTIES
from mixmo_fastai.metrics.scaling import (
    METHODS,
    Scaling,
    cross_scaled,
    ensemble_logits,
    fit_scaling,
)
from mixmo_fastai.runs.calibration import CONFIDENCES, Calibration

MIN_IMAGES = {"temperature": 50, "vector": 0}
"""Smallest number of calibration images of a method."""
MIN_IMAGES_PER_CLASS = {"temperature": 0, "vector": 100}
"""The same per class: vector scaling has two numbers for each class. With fewer images, sets whose
thresholds are chosen on the same images contain the label less often than promised."""
COVERAGE, MAX_RISK = 0.9, 0.05
"""Coverage of prediction sets and risk of accepted predictions that are evaluated by default."""


def calibrate(
    member_logits: Tensor, labels: Tensor, names: Sequence[str], method: str = "temperature"
) -> Calibration:
    """Fit a calibration.

    The scaling is kept only if it lowers the NLL in cross-validation on the same images.

    Args:
        member_logits: (n, M, K), of images that were neither trained on nor used for a choice.
        labels: (n,).
        names: names of the images.
        method: a name in `scaling.METHODS`, or "none".

    Raises:
        InputError: invalid arguments.
    """
    logits = member_logits.double().mean(dim=1)
    scaling, reason, effect = _helpful_scaling(logits, labels, method)
    scaled = ensemble_logits(member_logits, scaling)
    probabilities = scaled.softmax(dim=1)
    label_scores = {
        name: score(probabilities).gather(1, labels.long()[:, None])[:, 0]
        for name, score in SCORES.items()
    }
    return Calibration(
        scaling=scaling,
        reason=reason,
        effect=effect,
        num_classes=logits.shape[1],
        names=tuple(names),
        labels=labels.long(),
        correct=scaled.argmax(dim=1) == labels,
        label_scores=label_scores,
        confidences=confidences(member_logits, scaling),
    )


def calibrate_images(
    labelled: LabelledLogits, images: ImageSet, method: str = "temperature"
) -> Calibration | None:
    """Fit a calibration on images; None if there are none.

    Args:
        labelled: member logits (n, M, K) and labels (n,) of the images.
        images: the images, for their names.
        method: as for `calibrate`.
    """
    if labelled is None:
        return None
    return calibrate(*labelled, [images.name(i) for i in range(len(images))], method)


def summary(calibration: Calibration) -> dict[str, Any]:
    """Return what metrics.json and the JSON of `mixmo eval` say about a calibration."""
    scaling = calibration.scaling
    return {
        "method": "none" if scaling is None else scaling.method,
        "temperature": None if scaling is None else scaling.temperature,
        "reason": calibration.reason,
        "num_images": len(calibration.labels),
        **calibration.effect,
    }


def confidence(member_logits: Tensor, scaling: Scaling | None, score: str) -> Tensor:
    """Compute a score of `runs.calibration.CONFIDENCES`: (N, M, K) -> (N,).

    Args:
        member_logits: (N, M, K).
        scaling: applied first; None for none.
        score: name of the score; all but "confidence" are negated uncertainties.

    Raises:
        InputError: the score is undefined for one member.
    """
    scaled = member_logits.double() if scaling is None else scaling(member_logits.double())
    if score == "confidence":
        return scaled.mean(dim=1).softmax(dim=1).amax(dim=1)
    return -UNCERTAINTIES[score.replace("-", "_")](scaled)


def confidences(member_logits: Tensor, scaling: Scaling | None) -> dict[str, Tensor]:
    """Compute each score of `confidence`, without those that are undefined for one member."""
    names = [n for n in CONFIDENCES if n != "mutual-information" or member_logits.shape[1] > 1]
    return {name: confidence(member_logits, scaling, name) for name in names}


def _helpful_scaling(
    logits: Tensor, labels: Tensor, method: str
) -> tuple[Scaling | None, str, dict[str, Any]]:
    """Fit a scaling; return it with its effect, or None with the reason why it is left off."""
    before = _quality(logits, labels)
    if method == "none":
        return None, "calibration was not requested", {"before": before}
    if method not in METHODS:
        raise unknown_name_error("calibration method", method, METHODS)
    try:
        _check_enough_images(labels, logits.shape[1], method)
        scaling = fit_scaling(logits, labels, method)
        after = _quality(cross_scaled(logits, labels, method), labels)
    except InputError as error:
        return None, str(error), {"before": before}
    effect = {"before": before, "after": after}
    if after["nll"] >= before["nll"]:
        return None, f"{method} scaling does not lower the NLL in cross-validation", effect
    return scaling, "", effect


def _check_enough_images(labels: Tensor, num_classes: int, method: str) -> None:
    needed, per_class = MIN_IMAGES[method], MIN_IMAGES_PER_CLASS[method]
    if len(labels) < needed:
        raise InputError(
            f"{method} scaling needs {needed} calibration images; there are {len(labels)}"
        )
    fewest = int(labels.bincount(minlength=num_classes).min())
    if fewest < per_class:
        raise InputError(
            f"{method} scaling needs {per_class} calibration images per class; a class has {fewest}"
        )


def _quality(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return NLL and ECE with their bootstrap intervals."""
    ends = intervals(logits, labels)
    return {
        "nll": float(nll(logits, labels)),
        "ece": float(expected_calibration_error(logits, labels)),
        "intervals": {name: list(ends[name]) for name in ("nll", "ece") if name in ends},
    }


def evaluate_promises(
    calibration: Calibration,
    test: tuple[Tensor, Tensor],
    *,
    coverage: float = COVERAGE,
    max_risk: float = MAX_RISK,
) -> dict[str, Any]:
    """Compute what prediction sets and abstention reach on test images.

    Args:
        calibration: from `calibrate`.
        test: member logits (N, M, K) and labels (N,).
        coverage: coverage of the sets.
        max_risk: risk of the accepted predictions.

    Returns:
        - "sets": by score, and by score with "-per-class", the metrics of `set_metrics`, or
          "absent" with the reason, such as too few calibration images;
        - "abstention": by score of `CONFIDENCES`, the metrics of `abstention_metrics`, with the
          "threshold" and the upper "bound" of the risk.

    Raises:
        InputError: a value is out of range.
    """
    member_logits, labels = test
    scaled = ensemble_logits(member_logits, calibration.scaling)
    probabilities, correct = scaled.softmax(dim=1), scaled.argmax(dim=1) == labels
    sets: dict[str, Any] = {}
    for score in SCORES:
        for per_class in (False, True):
            name = f"{score}-per-class" if per_class else score
            try:
                found = calibration.sets(coverage, score, per_class=per_class)
            except InputError as error:
                sets[name] = {"absent": str(error)}
            else:
                sets[name] = _set_values(found, probabilities, labels)
    accepted = {}
    for name, values in confidences(member_logits, calibration.scaling).items():
        if name in calibration.confidences:
            abstain = calibration.abstain(max_risk, name)
            accepted[name] = _abstention_values(abstain, values, correct)
    return {
        "sets": {"requested_coverage": coverage, **sets},
        "abstention": {"max_risk": max_risk, **accepted},
    }


def _set_values(sets: ConformalSets, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    return {"thresholds": list(sets.thresholds), **set_metrics(sets(probabilities), labels)}


def _abstention_values(abstain: Abstain, values: Tensor, correct: Tensor) -> dict[str, Any]:
    found = abstention_metrics(abstain(values), correct)
    threshold = abstain.threshold if found["coverage"] or abstain.coverage else None
    return {
        "threshold": threshold,
        "bound": abstain.bound if abstain.coverage else None,
        "guarantee": abstain.guarantee,
        **found,
    }
