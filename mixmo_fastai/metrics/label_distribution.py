"""Metrics against distributions of human labels: people disagree about ambiguous images.

Shapes: N samples, K classes. Logits are (N, K); distributions q are (N, K), rows sum to one.
Source: Peterson, Battleday, Griffiths, Russakovsky, "Human uncertainty makes classification more
robust", ICCV 2019 (CIFAR-10H, cross-entropy); Brier, "Verification of Forecasts Expressed in Terms
of Probability", 1950.

Probabilities p are softmax(logits) in float64. If all votes agree, the cross-entropy is the NLL of
that label, and the Brier score is that of `calibration.brier`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.bootstrap import percentile_interval, resampled_means
from mixmo_fastai.metrics.calibration import check_logits

MAX_DEVIATION = 1e-5
"""Largest difference from 1 of the sum of a distribution."""


def label_distribution_metrics(logits: Tensor, distributions: Tensor) -> dict[str, Any]:
    """Compute the metrics of predicted probabilities against label distributions.

    Args:
        logits: (N, K).
        distributions: (N, K).

    Returns:
        The means over samples of the functions in `TERMS`: "cross_entropy" and "kl_divergence" in
        nats, "brier", "total_variation", and "vote_agreement", the fraction of votes for the most
        likely class; and "intervals", their 95 % bootstrap intervals, as lower and upper bound by
        name.

    Raises:
        InputError: wrong shapes, logits that are not finite, or rows that are not distributions.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # probabilities 3/4 and 1/2
        >>> metrics = label_distribution_metrics(logits, torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
        >>> round(metrics["cross_entropy"], 4), round(metrics["brier"], 4)
        (0.6277, 0.0)
    """
    check_distributions(distributions, logits)
    logits, distributions = logits.detach().cpu(), distributions.detach().cpu()
    terms = {name: function(logits, distributions) for name, function in TERMS.items()}
    resampled = resampled_means(terms)
    return {
        **{name: values.mean().item() for name, values in terms.items()},
        "intervals": {
            name: list(percentile_interval(values)) for name, values in resampled.items()
        },
    }


def cross_entropy_terms(logits: Tensor, distributions: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample, -Σ_k q_k log p_k, in nats: (N,) in float64.

    It is the expected NLL of one annotator's label, so it has no bias if votes are few. The
    arguments are not checked.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0]]).log()
        >>> cross_entropy_terms(logits, torch.tensor([[0.5, 0.5]]))  # (log 4/3 + log 4) / 2
        tensor([0.8370], dtype=torch.float64)
    """
    return -(distributions.double() * logits.double().log_softmax(dim=1)).sum(dim=1)


def label_entropy_terms(distributions: Tensor) -> Tensor:
    """Compute the entropy of each label distribution, -Σ_k q_k log q_k, in nats: (N,) in float64.

    This is the smallest possible cross-entropy. The argument is not checked.

    Example:
        >>> label_entropy_terms(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))  # log 2 and 0
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    entropies: Tensor = torch.special.entr(distributions.double()).sum(dim=1)
    return entropies


def kl_divergence_terms(logits: Tensor, distributions: Tensor) -> Tensor:
    """Compute the divergence KL(q || p) of each sample, Σ_k q_k log(q_k / p_k): (N,) in float64.

    It is the cross-entropy minus the entropy of the labels, 0 or more. The arguments are not
    checked.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0]]).log()
        >>> kl_divergence_terms(logits, torch.tensor([[0.5, 0.5]]))  # 0.8370 - log 2
        tensor([0.1438], dtype=torch.float64)
    """
    excess = cross_entropy_terms(logits, distributions) - label_entropy_terms(distributions)
    return excess.clamp(min=0)  # rounding


def brier_terms(logits: Tensor, distributions: Tensor) -> Tensor:
    """Compute the Brier score of each sample, Σ_k (p_k - q_k)², in [0, 2]: (N,) in float64.

    The arguments are not checked.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0]]).log()
        >>> brier_terms(logits, torch.tensor([[0.5, 0.5]]))  # 2 · (1/4)²
        tensor([0.1250], dtype=torch.float64)
    """
    return (_probabilities(logits) - distributions.double()).square().sum(dim=1)


def total_variation_terms(logits: Tensor, distributions: Tensor) -> Tensor:
    """Compute the total variation distance of each sample, Σ_k |p_k - q_k| / 2: (N,) in float64.

    It is the smallest fraction of probability that must be moved to turn p into q, in [0, 1]. The
    arguments are not checked.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0]]).log()
        >>> total_variation_terms(logits, torch.tensor([[0.5, 0.5]]))
        tensor([0.2500], dtype=torch.float64)
    """
    return (_probabilities(logits) - distributions.double()).abs().sum(dim=1) / 2


def vote_agreement_terms(logits: Tensor, distributions: Tensor) -> Tensor:
    """Compute the fraction of votes for the most likely class of each sample: (N,) in float64.

    It is the probability that an annotator agrees with the prediction. The arguments are not
    checked.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0]]).log()
        >>> vote_agreement_terms(logits, torch.tensor([[0.25, 0.75]]))
        tensor([0.2500], dtype=torch.float64)
    """
    return distributions.double().gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy_terms,
    "kl_divergence": kl_divergence_terms,
    "brier": brier_terms,
    "total_variation": total_variation_terms,
    "vote_agreement": vote_agreement_terms,
}
"""Metrics by name: functions of logits and distributions (N, K) -> (N,), averaged over samples."""


def label_agreement(distributions: Tensor, labels: Tensor) -> tuple[float, float]:
    """Compute the fraction of votes for the labels of the data set, mean over samples.

    Args:
        distributions: (N, K).
        labels: (N,).

    Returns:
        The fraction, and its expected value if the rows were in random order. Near that value, the
        rows or columns of the distributions are probably in the wrong order.

    Raises:
        InputError: wrong shapes, labels out of range, or rows that are not distributions.

    Example:
        >>> label_agreement(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        (0.75, 0.5)
    """
    check_distributions(distributions, distributions)
    check_logits(distributions, labels, name="distributions")
    distributions = distributions.double()
    agreement = distributions.gather(1, labels.long()[:, None]).mean().item()
    counts = labels.bincount(minlength=distributions.shape[1]).double()
    return agreement, (distributions.mean(dim=0) @ counts).item() / len(labels)


def check_distributions(distributions: Tensor, logits: Tensor) -> None:
    """Check logits (N, K) and label distributions (N, K).

    Raises:
        InputError: wrong shapes, values that are not finite, or rows that are not distributions.

    Example:
        >>> check_distributions(torch.tensor([[0.5, 0.6]]), torch.zeros(1, 2))
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: distributions must be 0 or more and sum to 1; ... index 0.
    """
    check_logits(logits)
    check_logits(distributions, name="distributions")
    if distributions.shape != logits.shape:
        raise InputError(
            f"distributions must have the shape of the logits, {tuple(logits.shape)}; got "
            f"{tuple(distributions.shape)}."
        )
    sums = distributions.double().sum(dim=1)
    is_valid = ((sums - 1).abs() <= MAX_DEVIATION) & (distributions >= 0).all(dim=1)
    if not is_valid.all():
        index = int((~is_valid).nonzero()[0])
        raise InputError(
            "distributions must be 0 or more and sum to 1; "
            f"got {distributions[index].tolist()[:8]} at index {index}."
        )


def _probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(dim=1)
