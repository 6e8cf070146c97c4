import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.confusion import ConfusedPair, confusion_matrix, most_confused


def test_confusion_matrix_matches_scikit_learn():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=random)
    labels = torch.randint(0, 7, (500,), generator=random)
    expected = sklearn_confusion(labels, logits.argmax(1), labels=range(7))
    np.testing.assert_array_equal(confusion_matrix(logits, labels), expected)


def test_a_class_without_samples_has_a_row_of_zeros():
    matrix = confusion_matrix(torch.eye(4)[[0, 1, 1]], torch.tensor([0, 1, 3]))
    assert matrix[2].tolist() == [0, 0, 0, 0]
    assert matrix[3].tolist() == [0, 1, 0, 0]


def test_confused_pairs_are_sorted_and_exclude_correct_predictions():
    matrix = torch.tensor([[90, 4, 0], [7, 80, 4], [0, 0, 10]])
    assert most_confused(matrix, 2) == [
        ConfusedPair(1, 0, 7, 7 / 91),
        ConfusedPair(0, 1, 4, 4 / 94),
    ]
    assert len(most_confused(matrix, 100)) == 3
    assert most_confused(torch.eye(3).long(), 5) == []


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match="labels must have shape"):
        confusion_matrix(torch.zeros(3, 4), torch.zeros(2).long())
