"""Subsets of the training set: validation split, test split, and a balanced subset for trials.

They do not depend on the seed of a run, so that runs are compared on the same images and the
networks of a deep ensemble share a validation split.
"""

import torch
from torch import Tensor

from mixmo_fastai.data.image_sets import DataSource, ImageSet, Subset
from mixmo_fastai.errors import InputError
from mixmo_fastai.randomness import make_generator
from mixmo_fastai.recipe import default_valid_split

SPLIT_SEED = 0
DEFAULT_TEST_SPLIT = 0.2
"""Fraction of each class used for testing if an image folder has no split."""


def training_parts(source: DataSource, valid_split: float | None) -> tuple[ImageSet, ImageSet]:
    """Return the training and the validation images.

    If the data set has its own validation images, they are used, and `valid_split` is ignored.

    Args:
        source: the data set.
        valid_split: see `split_validation`.
    """
    if source.valid is not None:
        return source.train, source.valid
    return split_validation(source.train, valid_split)


def draw_test(labels: Tensor, fraction: float) -> Tensor:
    """Choose the same fraction of every class for a test set, the same images for every run.

    Args:
        labels: (N,) int64.
        fraction: in [0, 1). At least one image per class is chosen, but never its only one.

    Returns:
        whether each image is in the test set, (N,) bool.
    """
    ranks, sizes = _ranks_within_class(labels, "test split")
    num_test = (sizes * fraction).round().clamp(min=1).minimum(sizes - 1)
    return ranks < num_test


def split_validation(images: ImageSet, share: float | None) -> tuple[ImageSet, Subset]:
    """Set aside a fraction of every class for validation.

    Args:
        images: the training set.
        share: fraction in [0, 1); 0 for no validation split, None for `default_valid_split`. At
            least one image of each class remains for training.

    Returns:
        the training and the validation images.

    Raises:
        InputError: the fraction is out of range, or no class has two images.
    """
    if share is None:
        share = default_valid_split(len(images))
    if not 0 <= share < 1:
        raise InputError(f"valid_split must be at least 0 and below 1; got {share}.")
    if share == 0:
        return images, Subset(images, torch.empty(0, dtype=torch.int64))
    ranks, sizes = _ranks_within_class(images.labels, "split")
    num_valid = torch.minimum((sizes * share).round().clamp(min=1), sizes - 1)
    valid = ranks < num_valid
    if not valid.any():
        raise InputError(
            f"No class has 2 training images or more, so that valid_split={share:g} takes none of "
            f"the {len(images):,}.\n"
            "Add images: a class needs 2 to train and validate, 3 if its test images are drawn.\n"
            "Or train without a validation split: --valid-split 0."
        )
    return Subset(images, (~valid).nonzero()[:, 0]), Subset(images, valid.nonzero()[:, 0])


def limit_images(images: ImageSet, limit: int) -> ImageSet:
    """Keep at most `limit` images, with equal numbers per class as far as possible.

    Args:
        images: the training images.
        limit: maximum number; 0 for all.
    """
    if limit == 0 or limit >= len(images):
        return images
    ranks, _ = _ranks_within_class(images.labels, "limit")
    chosen = ranks.argsort(stable=True)[:limit]  # first one image of each class, then the next
    return Subset(images, chosen.sort().values)


def _ranks_within_class(labels: Tensor, stream: str) -> tuple[Tensor, Tensor]:
    """Return the random rank of each image within its class, and the size of its class."""
    generator = make_generator(SPLIT_SEED, stream)  # type: ignore[arg-type]
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return ranks, counts[labels]
