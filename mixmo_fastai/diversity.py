"""Diversity: how far the members of an ensemble differ, in errors and in predictions.

Shapes: N samples, M members, K classes, P = M (M - 1) / 2 pairs of members. Member logits are
(N, M, K), labels (N,) integers in [0, K).
Sources: Aksela, "Comparison of Classifier Selection Methods for Improving Committee Performance",
MCS 2003 (ratio of errors); Ramé, Sun, Cord, "MixMo", ICCV 2021, section 4.
"""

import math

import torch
from torch import Tensor

from mixmo_fastai.calibration import check_logits
from mixmo_fastai.errors import InputError

AXES = "(N, M, K)"


def member_accuracies(member_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of samples that each member predicts right.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        accuracies (M,) in float64.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.
    """
    return _correct(member_logits, labels).double().mean(dim=0)


def ratio_error(member_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the ratio of errors: d_re = (N01 + N10) / N00, averaged over pairs of members.

    N01 + N10 counts the samples that one member of the pair gets wrong, N00 those that both do.
    The more errors differ, the larger it is.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        A scalar in float64, zero or more, without upper limit.

    Raises:
        InputError: as for `member_accuracies`, there is one member only, or a pair has no error
            in common, which leaves its ratio undefined.
    """
    first, second = _pairs(~_correct(member_logits, labels), "ratio_error")
    by_one = (first ^ second).sum(dim=0)  # (P,)
    by_both = (first & second).sum(dim=0)
    if not by_both.all():
        raise InputError(
            "ratio_error divides by the errors that two members share; got a pair that shares none."
        )
    return (by_one.double() / by_both).mean()


def disagreement(member_logits: Tensor) -> Tensor:
    """Compute the share of samples on which two members predict different classes.

    Args:
        member_logits: (N, M, K).

    Returns:
        A scalar in [0, 1], in float64, the mean over pairs of members.

    Raises:
        InputError: wrong shape, logits that are not finite, or there is one member only.
    """
    check_logits(member_logits, axes=AXES, name="member_logits")
    first, second = _pairs(member_logits.argmax(dim=2), "disagreement")
    return (first != second).double().mean()


def mutual_information(member_logits: Tensor) -> Tensor:
    """Compute how much is learnt about the class by being told the member, in nats.

    The mean over samples of H(mean_m p_m) - mean_m H(p_m), where H(p) = -Σ_k p_k log p_k. It is
    zero where all members give the same probabilities, and log M at most.

    Args:
        member_logits: (N, M, K).

    Returns:
        A scalar in float64, zero or more.

    Raises:
        InputError: wrong shape, logits that are not finite, or there is one member only.
    """
    return information_per_sample(member_logits).mean()


def information_per_sample(member_logits: Tensor) -> Tensor:
    """Compute the members' mutual information of each sample, an uncertainty of its own kind.

    It is large where members contradict each other surely, and zero where all are unsure alike.

    Args:
        member_logits: (N, M, K).

    Returns:
        (N,) in float64, from 0 to log M, in nats.

    Raises:
        InputError: wrong shape, logits that are not finite, or there is one member only.
    """
    check_logits(member_logits, axes=AXES, name="member_logits")
    if member_logits.shape[1] < 2:
        raise InputError("mutual_information compares members and needs two or more; got 1.")
    return mixture_information(member_logits.double().softmax(dim=2))


def mixture_information(probabilities: Tensor) -> Tensor:
    """Compute H(mean_m p_m) - mean_m H(p_m) of each sample: (N, M, …, K) -> (N, …), in nats."""
    of_mean: Tensor = torch.special.entr(probabilities.double().mean(dim=1)).sum(dim=-1)
    of_members: Tensor = torch.special.entr(probabilities.double()).sum(dim=-1).mean(dim=1)
    # Members that agree leave a difference of rounding errors, which may be negative.
    return (of_mean - of_members).clamp(min=0)


def mean_probability_logits(member_logits: Tensor) -> Tensor:
    """Give the logarithm of the mean over members of their probabilities, to be used as logits.

    The other common ensemble is the mean of the logits, as published.

    Args:
        member_logits: (N, M, K).

    Returns:
        (N, K), whose softmax is the mean of the members' probabilities.
    """
    log_probabilities = member_logits.double().log_softmax(dim=2)
    return log_probabilities.logsumexp(dim=1) - math.log(member_logits.shape[1])


def accuracy_by_agreement(member_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Group samples by how many members vote for the ensemble's class, the mean of the logits.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        counts (M + 1,) of samples with 0, 1, … M such members, int64, and the ensemble's accuracy
        on them (M + 1,) in float64, zero where there are none.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.
    """
    check_logits(member_logits, labels, axes="(N, M, K)", name="member_logits")
    num_members = member_logits.shape[1]
    predicted = member_logits.double().mean(dim=1).argmax(dim=1)  # (N,)
    agreeing = (member_logits.argmax(dim=2) == predicted[:, None]).sum(dim=1)
    counts = agreeing.bincount(minlength=num_members + 1)
    right = agreeing[predicted == labels].bincount(minlength=num_members + 1)
    return counts, right.double() / counts.clamp(min=1)


def _correct(member_logits: Tensor, labels: Tensor) -> Tensor:
    """Mark what each member predicts right: (N, M) bool."""
    check_logits(member_logits, labels, axes=AXES, name="member_logits")
    return member_logits.argmax(dim=2) == labels[:, None]


def _pairs(values: Tensor, figure: str) -> tuple[Tensor, Tensor]:
    """Set each pair of members side by side: (N, M) -> twice (N, P)."""
    num_members = values.shape[1]
    if num_members < 2:
        raise InputError(f"{figure} compares members and needs two or more; got {num_members}.")
    first, second = torch.triu_indices(num_members, num_members, 1, device=values.device)
    return values[:, first], values[:, second]
