"""The 1,797 handwritten digits of 8 × 8 pixels that come with scikit-learn."""

import numpy as np
import torch

from mixmo_fastai.data.image_sets import ArrayImages, DataSource, named_source, numbered

_TEST_EVERY = 5


def read_digits() -> DataSource:
    """Read the digits, their levels 0 to 16 stretched to 0 to 255.

    There is no official split. Within each class every fifth image is a test image, so that the
    split is fixed and both parts hold the classes in the same shares.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    is_test = _occurrence(digits.target) % _TEST_EVERY == _TEST_EVERY - 1
    classes = tuple(str(name) for name in digits.target_names)
    return named_source(
        "digits",
        classes,
        _part("train", pixels[~is_test], digits.target[~is_test]),
        _part("test", pixels[is_test], digits.target[is_test]),
    )


def _occurrence(labels: np.ndarray) -> np.ndarray:
    """Number the images of each class from 0, in their order."""
    number = np.empty_like(labels)
    for label in np.unique(labels):
        of_class = labels == label
        number[of_class] = np.arange(of_class.sum())
    return number


def _part(name: str, pixels: np.ndarray, labels: np.ndarray) -> ArrayImages:
    return ArrayImages(
        torch.from_numpy(pixels), torch.from_numpy(labels).long(), numbered(name, len(labels))
    )
