"""Abstention with guaranteed risk: accept the confident predictions, and ask about the others.

Among the accepted predictions, at most a chosen fraction is wrong. The threshold of the confidence
is chosen on calibration images by the algorithm SGR of Geifman and El-Yaniv, "Selective
Classification for Deep Neural Networks", NeurIPS 2017: a binary search over their confidences,
with a binomial upper bound of the risk at each step. Here, a step that accepts too few images for
any bound goes on to more images, instead of fewer. Each bound fails with a probability of δ / k, so
by the argument of the paper, the risk on new images of the same source exceeds the chosen one with
a probability of at most δ. The argument treats the searched thresholds as given; simulations with
unfavourable risks found fewer failures than δ.

Shapes: N images. `confidence` is (N,), on any scale, larger for more confident predictions;
`correct` is (N,) bool.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from mixmo_fastai.errors import InputError, check_fraction
from mixmo_fastai.metrics.conformal import check_probabilities, proportion_interval

GUARANTEE = 0.95
"""Default probability with which the risk is at most the chosen one."""


@dataclass(frozen=True)
class Abstain:
    """Accepts predictions whose confidence reaches a threshold.

    Attributes:
        threshold: smallest confidence of an accepted prediction; inf if none is accepted.
        max_risk: the chosen risk, the fraction of wrong predictions among the accepted ones.
        guarantee: probability with which the risk on new images is at most `max_risk`.
        bound: upper bound of the risk on new images, at most `max_risk`; 0 if none is accepted.
        coverage: fraction of the calibration images that is accepted.
        num_images: number of calibration images.

    Example:
        >>> random = torch.Generator().manual_seed(0)
        >>> confidence = torch.rand(1000, generator=random)
        >>> correct = torch.rand(1000, generator=random) < confidence
        >>> abstain = Abstain.fit(confidence, correct, max_risk=0.2)
        >>> 0.5 < abstain.threshold < 0.8, abstain.bound <= 0.2
        (True, True)
        >>> abstain(torch.tensor([0.4, 0.9]))
        tensor([False,  True])
    """

    threshold: float
    max_risk: float
    guarantee: float
    bound: float
    coverage: float
    num_images: int

    @classmethod
    def fit(
        cls, confidence: Tensor, correct: Tensor, *, max_risk: float, guarantee: float = GUARANTEE
    ) -> "Abstain":
        """Choose the threshold on calibration images.

        Args:
            confidence: (N,), of images that were neither trained on nor used for a choice.
            correct: (N,) bool.
            max_risk: largest fraction of wrong predictions among the accepted ones.
            guarantee: probability with which the risk on new images is at most that.

        Raises:
            InputError: invalid arguments.
        """
        _check(confidence, correct, max_risk, guarantee)
        ordered, order = confidence.double().sort()
        wrong = ~correct[order]
        num_images = len(ordered)
        # errors[z]: number of errors from the z-th smallest confidence on.
        errors = wrong.long().flip(0).cumsum(dim=0).flip(0)
        first_of_ties = torch.searchsorted(ordered, ordered)  # ties are accepted together
        num_steps = num_bounds(num_images)
        low, high, found = 0, num_images - 1, None
        delta = (1 - guarantee) / num_steps
        for _ in range(num_steps):
            middle = (low + high) // 2
            start = int(first_of_ties[middle])
            bound = risk_bound(int(errors[start]), num_images - start, delta)
            if bound <= max_risk and (found is None or start < found[0]):
                found = start, bound
            # Fewer images cannot do if so few have a larger bound even without errors.
            is_too_few = risk_bound(0, num_images - start, delta) > max_risk
            if bound <= max_risk or is_too_few:
                high = middle
            else:
                low = middle
        if found is None:
            return cls(math.inf, max_risk, guarantee, 0.0, 0.0, num_images)
        start, bound = found
        coverage = (num_images - start) / num_images
        return cls(float(ordered[start]), max_risk, guarantee, bound, coverage, num_images)

    @classmethod
    def from_probabilities(
        cls,
        probabilities: Tensor,
        labels: Tensor,
        *,
        max_risk: float,
        guarantee: float = GUARANTEE,
    ) -> "Abstain":
        """Choose the threshold of the largest probability; see `fit`.

        Args:
            probabilities: (N, K), such as those of `Learner.get_preds`.
            labels: (N,).
            max_risk: as for `fit`.
            guarantee: as for `fit`.

        Raises:
            InputError: invalid arguments.
        """
        values = check_probabilities(probabilities, labels)
        confidence, classes = values.max(dim=1)
        correct = classes == labels.cpu()
        return cls.fit(confidence, correct, max_risk=max_risk, guarantee=guarantee)

    def __call__(self, confidence: Tensor) -> Tensor:
        """Return which predictions are accepted, (N,) bool."""
        return confidence.double() >= self.threshold


def risk_bound(num_errors: int, num_accepted: int, delta: float) -> float:
    """Return the binomial upper bound of a risk: the b with P(Binomial(n, b) ≤ errors) = δ.

    Args:
        num_errors: wrong predictions among the accepted ones.
        num_accepted: n.
        delta: probability with which the bound may fail.

    Example:
        >>> round(risk_bound(0, 100, 0.05), 4)  # (1 - b)^100 = 0.05
        0.0295
    """
    if num_errors >= num_accepted:
        return 1.0
    return float(beta.ppf(1 - delta, num_errors + 1, num_accepted - num_errors))


def num_bounds(num_images: int) -> int:
    """Return the number of steps of the binary search, k = ⌈log₂ N⌉.

    Example:
        >>> num_bounds(1000)
        10
    """
    return max(1, math.ceil(math.log2(num_images)))


def images_needed(max_risk: float, guarantee: float = GUARANTEE) -> int:
    """Return how many calibration images a risk needs at least, if all of them are correct.

    Example:
        >>> images_needed(0.05)
        97
    """
    num_images = 1
    while True:
        # Without errors the bound is 1 - δ^(1/n), for the number of steps of this n.
        delta = (1 - guarantee) / num_bounds(num_images)
        needed = math.ceil(math.log(delta) / math.log1p(-max_risk) - 1e-9)
        if needed <= num_images:
            return num_images
        num_images = needed  # at most the result, whose number of steps is not smaller


def abstention_metrics(accepted: Tensor, correct: Tensor) -> dict[str, Any]:
    """Compute risk and coverage of accepted predictions.

    Args:
        accepted: (N,) bool.
        correct: (N,) bool.

    Returns:
        "coverage", the fraction that is accepted; "risk", the fraction of errors among them, and
        its 95 % "interval" (Clopper and Pearson); both None if none is accepted.

    Example:
        >>> found = abstention_metrics(torch.tensor([1, 1, 0]) > 0, torch.tensor([1, 0, 0]) > 0)
        >>> round(found["coverage"], 4), found["risk"]
        (0.6667, 0.5)
    """
    num_accepted, num_errors = int(accepted.sum()), int((accepted & ~correct).sum())
    values = {"coverage": num_accepted / len(accepted)}
    if not num_accepted:
        return {**values, "risk": None, "interval": None}
    interval = list(proportion_interval(num_errors, num_accepted))
    return {**values, "risk": num_errors / num_accepted, "interval": interval}


def _check(confidence: Tensor, correct: Tensor, max_risk: float, guarantee: float) -> None:
    if confidence.ndim != 1 or not len(confidence) or bool(confidence.isnan().any()):
        raise InputError(
            f"confidence must be numbers of shape (N,), N ≥ 1; got {tuple(confidence.shape)}."
        )
    if correct.shape != confidence.shape or correct.dtype != torch.bool:
        raise InputError(
            f"correct must be bool of shape {tuple(confidence.shape)}; got {correct.dtype} of "
            f"shape {tuple(correct.shape)}."
        )
    for name, value in (("max_risk", max_risk), ("guarantee", guarantee)):
        check_fraction(name, value)
        if value in (0, 1):
            raise InputError(f"{name} must be above 0 and below 1; got {value:g}.")
