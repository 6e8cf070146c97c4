"""Accuracy: how often the true class is the most likely one, or among the five most likely.

Balanced accuracy: Brodersen et al., "The Balanced Accuracy and Its Posterior Distribution", ICPR
2010, as the mean over any number of classes.

Shapes: N samples, K classes. Logits are (N, K), labels (N,) integers in [0, K).
"""

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.calibration import check_logits


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the fraction of samples whose most likely class is the true class.

    If classes tie, the first one is predicted.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> accuracy(logits, labels).item()
        0.5
    """
    check_logits(logits, labels)
    return accuracy_terms(logits, labels).mean()


def accuracy_terms(logits: Tensor, labels: Tensor) -> Tensor:
    """Check which predictions are correct: (N,) of 0 and 1 in float64.

    The arguments are not checked, so that the device is not synchronised.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> accuracy_terms(logits, labels).tolist()
        [1.0, 0.0]
    """
    return (logits.argmax(dim=1) == labels).double()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the accuracy on the samples of each class, and its mean over the classes present.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: as for `accuracy`.

    Example:
        >>> always_first = torch.tensor([[1.0, 0.0]]).expand(4, 2)
        >>> balanced_accuracy(always_first, torch.tensor([0, 0, 0, 1])).item()
        0.5
    """
    check_logits(logits, labels)
    sizes = labels.bincount()  # (K,), or fewer if the last classes are absent
    num_correct = labels[logits.argmax(dim=1) == labels].bincount(minlength=len(sizes))
    is_present = sizes > 0
    return (num_correct[is_present].double() / sizes[is_present]).mean()


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the fraction of samples whose true class is among the five most likely.

    Of tied classes, those with a smaller index rank first.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        A scalar in [0, 1], in float64.

    Raises:
        InputError: as for `accuracy`, or there are at most five classes.

    Example:
        >>> logits = torch.arange(6.0).expand(2, 6)  # class 0 ranks sixth, class 1 fifth
        >>> top5(logits, torch.tensor([0, 1])).item()
        0.5
    """
    check_logits(logits, labels)
    num_classes = logits.shape[1]
    if num_classes <= 5:
        raise InputError(f"top5 is always 1 with five classes or fewer; got {num_classes}.")
    labels = labels.long()[:, None]  # (N, 1)
    true_logits = logits.gather(1, labels)
    is_earlier = torch.arange(num_classes, device=logits.device) < labels
    is_ahead = (logits > true_logits) | ((logits == true_logits) & is_earlier)  # (N, K)
    return (is_ahead.sum(dim=1) < 5).double().mean()
