"""Conformal prediction sets: sets of classes that contain the label with a chosen probability.

On n calibration images, the score of a label is large if the network finds it implausible. The
threshold is the ⌈(n + 1) · coverage⌉-th smallest of their scores; the set of a new image has the
classes whose scores do not exceed it. If the new image and the calibration images are exchangeable,
such as independent draws from the same source, the set contains the label with at least the chosen
probability, whatever the network (Vovk et al., 2005). The probability is over the draw of the
calibration images as well as that of the new image.

Shapes: N images, K classes. Probabilities are (N, K), labels (N,).
Sources: Sadinle, Lei, Wasserman, "Least Ambiguous Set-Valued Classifiers", JASA 2019 (LAC);
Romano, Sesia, Candès, "Classification with Valid and Adaptive Coverage", NeurIPS 2020 (APS);
Angelopoulos et al., "Uncertainty Sets for Image Classifiers using Conformal Prediction", ICLR 2021
(RAPS); Angelopoulos, Bates, "A Gentle Introduction to Conformal Prediction", 2021 (per class).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.metrics.bootstrap import LEVEL
from mixmo_fastai.metrics.calibration import check_labels

DECIMALS = 6
"""Scores are rounded, so that those of equal networks are equal: float32 logits differ by 1e-7."""
RAPS_PENALTY, RAPS_FREE_RANKS = 0.05, 1
"""Penalty of RAPS for each class after the first `RAPS_FREE_RANKS` most likely ones."""


def lac_scores(probabilities: Tensor) -> Tensor:
    """Return 1 - the probability of each class: (N, K) -> (N, K).

    Example:
        >>> lac_scores(torch.tensor([[0.5, 0.25, 0.25]]))
        tensor([[0.5000, 0.7500, 0.7500]])
    """
    return (1 - probabilities).round(decimals=DECIMALS)


def aps_scores(probabilities: Tensor) -> Tensor:
    """Return the summed probability of all classes likelier than each: (N, K) -> (N, K).

    The published scores add a random fraction of the class's own probability. Without it, the sets
    are the same each time, contain the most likely class, and the coverage holds as well. With all
    of it, images whose most likely class exceeds the threshold would have empty sets.

    Example:
        >>> aps_scores(torch.tensor([[0.5, 0.125, 0.375]]))
        tensor([[0.0000, 0.8750, 0.5000]])
    """
    ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
    sums = (ordered.cumsum(dim=1) - ordered).round(decimals=DECIMALS)
    return torch.empty_like(probabilities).scatter_(1, order, sums)


def raps_scores(probabilities: Tensor) -> Tensor:
    """Return APS scores with a penalty for unlikely classes: (N, K) -> (N, K).

    The class of rank r, 1 for the most likely one, gets `RAPS_PENALTY` · max(0, r -
    `RAPS_FREE_RANKS`). The penalty makes large sets smaller.

    Example:
        >>> raps_scores(torch.tensor([[0.5, 0.125, 0.375]]))  # penalties 0, 0.1 and 0.05
        tensor([[0.0000, 0.9750, 0.5500]])
    """
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1) + 1
    return aps_scores(probabilities) + RAPS_PENALTY * (ranks - RAPS_FREE_RANKS).clamp(min=0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "lac": lac_scores,
    "aps": aps_scores,
    "raps": raps_scores,
}
"""Scores by name: functions of probabilities (N, K) -> (N, K), larger for less plausible classes.

"lac" gives small sets; "aps" and "raps" adapt better to difficult images, and need several classes.
"""


def default_score(num_classes: int) -> str:
    """Return the default score: "raps", or "lac" for two classes.

    With two classes, "aps" and "raps" never have an empty set and differ from "lac" in nothing
    else.

    Example:
        >>> default_score(2), default_score(10)
        ('lac', 'raps')
    """
    return "lac" if num_classes == 2 else "raps"


@dataclass(frozen=True)
class ConformalSets:
    """Prediction sets with a chosen coverage, for the probabilities of any classifier.

    Attributes:
        score: a name in `SCORES`.
        coverage: probability with which a set contains the label.
        thresholds: largest score of a class in a set: one for all classes, or one per class.
        num_images: number of calibration images.

    Example:
        >>> random = torch.Generator().manual_seed(0)
        >>> logits = 2 * torch.randn(2000, 4, generator=random)
        >>> probabilities = logits.softmax(dim=1)
        >>> labels = torch.multinomial(probabilities, 1, generator=random)[:, 0]
        >>> sets = ConformalSets.fit(probabilities[:1000], labels[:1000], coverage=0.9)
        >>> contains = sets(probabilities[1000:]).gather(1, labels[1000:, None])
        >>> round(contains.double().mean().item(), 1)
        0.9
    """

    score: str
    coverage: float
    thresholds: tuple[float, ...]
    num_images: int

    @classmethod
    def fit(
        cls,
        probabilities: Tensor,
        labels: Tensor,
        *,
        coverage: float,
        score: str | None = None,
        per_class: bool = False,
    ) -> "ConformalSets":
        """Choose the thresholds on calibration images.

        Args:
            probabilities: (N, K), of images that were neither trained on nor used for a choice.
            labels: (N,).
            coverage: probability with which a set contains the label, above 0 and below 1.
            score: a name in `SCORES`; None for `default_score`.
            per_class: whether the coverage holds for the images of each class separately; a class
                then needs as many calibration images as otherwise all together.

        Raises:
            InputError: invalid arguments, or too few images.
        """
        probabilities, labels = check_probabilities(probabilities, labels), torch.as_tensor(labels)
        score = check_score(score, probabilities.shape[1])
        of_labels = SCORES[score](probabilities).gather(1, labels.long()[:, None])[:, 0]
        return sets_from_scores(
            of_labels,
            labels,
            num_classes=probabilities.shape[1],
            coverage=coverage,
            score=score,
            per_class=per_class,
        )

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Return which classes each set contains, (N, K) bool.

        An empty set, which only "lac" can have, gets the most likely class; this only raises the
        coverage. If the most likely classes are correct more often than `coverage`, the sets of
        "aps" and "raps" are these classes.

        Args:
            probabilities: (N, K).
        """
        probabilities = check_probabilities(probabilities)
        limits = torch.tensor(self.thresholds, dtype=torch.float64)
        sets = SCORES[self.score](probabilities) <= limits
        top = torch.nn.functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1])
        return torch.where(sets.any(dim=1, keepdim=True), sets, top.bool())


def check_score(score: str | None, num_classes: int) -> str:
    """Return the name of a score; `default_score` for None.

    Raises:
        InputError: the name is unknown.

    Example:
        >>> check_score(None, 10)
        'raps'
    """
    if score is None:
        return default_score(num_classes)
    if score not in SCORES:
        raise unknown_name_error("score of prediction sets", score, SCORES)
    return score


def sets_from_scores(
    of_labels: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    coverage: float,
    score: str,
    per_class: bool = False,
) -> ConformalSets:
    """Choose thresholds from the scores of the labels alone; see `ConformalSets.fit`.

    Args:
        of_labels: (n,), the score of the label of each calibration image.
        labels: (n,).
        num_classes: K.
        coverage: as for `ConformalSets.fit`.
        score: name of the score.
        per_class: as for `ConformalSets.fit`.

    Raises:
        InputError: too few images, or a coverage out of range.

    Example:
        >>> scores, labels = torch.arange(20.0), torch.arange(20) % 2
        >>> options = {"num_classes": 2, "coverage": 0.5, "score": "lac"}
        >>> sets_from_scores(scores, labels, **options).thresholds  # the 11th of 20
        (10.0,)
        >>> sets_from_scores(scores, labels, **options, per_class=True).thresholds  # the 6th of 10
        (10.0, 11.0)
    """
    thresholds: tuple[float, ...]
    if per_class:
        _check_images_per_class(labels.long(), num_classes, coverage)
        thresholds = tuple(
            conformal_quantile(of_labels[labels == label], coverage) for label in range(num_classes)
        )
    else:
        thresholds = (conformal_quantile(of_labels, coverage),)
    return ConformalSets(score, coverage, thresholds, len(labels))


def conformal_quantile(scores: Tensor, coverage: float) -> float:
    """Return the ⌈(n + 1) · coverage⌉-th smallest of n scores.

    Args:
        scores: (n,).
        coverage: above 0 and below 1.

    Raises:
        InputError: the coverage is out of range, or there are fewer scores than `num_needed`.

    Example:
        >>> conformal_quantile(torch.arange(1.0, 20.0), 0.9)  # the 18th of 19
        18.0
    """
    needed = num_needed(coverage)
    if len(scores) < needed:
        raise InputError(
            f"A coverage of {coverage:g} needs {needed} calibration images; there are "
            f"{len(scores)}."
        )
    # The product may exceed its exact value by a rounding error.
    place = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(scores.double().kthvalue(place).values)


def num_needed(coverage: float) -> int:
    """Return how many calibration images a coverage needs: n ≥ (n + 1) · coverage.

    Raises:
        InputError: the coverage is not above 0 and below 1.

    Example:
        >>> num_needed(0.9), num_needed(0.99)
        (9, 99)
    """
    if not 0 < coverage < 1:
        raise InputError(f"coverage must be above 0 and below 1; got {coverage:g}.")
    return max(1, math.ceil(coverage / (1 - coverage) - 1e-9))


def set_metrics(sets: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute the coverage and the size of prediction sets.

    Args:
        sets: (N, K) bool.
        labels: (N,).

    Returns:
        "coverage", its 95 % "interval" (Clopper and Pearson), "mean_size", "by_size" (entries with
        size, images and coverage) and "class_coverage" (K values; None for classes without images).

    Raises:
        InputError: wrong shapes.

    Example:
        >>> sets = torch.tensor([[True, False], [True, True], [True, False]])
        >>> found = set_metrics(sets, torch.tensor([0, 1, 1]))
        >>> found["mean_size"], found["class_coverage"]
        (1.3333333333333333, [1.0, 0.5])
        >>> found["by_size"][1]
        {'size': 2, 'images': 1, 'coverage': 1.0}
    """
    if sets.ndim != 2 or sets.dtype != torch.bool or len(sets) != len(labels) or not len(sets):
        raise InputError(
            f"sets must be bool of shape (N, K), N = {len(labels)} ≥ 1; got {sets.dtype} of shape "
            f"{tuple(sets.shape)}."
        )
    contains = sets.gather(1, labels.long()[:, None])[:, 0]
    sizes = sets.sum(dim=1)
    num_covered = int(contains.sum())
    return {
        "coverage": num_covered / len(sets),
        "interval": list(proportion_interval(num_covered, len(sets))),
        "mean_size": float(sizes.double().mean()),
        "by_size": [
            {"size": size, "images": int(chosen.sum()), "coverage": _mean(contains[chosen])}
            for size in sorted(set(sizes.tolist()))
            for chosen in [sizes == size]
        ],
        "class_coverage": [
            _mean(contains[labels == label]) if bool((labels == label).any()) else None
            for label in range(sets.shape[1])
        ],
    }


def proportion_interval(count: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """Compute the interval of Clopper and Pearson (1934) of a proportion.

    Example:
        >>> tuple(round(end, 4) for end in proportion_interval(9, 10))
        (0.555, 0.9975)
    """
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(1 - tail, count + 1, total - count))
    return low, high


def check_probabilities(probabilities: Tensor, labels: Tensor | None = None) -> Tensor:
    """Check probabilities (N, K) and labels (N,); return the probabilities in float64.

    Raises:
        InputError: wrong shapes, values that are no probabilities, or labels out of range.

    Example:
        >>> check_probabilities(torch.tensor([[0.5, 0.5]])).dtype
        torch.float64
    """
    labels = None if labels is None else torch.as_tensor(labels)
    values = torch.as_tensor(probabilities).as_subclass(Tensor).detach().cpu().double()
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        raise InputError(
            f"probabilities must have shape (N, K), N ≥ 1 and K ≥ 2; got {tuple(values.shape)}."
        )
    sums = values.sum(dim=1)
    # Half precision rounds each probability by up to 0.05 %.
    if not bool((values >= 0).all() and ((sums - 1).abs() < 1e-2).all()):
        raise InputError(
            "probabilities must not be negative, and those of an image must add up to 1.\n"
            "Apply softmax to logits first."
        )
    if labels is not None:
        check_labels(labels, len(values), values.shape[1], "probabilities")
    return values


def _check_images_per_class(labels: Tensor, num_classes: int, coverage: float) -> None:
    needed, counts = num_needed(coverage), labels.bincount(minlength=num_classes)
    short: Sequence[int] = (counts < needed).nonzero()[:, 0].tolist()
    if short:
        raise InputError(
            f"A coverage of {coverage:g} for each class needs {needed} calibration images per "
            f"class; {len(short)} of {num_classes} classes have fewer; the smallest has "
            f"{int(counts.min())}."
        )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
