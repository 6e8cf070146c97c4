"""Confusion matrix and most confused classes.

Shapes: N samples, K classes. Logits are (N, K), labels (N,) integers in [0, K).
"""

from typing import NamedTuple

from torch import Tensor

from mixmo_fastai.metrics.calibration import check_logits


class ConfusedPair(NamedTuple):
    """A true class and the class that is predicted instead of it.

    Attributes:
        true, predicted: class indices.
        samples: number of samples of the true class with this prediction.
        fraction: fraction of the samples of the true class.
    """

    true: int
    predicted: int
    samples: int
    fraction: float


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the samples by true and predicted class.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        (K, K) int64, one row per true class and one column per predicted class.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> import torch
        >>> logits = torch.eye(2)[[0, 1, 1]]
        >>> confusion_matrix(logits, torch.tensor([0, 0, 1])).tolist()
        [[1, 1], [0, 1]]
    """
    check_logits(logits, labels)
    num_classes = logits.shape[1]
    cells = labels.long() * num_classes + logits.argmax(dim=1)
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def most_confused(matrix: Tensor, count: int) -> list[ConfusedPair]:
    """Return the pairs with the most errors, in descending order; omit pairs without errors.

    Args:
        matrix: (K, K), from `confusion_matrix`.
        count: maximum number of pairs.

    Example:
        >>> import torch
        >>> most_confused(torch.tensor([[1, 1], [0, 1]]), count=1)
        [ConfusedPair(true=0, predicted=1, samples=1, fraction=0.5)]
    """
    errors = matrix.clone()
    errors.fill_diagonal_(0)
    sorted_errors, cells = errors.flatten().sort(descending=True, stable=True)
    class_sizes = matrix.sum(dim=1).tolist()
    pairs = []
    for samples, cell in zip(sorted_errors[:count].tolist(), cells[:count].tolist(), strict=True):
        if samples == 0:
            break
        true, predicted = divmod(cell, len(matrix))
        pairs.append(ConfusedPair(true, predicted, samples, samples / class_sizes[true]))
    return pairs
