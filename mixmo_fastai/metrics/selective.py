"""Selective prediction: how well confidence separates correct from incorrect predictions.

Shapes: N samples, G groups of samples with equal confidence. `confidence` is (N,), on any scale,
larger for more confident predictions; `correct` is (N,) bool. `metrics.calibration.top_predictions`
computes both.
Sources: Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
Classifiers", ICLR 2019 (AURC); Ramé, Sun, Cord, "MixMo", ICCV 2021, section 4 (failure AUROC).

Samples with equal confidence form one group, so the metrics do not depend on the order of samples.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmo_fastai.errors import InputError


def failure_auroc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Compute the area under the ROC curve of confidence as a detector of correct predictions.

    It is the probability that a correct prediction is more confident than an incorrect one; ties
    count half.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        A scalar in [0, 1], in float64; 0.5 is chance.

    Raises:
        InputError: wrong shapes or values, or the predictions are all correct or all incorrect, so
            that the AUROC is undefined.

    Example:
        >>> confidence = torch.tensor([0.9, 0.8, 0.6, 0.5])
        >>> correct = torch.tensor([True, True, False, True])
        >>> round(failure_auroc(confidence, correct).item(), 4)  # 2 of 3 are above the error
        0.6667
    """
    num_correct, num_incorrect = _count_by_confidence(confidence, correct)
    if not num_correct.any() or not num_incorrect.any():
        raise InputError(
            "failure_auroc needs correct and incorrect predictions; "
            f"got {int(num_correct.sum())} correct and {int(num_incorrect.sum())} incorrect."
        )
    more_confident = num_correct.cumsum(dim=0) - num_correct / 2  # (G,), ties count half
    return (num_incorrect * more_confident).sum() / (num_correct.sum() * num_incorrect.sum())


def risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the error rate among the most confident predictions, as a function of coverage.

    Ties are accepted in random order; the risk is the expectation over that order.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        coverage (N,), which is i/N for i = 1 … N, and risk (N,), the error rate among the i most
        confident predictions; both in float64.

    Raises:
        InputError: wrong shapes or values.

    Example:
        >>> confidence = torch.tensor([0.9, 0.8, 0.6, 0.5])
        >>> coverage, risk = risk_coverage(confidence, torch.tensor([True, True, False, True]))
        >>> coverage.tolist()
        [0.25, 0.5, 0.75, 1.0]
        >>> risk
        tensor([0.0000, 0.0000, 0.3333, 0.2500], dtype=torch.float64)
    """
    num_correct, num_incorrect = _count_by_confidence(confidence, correct)
    sizes = num_correct + num_incorrect
    errors = (num_incorrect / sizes).repeat_interleave(sizes.long()).cumsum(dim=0)  # (N,)
    num_accepted = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return num_accepted / len(errors), errors / num_accepted


def risk_at_coverage(confidence: Tensor, correct: Tensor, coverage: float) -> Tensor:
    """Compute the error rate among the most confident predictions at a given coverage.

    Args:
        confidence: (N,).
        correct: (N,).
        coverage: fraction of accepted samples, in (0, 1]; ceil(coverage · N) samples.

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: wrong shapes or values.

    Example:
        >>> confidence = torch.tensor([0.9, 0.8, 0.6, 0.5])
        >>> risk_at_coverage(confidence, torch.tensor([True, True, False, True]), 0.8).item()
        0.25
    """
    if not 0 < coverage <= 1:
        raise InputError(f"coverage must be above 0 and at most 1; got {coverage}.")
    _, risk = risk_coverage(confidence, correct)
    # The product may exceed its exact value by a rounding error.
    num_accepted = math.ceil(coverage * len(risk) - 1e-9)
    return risk[max(num_accepted, 1) - 1]


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Compute the area under the risk-coverage curve: the mean risk over coverages i/N.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        A scalar in [0, 1], in float64; zero if all predictions are correct.

    Raises:
        InputError: wrong shapes or values.

    Example:
        >>> confidence = torch.tensor([0.9, 0.8, 0.6, 0.5])
        >>> correct = torch.tensor([True, True, False, True])
        >>> round(aurc(confidence, correct).item(), 4)  # (0 + 0 + 1/3 + 1/4) / 4
        0.1458
    """
    return risk_coverage(confidence, correct)[1].mean()


def _count_by_confidence(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Count correct and incorrect predictions per confidence value, in descending order.

    Returns:
        num_correct (G,) and num_incorrect (G,), in float64.
    """
    _check_inputs(confidence, correct)
    descending, order = confidence.sort(descending=True)
    group = F.pad((descending[1:] != descending[:-1]).cumsum(dim=0), (1, 0))  # (N,), 0 … G - 1
    total = group.bincount().double()
    num_correct = torch.zeros_like(total).index_add(0, group, correct[order].double())
    return num_correct, total - num_correct


def _check_inputs(confidence: Tensor, correct: Tensor) -> None:
    if confidence.ndim != 1 or len(confidence) < 1:
        raise InputError(f"confidence must have shape (N,), N ≥ 1; got {tuple(confidence.shape)}.")
    if confidence.isnan().any():
        raise InputError("confidence must be a number for every sample; got nan.")
    if correct.shape != confidence.shape or correct.dtype != torch.bool:
        raise InputError(
            f"correct must be bool of shape (N,) = {tuple(confidence.shape)}; "
            f"got {correct.dtype} of shape {tuple(correct.shape)}."
        )
