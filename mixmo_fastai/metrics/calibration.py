"""Calibration: how well confidence matches accuracy.

Shapes: N samples, K classes, Q bins. Logits are (N, K), labels (N,) integers in [0, K).
Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (ECE, temperature);
Nixon et al., "Measuring Calibration in Deep Learning", CVPR workshops 2019 (TACE); as reported by
Ramé, Sun, Cord, "MixMo", ICCV 2021, section 4.

Probabilities are softmax(logits) in float64, which Apple's MPS does not support: move logits to the
CPU first. To score probabilities, such as a mean over members, pass their logarithms as logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmo_fastai.errors import InputError, check_count

NUM_BINS = 15
"""Number of bins of ECE and TACE, as published."""


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the negative log-likelihood: mean over n of -log p_n[y_n], in nats.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        A scalar in float64.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # probabilities 3/4 and 1/2
        >>> round(nll(logits, torch.tensor([0, 1])).item(), 4)  # (log 4/3 + log 2) / 2
        0.4904
    """
    check_logits(logits, labels)
    return F.cross_entropy(logits.double(), labels.long())


def nll_terms(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each sample: (N,) in float64.

    The arguments are not checked, so that the device is not synchronised.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> nll_terms(logits, torch.tensor([0, 1]))  # log 4/3 and log 2
        tensor([0.2877, 0.6931], dtype=torch.float64)
    """
    return F.cross_entropy(logits.double(), labels.long(), reduction="none")


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the Brier score: mean over n of Σ_k (p_nk - [k = y_n])², in [0, 2].

    The sum over classes is Brier's definition. The published implementation prints the mean over
    classes, which is this value divided by K.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        A scalar in float64.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> round(brier(logits, torch.tensor([0, 1])).item(), 4)  # (2/16 + 2/4) / 2
        0.3125
    """
    check_logits(logits, labels)
    return brier_terms(logits, labels).mean()


def brier_terms(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the Brier score of each sample: (N,) in float64.

    The arguments are not checked, so that the device is not synchronised.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> brier_terms(logits, torch.tensor([0, 1]))
        tensor([0.1250, 0.5000], dtype=torch.float64)
    """
    probabilities = _probabilities(logits)
    is_true_class = torch.zeros_like(probabilities).scatter_(1, labels.long()[:, None], 1.0)
    return (probabilities - is_true_class).square().sum(dim=1)


def top_predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the confidence and correctness of the most likely class.

    If classes tie, the first one is predicted.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        confidence (N,) in float64, the largest probability, and correct (N,) bool.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> top_predictions(logits, torch.tensor([0, 1]))
        (tensor([0.7500, 0.5000], dtype=torch.float64), tensor([ True, False]))
    """
    check_logits(logits, labels)
    return _probabilities(logits).amax(dim=1), logits.argmax(dim=1) == labels


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Samples grouped by confidence: bin q holds confidences in (q/Q, (q + 1)/Q].

    Attributes:
        counts: (Q,) number of samples per bin.
        confidence: (Q,) mean confidence per bin, zero for empty bins.
        accuracy: (Q,) fraction of correct predictions per bin, zero for empty bins.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def expected_calibration_error(self) -> Tensor:
        """The ECE: Σ_q (n_q / N) · |accuracy_q - confidence_q|."""
        gaps = (self.accuracy - self.confidence).abs()
        return (self.counts * gaps).sum() / self.counts.sum()


def reliability_bins(logits: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> ReliabilityBins:
    """Group samples by confidence into bins of equal width, closed on the right.

    A confidence of one falls into the last bin. Zero does not occur; it would fall into the first
    bin.

    Args:
        logits: (N, K).
        labels: (N,).
        num_bins: Q.

    Raises:
        InputError: as for `nll`, or `num_bins` is below one.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # confidences 3/4 and 1/2
        >>> bins = reliability_bins(logits, torch.tensor([0, 1]), num_bins=2)
        >>> bins.counts.tolist(), bins.accuracy.tolist()
        ([1, 1], [0.0, 1.0])
        >>> bins.confidence
        tensor([0.5000, 0.7500], dtype=torch.float64)
    """
    return bins_of_predictions(*top_predictions(logits, labels), num_bins)


def bins_of_predictions(
    confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS
) -> ReliabilityBins:
    """Group predictions by confidence, as `reliability_bins` does.

    Args:
        confidence: (N,), largest probabilities.
        correct: (N,) bool.
        num_bins: Q.

    Raises:
        InputError: `num_bins` is below one.

    Example:
        >>> bins_of_predictions(torch.tensor([0.5, 0.75]), torch.tensor([False, True]), 2).counts
        tensor([1, 1])
    """
    check_num_bins(num_bins)
    confidence = confidence.double()
    in_bin = F.one_hot(bin_indices(confidence, num_bins), num_bins).double()  # (N, Q)
    counts = in_bin.sum(dim=0)
    sizes = counts.clamp(min=1)
    return ReliabilityBins(
        counts=counts.long(),
        confidence=confidence @ in_bin / sizes,
        accuracy=correct.double() @ in_bin / sizes,
    )


def bin_indices(confidence: Tensor, num_bins: int) -> Tensor:
    """Return the equal-width bin, closed on the right, of each confidence: (N,) -> (N,) int64.

    Example:
        >>> bin_indices(torch.tensor([0.2, 0.5, 0.7]).double(), num_bins=2).tolist()
        [0, 0, 1]
    """
    # Division rounds each edge correctly, so that 1/3 equals the edge 5/15.
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=confidence.device) / num_bins
    return torch.bucketize(confidence, edges)


def expected_calibration_error(logits: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Compute the ECE: Σ_q (n_q / N) · |accuracy_q - confidence_q| (Guo et al., equation 3).

    Args:
        logits: (N, K).
        labels: (N,).
        num_bins: Q, of equal width.

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: as for `nll`, or `num_bins` is below one.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> ece = expected_calibration_error(logits, torch.tensor([0, 1]), num_bins=2)
        >>> round(ece.item(), 4)  # |1 - 3/4| / 2 + |0 - 1/2| / 2
        0.375
    """
    return reliability_bins(logits, labels, num_bins).expected_calibration_error


def ece_terms(logits: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Compute correctness - confidence of each sample in the column of its bin, zero elsewhere.

    The sum over bins of the absolute values of the means over samples is the ECE. The arguments are
    not checked, so that the device is not synchronised.

    Args:
        logits: (N, K).
        labels: (N,).
        num_bins: Q, of equal width.

    Returns:
        (N, Q) in float64.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> terms = ece_terms(logits, torch.tensor([0, 1]), num_bins=2)
        >>> terms.sum(dim=0)
        tensor([-0.5000,  0.2500], dtype=torch.float64)
    """
    confidence = _probabilities(logits).amax(dim=1)
    gap = (logits.argmax(dim=1) == labels).double() - confidence
    bins = torch.arange(num_bins, device=logits.device)
    return gap[:, None] * (bin_indices(confidence, num_bins)[:, None] == bins)


def thresholded_adaptive_calibration_error(
    logits: Tensor, labels: Tensor, num_bins: int = NUM_BINS, threshold: float = 1e-3
) -> Tensor:
    """Compute the TACE: Σ_k Σ_q n_kq · |frequency_kq - probability_kq| / (N · K).

    For each class k, the n_k probabilities above the threshold are sorted and split into Q bins of
    floor(n_k / Q) samples; the last bin also holds the remainder. Within a bin, the mean
    probability of k is compared with the fraction of samples of class k.

    As in the published evaluation, the divisor also counts samples below the threshold, and fewer
    than Q probabilities form one bin. Ties keep the order of the samples.

    Args:
        logits: (N, K).
        labels: (N,).
        num_bins: Q, of equal mass.
        threshold: probabilities at or below this value are excluded.

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: as for `nll`, or `num_bins` is below one.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
        >>> labels = torch.tensor([0, 1])
        >>> tace = thresholded_adaptive_calibration_error(logits, labels, num_bins=1)
        >>> round(tace.item(), 4)  # each class: probabilities sum to 5/4 or 3/4, frequencies to 1
        0.125
    """
    check_logits(logits, labels)
    check_num_bins(num_bins)
    num_samples, num_classes = logits.shape
    probabilities, order = _probabilities(logits).T.sort(dim=1, stable=True)  # (K, N)
    classes = torch.arange(num_classes, device=logits.device)[:, None]
    excess = probabilities - (labels[order] == classes).double()
    num_kept = (probabilities > threshold).sum(dim=1, keepdim=True)  # (K, 1)
    # Sorted bins are contiguous, so their sums are differences of one running sum.
    running = F.pad(excess.cumsum(dim=1), (1, 0))  # (K, N + 1)
    bin_sums = running.gather(1, _equal_mass_edges(num_kept, num_samples, num_bins)).diff(dim=1)
    return bin_sums.abs().sum() / (num_samples * num_classes)


def check_logits(
    logits: Tensor, labels: Tensor | None = None, *, axes: str = "(N, K)", name: str = "logits"
) -> None:
    """Check logits and optional labels.

    Args:
        logits: tensor of shape `axes`; no axis may be empty and K must be 2 or more.
        labels: (N,), integers.
        axes: expected shape, one name per axis.
        name: name of the logits in error messages.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> check_logits(torch.zeros(2, 3), torch.tensor([0, 2]))
        >>> check_logits(torch.zeros(2, 3), torch.tensor([0, 2, 1]))
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: labels must have shape (N,) with N = 2, ...; got (3,).
    """
    shape = tuple(logits.shape)
    if len(shape) != axes.count(",") + 1 or min(shape) < 1 or shape[-1] < 2:
        raise InputError(f"{name} must have shape {axes}, no axis empty and K ≥ 2; got {shape}.")
    if labels is not None:
        check_labels(labels, shape[0], shape[-1])
    finite = logits.isfinite()
    if not finite.all():
        index = tuple((~finite).nonzero()[0].tolist())
        value = logits[index].item()
        raise InputError(f"{name} must be finite; got {value} at index {index}.")


def check_labels(labels: Tensor, num_samples: int, num_classes: int, name: str = "logits") -> None:
    """Check that labels are one class index per row of a tensor.

    Args:
        labels: should be (N,) of integers in 0 … K - 1.
        num_samples: N.
        num_classes: K.
        name: name of the tensor, for the message.

    Raises:
        InputError: they are not.

    Example:
        >>> check_labels(torch.tensor([0, 2]), 2, 3)
    """
    if tuple(labels.shape) != (num_samples,):
        raise InputError(
            f"labels must have shape (N,) with N = {num_samples}, one class per row of {name}; "
            f"got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers; got {labels.dtype}.")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        index = int(outside.nonzero()[0])
        raise InputError(
            f"labels must be in 0 … {num_classes - 1} because the {name} have {num_classes} "
            f"classes; got {int(labels[index])} at index {index}."
        )


def check_num_bins(num_bins: int) -> None:
    """Check a number of bins.

    Raises:
        InputError: it is below one.

    Example:
        >>> check_num_bins(0)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: num_bins must be an integer, 1 or more; got 0.
    """
    check_count("num_bins", num_bins)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(dim=1)


def _equal_mass_edges(num_kept: Tensor, num_samples: int, num_bins: int) -> Tensor:
    """Compute the bin edges among sorted samples: (K, 1) counts kept at the end -> (K, Q + 1)."""
    steps = torch.arange(num_bins + 1, device=num_kept.device)
    edges = num_samples - num_kept + num_kept // num_bins * steps
    edges[:, -1] = num_samples
    return edges
