"""scikit-learn's digits: 1,797 handwritten digits of 8 × 8 pixels."""

import numpy as np
import torch

from mixmo_fastai.data.image_sets import ArrayImages, DataSource, named_source, numbered

_TEST_EVERY = 5


def read_digits() -> DataSource:
    """Load the digits, with pixel values scaled from [0, 16] to [0, 255].

    There is no official split. Every fifth image of each class is a test image, which gives a
    fixed, stratified split.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    is_test = _index_within_class(digits.target) % _TEST_EVERY == _TEST_EVERY - 1
    classes = tuple(str(name) for name in digits.target_names)
    return named_source(
        "digits",
        classes,
        _part("train", pixels[~is_test], digits.target[~is_test]),
        _part("test", pixels[is_test], digits.target[is_test]),
    )


def _index_within_class(labels: np.ndarray) -> np.ndarray:
    """Number the images of each class from 0, in order."""
    index = np.empty_like(labels)
    for label in np.unique(labels):
        is_class = labels == label
        index[is_class] = np.arange(is_class.sum())
    return index


def _part(name: str, pixels: np.ndarray, labels: np.ndarray) -> ArrayImages:
    return ArrayImages(
        torch.from_numpy(pixels), torch.from_numpy(labels).long(), numbered(name, len(labels))
    )
