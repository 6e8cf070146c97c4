"""Selective prediction: is confidence a good guide to which predictions to trust?

Shapes: N samples, G groups of samples that tie in confidence. `confidence` is (N,), larger for
surer, on any scale; `correct` is (N,) bool. `calibration.top_predictions` gives both.
Sources: Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
Classifiers", ICLR 2019 (AURC); Ramé, Sun, Cord, "MixMo", ICCV 2021, section 4 (failure AUROC).

Confidences that tie are one group, so no figure depends on the order of the samples.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmo_fastai.errors import InputError


def failure_auroc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Compute the area under the ROC curve of confidence as a detector of right predictions.

    It is the probability that a right prediction is surer than a wrong one; a tie counts half.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        A scalar in [0, 1], in float64; 0.5 is chance.

    Raises:
        InputError: wrong shapes or values, or the predictions are all right or all wrong, which
            leaves nothing to tell apart.
    """
    right, wrong = _count_by_confidence(confidence, correct)
    if not right.any() or not wrong.any():
        raise InputError(
            "failure_auroc needs right and wrong predictions; "
            f"got {int(right.sum())} right and {int(wrong.sum())} wrong."
        )
    surer_or_tied = right.cumsum(dim=0) - right / 2  # (G,)
    return (wrong * surer_or_tied).sum() / (right.sum() * wrong.sum())


def risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Trace the share of errors among the surest predictions, as more and more are accepted.

    Among predictions that tie, chance decides which is accepted first; the risk is its expectation.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        coverage (N,), which is i/N for i = 1 … N, and risk (N,), the errors among the i surest
        divided by i; both in float64.

    Raises:
        InputError: wrong shapes or values.
    """
    right, wrong = _count_by_confidence(confidence, correct)
    sizes = right + wrong
    errors = (wrong / sizes).repeat_interleave(sizes.long()).cumsum(dim=0)  # (N,)
    accepted = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return accepted / len(errors), errors / accepted


def risk_at_coverage(confidence: Tensor, correct: Tensor, coverage: float) -> Tensor:
    """Compute the share of errors among the surest predictions that make up a share of all.

    Args:
        confidence: (N,).
        correct: (N,).
        coverage: share of the samples that is accepted, in (0, 1]; ceil(coverage · N) of them.

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: wrong shapes or values.
    """
    if not 0 < coverage <= 1:
        raise InputError(f"coverage must be above 0 and at most 1; got {coverage}.")
    _, risk = risk_coverage(confidence, correct)
    accepted = math.ceil(coverage * len(risk) - 1e-9)  # 0.8 · 10 is a little more than 8
    return risk[max(accepted, 1) - 1]


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Compute the area under the risk-coverage curve: the mean risk over coverages i/N.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        A scalar in [0, 1], in float64; zero where every prediction is right.

    Raises:
        InputError: wrong shapes or values.
    """
    return risk_coverage(confidence, correct)[1].mean()


def _count_by_confidence(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Count right and wrong predictions per confidence, surest first: twice (G,), in float64."""
    _check(confidence, correct)
    surest, order = confidence.sort(descending=True)
    group = F.pad((surest[1:] != surest[:-1]).cumsum(dim=0), (1, 0))  # (N,), 0 … G - 1
    total = group.bincount().double()
    right = torch.zeros_like(total).index_add(0, group, correct[order].double())
    return right, total - right


def _check(confidence: Tensor, correct: Tensor) -> None:
    if confidence.ndim != 1 or len(confidence) < 1:
        raise InputError(f"confidence must have shape (N,), N ≥ 1; got {tuple(confidence.shape)}.")
    if confidence.isnan().any():
        raise InputError("confidence must be a number for each sample; got nan.")
    if correct.shape != confidence.shape or correct.dtype != torch.bool:
        raise InputError(
            f"correct must be bool of shape (N,) = {tuple(confidence.shape)}; "
            f"got {correct.dtype} of shape {tuple(correct.shape)}."
        )
