"""Diversity: how much the errors and predictions of the members of an ensemble differ.

Shapes: N samples, M members, K classes, P = M (M - 1) / 2 pairs of members. Member logits are
(N, M, K), labels (N,) integers in [0, K).
Sources: Aksela, "Comparison of Classifier Selection Methods for Improving Committee Performance",
MCS 2003 (ratio of errors); Ramé, Sun, Cord, "MixMo", ICCV 2021, section 4.
"""

import math

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.calibration import check_logits

AXES = "(N, M, K)"


def member_accuracies(member_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the accuracy of each member.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        accuracies (M,) in float64.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> predictions = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])  # (N, M)
        >>> member_accuracies(torch.eye(3)[predictions], torch.tensor([0, 1, 2, 0])).tolist()
        [0.5, 0.25]
    """
    return _correct(member_logits, labels).double().mean(dim=0)


def ratio_error(member_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the ratio of errors: d_re = (N01 + N10) / N00, averaged over pairs of members.

    N01 + N10 is the number of samples that exactly one member of the pair misclassifies, N00 the
    number that both misclassify. A larger ratio means more diverse errors.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        A scalar in float64, zero or more, without an upper bound.

    Raises:
        InputError: as for `member_accuracies`; there is only one member; two members have no common
            errors, so that their ratio is undefined.

    Example:
        >>> predictions = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        >>> labels = torch.tensor([0, 1, 2, 0])  # one member is wrong once, both are wrong twice
        >>> ratio_error(torch.eye(3)[predictions], labels).item()
        0.5
    """
    first, second = _pairs(~_correct(member_logits, labels), "ratio_error")
    num_by_one = (first ^ second).sum(dim=0)  # (P,)
    num_by_both = (first & second).sum(dim=0)
    if not num_by_both.all():
        raise InputError(
            "ratio_error divides by the number of common errors of two members; got a pair "
            "without common errors."
        )
    return (num_by_one.double() / num_by_both).mean()


def disagreement(member_logits: Tensor) -> Tensor:
    """Compute the fraction of samples on which two members predict different classes.

    Args:
        member_logits: (N, M, K).

    Returns:
        A scalar in [0, 1], in float64: the mean over pairs of members.

    Raises:
        InputError: wrong shape, logits that are not finite, or only one member.

    Example:
        >>> predictions = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        >>> disagreement(torch.eye(3)[predictions]).item()
        0.5
    """
    check_logits(member_logits, axes=AXES, name="member_logits")
    first, second = _pairs(member_logits.argmax(dim=2), "disagreement")
    return (first != second).double().mean()


def disagreement_terms(member_logits: Tensor) -> Tensor:
    """Compute the fraction of pairs of members that differ, for each sample: (N, M, K) -> (N,).

    The result is in float64. The logits are not checked, so that the device is not synchronised.

    Raises:
        InputError: there is only one member.

    Example:
        >>> predictions = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        >>> disagreement_terms(torch.eye(3)[predictions]).tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    first, second = _pairs(member_logits.argmax(dim=2), "disagreement")
    return (first != second).double().mean(dim=1)


def mutual_information(member_logits: Tensor) -> Tensor:
    """Compute the mutual information of the predicted class and the member, in nats.

    It is the mean over samples of H(mean_m p_m) - mean_m H(p_m), where H(p) = -Σ_k p_k log p_k:
    zero if all members predict the same probabilities, and at most log M.

    Args:
        member_logits: (N, M, K).

    Returns:
        A scalar in float64, zero or more.

    Raises:
        InputError: wrong shape, logits that are not finite, or only one member.

    Example:
        >>> member_logits = 100 * torch.eye(2)[None]  # each member is certain of its own class
        >>> round(mutual_information(member_logits).item(), 4)  # log 2
        0.6931
    """
    return mutual_information_per_sample(member_logits).mean()


def mutual_information_per_sample(member_logits: Tensor) -> Tensor:
    """Compute the mutual information of each sample, a measure of uncertainty.

    It is large if the members disagree with high confidence, and zero if their probabilities are
    equal.

    Args:
        member_logits: (N, M, K).

    Returns:
        (N,) in float64, from 0 to log M, in nats.

    Raises:
        InputError: wrong shape, logits that are not finite, or only one member.

    Example:
        >>> differing, equal = 100 * torch.eye(2), torch.zeros(2, 2)
        >>> mutual_information_per_sample(torch.stack([differing, equal]))
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    check_logits(member_logits, axes=AXES, name="member_logits")
    if member_logits.shape[1] < 2:
        raise InputError("mutual_information compares members and needs at least two; got 1.")
    return mixture_information(member_logits.double().softmax(dim=2))


def mixture_information(probabilities: Tensor) -> Tensor:
    """Compute H(mean_m p_m) - mean_m H(p_m) of each sample: (N, M, …, K) -> (N, …), in nats.

    Example:
        >>> mixture_information(torch.eye(2)[None])  # log 2
        tensor([0.6931], dtype=torch.float64)
    """
    of_mean: Tensor = torch.special.entr(probabilities.double().mean(dim=1)).sum(dim=-1)
    of_members: Tensor = torch.special.entr(probabilities.double()).sum(dim=-1).mean(dim=1)
    # If members agree, rounding can make the difference negative.
    return (of_mean - of_members).clamp(min=0)


def mean_probability_logits(member_logits: Tensor) -> Tensor:
    """Compute the logarithm of the members' mean probabilities, for use as logits.

    The published ensemble averages the logits instead.

    Args:
        member_logits: (N, M, K).

    Returns:
        (N, K), whose softmax is the mean of the members' probabilities.

    Example:
        >>> member_logits = 100 * torch.eye(2)[None]
        >>> mean_probability_logits(member_logits).exp()
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    log_probabilities = member_logits.double().log_softmax(dim=2)
    return log_probabilities.logsumexp(dim=1) - math.log(member_logits.shape[1])


def accuracy_by_agreement(member_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Group samples by the number of members that predict the class of the ensemble.

    The ensemble is the mean of the logits.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        counts (M + 1,) int64, the number of samples with 0, 1, … M such members; accuracy (M + 1,)
        in float64, of the ensemble on these samples, zero if there are none.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> predictions = torch.tensor([[0, 0], [1, 0], [1, 1]])
        >>> member_logits = torch.eye(2)[predictions]  # of tied classes, the first is predicted
        >>> counts, accuracy = accuracy_by_agreement(member_logits, torch.tensor([0, 1, 0]))
        >>> counts.tolist(), accuracy.tolist()
        ([0, 1, 2], [0.0, 0.0, 0.5])
    """
    check_logits(member_logits, labels, axes=AXES, name="member_logits")
    num_members = member_logits.shape[1]
    predicted = member_logits.double().mean(dim=1).argmax(dim=1)  # (N,)
    agreeing = (member_logits.argmax(dim=2) == predicted[:, None]).sum(dim=1)
    counts = agreeing.bincount(minlength=num_members + 1)
    num_correct = agreeing[predicted == labels].bincount(minlength=num_members + 1)
    return counts, num_correct.double() / counts.clamp(min=1)


def _correct(member_logits: Tensor, labels: Tensor) -> Tensor:
    """Check which predictions of the members are correct: (N, M) bool."""
    check_logits(member_logits, labels, axes=AXES, name="member_logits")
    return member_logits.argmax(dim=2) == labels[:, None]


def _pairs(values: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return the values of the first and second member of each pair: (N, M) -> two (N, P)."""
    num_members = values.shape[1]
    if num_members < 2:
        raise InputError(f"{metric} compares members and needs at least two; got {num_members}.")
    first, second = torch.triu_indices(num_members, num_members, 1, device=values.device)
    return values[:, first], values[:, second]
