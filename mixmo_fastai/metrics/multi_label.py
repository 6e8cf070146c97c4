"""Metrics of images with several labels.

Shapes: N images, M members, K classes, R resamples. Logits are (N, K), targets (N, K) of 0 and 1.
Sources: average precision as in scikit-learn, the sum over thresholds of precision times the
increase in recall, without interpolation; the classes are averaged without weights (mAP).

Each label of an image is a decision, yes or no. `as_decisions` turns N images into N · K samples of
two classes, so that NLL, Brier, ECE and the metrics of members have their usual definitions: the
NLL is the binary cross-entropy, and the accuracy is that of the decisions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, check_count
from mixmo_fastai.metrics.bootstrap import (
    LEVEL,
    NUM_RESAMPLES,
    Interval,
    draw_counts,
    percentile_interval,
    resampled_means,
)
from mixmo_fastai.metrics.calibration import ece_terms, nll_terms
from mixmo_fastai.metrics.temperature import fit_temperature
from mixmo_fastai.rng import make_generator

DECISIONS = ("no", "yes")
"""The classes of `as_decisions`."""
DEFAULT_THRESHOLD = 0.5
MAX_RESAMPLED = 4_000_000
"""Largest number of decisions for which the interval of the mAP is computed."""
_RESAMPLES_AT_ONCE = 100  # as in `bootstrap`, so that all metrics have the same resamples


@dataclass(frozen=True)
class LabelDecisions:
    """Which labels are predicted: those whose calibrated probability is above a threshold.

    Attributes:
        thresholds: one per class, in [0, 1].
        temperature: by which the ensemble's logits are divided.
        contained: temperature by which the logits of an exported network are divided already.

    Example:
        >>> decide = LabelDecisions((0.5, 0.9))
        >>> decide(torch.tensor([[1.0, 1.0]]))
        tensor([[ True, False]])
    """

    thresholds: tuple[float, ...]
    temperature: float = 1.0
    contained: float = 1.0

    def __post_init__(self) -> None:
        are_valid = all(0 <= value <= 1 for value in self.thresholds)
        if not are_valid or not all(0 < t < math.inf for t in (self.temperature, self.contained)):
            raise ValueError("thresholds must be in [0, 1] and the temperature positive")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], num_classes: int) -> "LabelDecisions":
        """Build from metrics.json or the header of an exported file.

        Raises:
            ValueError: a value is missing, impossible, or of another type.
        """
        try:
            thresholds = tuple(map(float, values.get("thresholds", ())))
            temperature = float(values.get("temperature", 1.0))
            contained = float(values.get("contained", 1.0))
        except (AttributeError, TypeError):
            raise ValueError(
                "thresholds must be a list of numbers, and temperature a number"
            ) from None
        if len(thresholds) != num_classes:
            raise ValueError(f"there must be {num_classes} thresholds; got {len(thresholds)}")
        return cls(thresholds, temperature, contained)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Compute the probabilities of the labels: logits (N, K) -> (N, K) float64."""
        return (logits.double() / self.temperature).sigmoid()

    def __call__(self, logits: Tensor) -> Tensor:
        """Decide which labels are predicted: logits (N, K) -> (N, K) bool."""
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64, device=logits.device)
        return self.probabilities(logits) > thresholds

    def with_temperature(self, temperature: float) -> "LabelDecisions":
        """Return the same decisions for another temperature.

        Example:
            >>> decide = LabelDecisions((0.8,), 2.0)  # a logit of 2 · log 4
            >>> round(decide.with_temperature(1.0).thresholds[0], 4)  # 16 / 17
            0.9412
        """
        bounds = torch.tensor(self.thresholds, dtype=torch.float64).logit() * self.temperature
        thresholds = tuple((bounds / temperature).sigmoid().tolist())
        return LabelDecisions(thresholds, temperature, self.contained)


def as_decisions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each label of each image into a sample of the classes "no" and "yes".

    Args:
        logits: (N, K), or of members (N, M, K).
        targets: (N, K).

    Returns:
        logits (N · K, 2), or (N · K, M, 2), whose softmax is the sigmoid of the original ones; and
        labels (N · K,) int64.

    Example:
        >>> logits, labels = as_decisions(torch.tensor([[1.0, -2.0]]), torch.tensor([[1, 0]]))
        >>> logits
        tensor([[ 0.,  1.],
                [ 0., -2.]])
        >>> labels
        tensor([1, 0])
    """
    has_members = logits.ndim == 3
    logits = logits.transpose(1, 2).flatten(0, 1) if has_members else logits.flatten()
    return torch.stack([torch.zeros_like(logits), logits], dim=-1), targets.flatten().long()


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Compute the average precision of each class: (K,) float64; nan for one without positives.

    Args:
        scores: (N, K), such as logits or probabilities; larger for more likely labels.
        targets: (N, K).

    Raises:
        InputError: wrong shapes, or values that are not finite or not 0 and 1.

    Example:
        >>> scores = torch.tensor([[0.9], [0.8], [0.7]])
        >>> average_precisions(scores, torch.tensor([[1], [0], [1]]))  # (1 + 2/3) / 2
        tensor([0.8333], dtype=torch.float64)
    """
    _check(scores, targets)
    ones = torch.ones(1, len(scores))
    return torch.stack([_resampled_ap(*pair, ones)[0] for pair in zip(scores.T, targets.T)])  # noqa: B905


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Compute the mean of `average_precisions` over the classes that have positives.

    Raises:
        InputError: as for `average_precisions`, or no class has a positive.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        >>> mean_average_precision(scores, torch.tensor([[1, 1], [0, 0]]))  # (1 + 1/2) / 2
        0.75
    """
    values = average_precisions(scores, targets)
    if values.isnan().all():
        raise InputError("no image has a label")
    return float(values.nanmean())


def label_temperature(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Fit the temperature of all decisions, and its relative standard error over images.

    The labels of an image are not independent, so that its decisions count as one: with the score
    u_n of image n, the derivative of its NLL with respect to log T, and the Fisher information I,
    the standard error of log T is √(Σ_n u_n²) / I (the sandwich estimate; White, 1980).

    Args:
        logits: (N, K), of images that are not used in the reported metrics.
        targets: (N, K).

    Returns:
        the temperature, and the error as a fraction of it; infinite if it is undefined.

    Raises:
        InputError: as for `average_precisions`.

    Example:
        >>> logits = torch.tensor([[2.0], [2.0], [2.0], [2.0]])
        >>> targets = torch.tensor([[1], [1], [1], [0]])  # three of four right: 2 / T = log 3
        >>> [round(value, 4) for value in label_temperature(logits, targets)]
        [1.8205, 1.0511]
    """
    _check(logits, targets)
    temperature = fit_temperature(*as_decisions(logits.double(), targets))
    scaled = logits.double() / temperature
    probabilities = scaled.sigmoid()
    scores = (scaled * (probabilities - targets.double())).sum(dim=1)
    information = float((scaled.square() * probabilities * (1 - probabilities)).sum())
    error = float(scores.square().sum()) ** 0.5 / information if information else math.inf
    return temperature, error


def best_thresholds(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Choose the threshold of each class with the highest F1: (K,) float64.

    A label is predicted if its probability is above the threshold. Thresholds are midway between
    two probabilities that occur; of several equal ones the highest is taken. A class without
    positives gets `DEFAULT_THRESHOLD`.

    Args:
        probabilities: (N, K), of images that are not used in the reported metrics.
        targets: (N, K).

    Raises:
        InputError: as for `average_precisions`.

    Example:
        >>> probabilities = torch.tensor([[0.1], [0.3], [0.4], [0.6]])
        >>> best_thresholds(probabilities, torch.tensor([[0], [1], [0], [1]]))
        tensor([0.2000], dtype=torch.float64)
    """
    _check(probabilities, targets)
    found = torch.full((probabilities.shape[1],), DEFAULT_THRESHOLD, dtype=torch.float64)
    for k, (scores, labels) in enumerate(zip(probabilities.double().T, targets.T, strict=True)):
        order, ends, positives, predicted = _cumulated(scores, labels, torch.ones(1, len(scores)))
        if not labels.any():
            continue
        f1 = 2 * positives[0] / (predicted[0] + labels.sum())
        best = int(f1.argmax())
        levels = torch.cat([scores[order][ends], torch.zeros(1, dtype=torch.float64)])
        found[k] = (levels[best] + levels[best + 1]) / 2
    return found


def decision_metrics(predicted: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compute precision, recall and F1 of each class: (K,) float64 by name.

    Args:
        predicted: (N, K) bool.
        targets: (N, K).

    Returns:
        precision, nan for a class that is never predicted; recall, nan for one without positives;
        f1, nan for one with neither.

    Example:
        >>> found = decision_metrics(torch.tensor([[True], [True]]), torch.tensor([[1], [0]]))
        >>> found["precision"].item(), found["recall"].item(), round(found["f1"].item(), 4)
        (0.5, 1.0, 0.6667)
    """
    hits, num_predicted, num_true = _counts(predicted, targets)
    return {
        "precision": hits / num_predicted,
        "recall": hits / num_true,
        "f1": 2 * hits / (num_predicted + num_true),
    }


def f1_scores(predicted: Tensor, targets: Tensor) -> tuple[float, float]:
    """Compute the micro F1, of all decisions together, and the macro F1, the mean over classes.

    Classes without positives do not count in the macro F1.

    Args:
        predicted: (N, K) bool.
        targets: (N, K).

    Raises:
        InputError: no image has a label.

    Example:
        >>> predicted = torch.tensor([[True, True], [True, False]])
        >>> f1_scores(predicted, torch.tensor([[1, 0], [1, 1]]))  # 2·2/6, (1 + 0) / 2
        (0.6666666666666666, 0.5)
    """
    hits, num_predicted, num_true = _counts(predicted, targets)
    if not num_true.any():
        raise InputError("no image has a label")
    micro = 2 * hits.sum() / (num_predicted.sum() + num_true.sum())
    per_class = 2 * hits / (num_predicted + num_true)
    return float(micro), float(per_class[num_true > 0].mean())


def exact_match(predicted: Tensor, targets: Tensor) -> float:
    """Compute the fraction of images whose labels are all predicted, and no others.

    Args:
        predicted: (N, K) bool.
        targets: (N, K).

    Example:
        >>> exact_match(torch.tensor([[True, False]]), torch.tensor([[1, 0]]))
        1.0
    """
    return float((predicted == (targets > 0)).all(dim=1).double().mean())


def image_intervals(
    logits: Tensor,
    targets: Tensor,
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute percentile intervals over images, whose labels stay together.

    Args:
        logits: (N, K).
        targets: (N, K).
        num_resamples: R.
        level: confidence level.
        seed: seed of the resamples.

    Returns:
        lower and upper bound by metric: accuracy of the decisions, nll, ece and, up to
        `MAX_RESAMPLED` decisions, mean_ap; in a resample, classes without positives do not count,
        and mean_ap is left out if a resample has none at all.

    Raises:
        InputError: as for `average_precisions`.

    Example:
        >>> targets = torch.tensor([[1, 0], [0, 1]] * 20)
        >>> found = image_intervals(100.0 * targets - 50, targets)  # all correct and certain
        >>> found["mean_ap"], found["accuracy"]
        ((1.0, 1.0), (1.0, 1.0))
    """
    _check(logits, targets)
    check_count("num_resamples", num_resamples)
    decisions, labels = as_decisions(logits.double(), targets)
    per_image = (len(logits), -1)
    terms = {
        "accuracy": (decisions.argmax(dim=1) == labels).double().view(per_image).mean(dim=1),
        "nll": nll_terms(decisions, labels).view(per_image).mean(dim=1),
        "ece": ece_terms(decisions, labels).view(*logits.shape, -1).mean(dim=1),
    }
    resampled = resampled_means(terms, num_resamples=num_resamples, seed=seed)
    if targets.numel() <= MAX_RESAMPLED and targets.any():
        values = _resampled_map(logits, targets, num_resamples, seed)
        if not values.isnan().any():
            resampled["mean_ap"] = values
    return {name: percentile_interval(values, level) for name, values in resampled.items()}


def _resampled_map(scores: Tensor, targets: Tensor, num_resamples: int, seed: int) -> Tensor:
    """Compute the mAP in each resample, the same as those of the other metrics: (R,)."""
    generator, values = make_generator(seed, "bootstrap"), []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        counts = draw_counts(len(scores), size, generator=generator)
        columns = zip(scores.T, targets.T, strict=True)
        values.append(torch.stack([_resampled_ap(*pair, counts) for pair in columns]).nanmean(0))
    return torch.cat(values)


def _resampled_ap(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Compute the average precision (R,) of one class, with counts (R, N) of the samples."""
    _, _, positives, predicted = _cumulated(scores, labels, counts)
    gains = positives.diff(dim=1, prepend=torch.zeros(len(positives), 1, dtype=torch.float64))
    precision = positives / predicted.clamp(min=1)
    return (gains * precision).sum(dim=1) / positives[:, -1]  # nan without positives


def _cumulated(
    scores: Tensor, labels: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count what is predicted at each threshold, from the highest score to the lowest.

    Args:
        scores: (N,).
        labels: (N,).
        counts: (R, N), how often each sample counts.

    Returns:
        the order of the samples (N,); which of them are the last with their score (N,); and at
        each such threshold the positives and all that are predicted, (R, thresholds) float64.
    """
    order = scores.argsort(descending=True, stable=True)
    ordered = scores[order]
    ends = torch.ones(len(scores), dtype=torch.bool)
    ends[:-1] = ordered[1:] != ordered[:-1]
    weights = counts[:, order].double()
    positives = (weights * (labels[order] > 0)).cumsum(dim=1)[:, ends]
    return order, ends, positives, weights.cumsum(dim=1)[:, ends]


def _counts(predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count correct predictions, predictions and positives of each class: (K,) float64 each."""
    is_true = targets > 0
    parts = (predicted & is_true, predicted, is_true)
    hits, num_predicted, num_true = (part.sum(dim=0).double() for part in parts)
    return hits, num_predicted, num_true


def _check(scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or not scores.numel() or not bool(scores.isfinite().all()):
        raise InputError(f"logits must be (N, K) and finite; got {tuple(scores.shape)}.")
    if targets.shape != scores.shape or not bool(((targets == 0) | (targets == 1)).all()):
        raise InputError(
            f"targets must be {tuple(scores.shape)} of 0 and 1, as the logits; got "
            f"{tuple(targets.shape)} of {str(targets.dtype).removeprefix('torch.')}."
        )
