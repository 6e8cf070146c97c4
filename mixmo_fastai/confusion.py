"""Which classes are taken for which.

Shapes: N samples, K classes. Logits are (N, K), labels (N,) integers in [0, K).
"""

from typing import NamedTuple

from torch import Tensor

from mixmo_fastai.calibration import check_logits


class Confused(NamedTuple):
    """One class that is taken for another.

    Attributes:
        true, predicted: class indices.
        samples: how many.
        share: of the samples of the true class.
    """

    true: int
    predicted: int
    samples: int
    share: float


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the samples of each class by the class that is predicted.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        (K, K) int64: a row per true class, a column per predicted one.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.
    """
    check_logits(logits, labels)
    num_classes = logits.shape[1]
    cells = labels.long() * num_classes + logits.argmax(dim=1)
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def most_confused(matrix: Tensor, count: int) -> list[Confused]:
    """List the pairs with the most errors, most first; pairs without errors are left out.

    Args:
        matrix: from `confusion_matrix`, (K, K).
        count: pairs at most.
    """
    errors = matrix.clone()
    errors.fill_diagonal_(0)
    counts, cells = errors.flatten().sort(descending=True, stable=True)
    sizes = matrix.sum(dim=1).tolist()
    pairs = []
    for number, cell in zip(counts[:count].tolist(), cells[:count].tolist(), strict=True):
        if number == 0:
            break
        true, predicted = divmod(cell, len(matrix))
        pairs.append(Confused(true, predicted, number, number / sizes[true]))
    return pairs
