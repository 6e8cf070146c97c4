"""Splits of the training set: validation split, test split and balanced subset.

All splits are independent of the seed of the run, so that runs are compared on the same images and
the networks of a deep ensemble share a validation split.
"""

import torch
from torch import Tensor

from mixmo_fastai.config.recipe import default_valid_split
from mixmo_fastai.data.image_sets import DataSource, ImageSet, Subset
from mixmo_fastai.errors import InputError, check_fraction
from mixmo_fastai.rng import make_generator

SPLIT_SEED = 0
DEFAULT_TEST_SPLIT = 0.2
"""Fraction of each class for the test set of an image folder without one."""


def training_parts(source: DataSource, valid_split: float | None) -> tuple[ImageSet, ImageSet]:
    """Return the training images and the validation images.

    If the data set has validation images, all training images are used for training and
    `valid_split` is ignored.

    Args:
        source: the data set.
        valid_split: see `split_validation`.
    """
    if source.valid is not None:
        return source.train, source.valid
    return split_validation(source.train, valid_split)


def draw_test(labels: Tensor, fraction: float) -> Tensor:
    """Draw a stratified test set, the same images for every run.

    Args:
        labels: (N,) int64.
        fraction: fraction of each class, in [0, 1). At least one image of a class is drawn, but
            never its only one.

    Returns:
        whether each image is in the test set, (N,) bool.
    """
    ranks, sizes = _ranks_within_class(labels, "test split")
    num_test = (sizes * fraction).round().clamp(min=1).minimum(sizes - 1)
    return ranks < num_test


def split_validation(images: ImageSet, fraction: float | None) -> tuple[ImageSet, Subset]:
    """Hold out a fraction of every class for validation.

    Args:
        images: the training set.
        fraction: in [0, 1); 0 holds out nothing, None uses `default_valid_split`. At least one
            image of each class is kept for training.

    Returns:
        the training images and the validation images.

    Raises:
        InputError: `fraction` is out of range, or no class has two images.
    """
    if fraction is None:
        fraction = default_valid_split(len(images))
    check_fraction("valid_split", fraction, below_one=True)
    if fraction == 0:
        return images, Subset(images, torch.empty(0, dtype=torch.int64))
    ranks, sizes = _ranks_within_class(images.labels, "split")
    num_valid = torch.minimum((sizes * fraction).round().clamp(min=1), sizes - 1)
    valid = ranks < num_valid
    if not valid.any():
        raise InputError(
            f"valid_split={fraction:g} selects none of the {len(images):,} training images: "
            "no class has two or more.\n"
            "Add images: a class needs 2 to train and validate, 3 if test images are drawn too.\n"
            "Or train without a validation split: --valid-split 0."
        )
    return Subset(images, (~valid).nonzero()[:, 0]), Subset(images, valid.nonzero()[:, 0])


def split_calibration(valid: ImageSet, fraction: float | None) -> tuple[ImageSet, ImageSet | None]:
    """Set a fraction of every class of the validation images aside for calibration.

    Args:
        valid: the validation images.
        fraction: in [0, 1]; None or 1 for all of them.

    Returns:
        the validation images that remain, and those for calibration; None if all validation images
        serve for both.
    """
    if fraction is None or fraction == 1 or not len(valid):
        return valid, None
    check_fraction("calibration_split", fraction)
    ranks, sizes = _ranks_within_class(valid.labels, "calibration split")
    chosen = ranks < (sizes * fraction).round()
    return Subset(valid, (~chosen).nonzero()[:, 0]), Subset(valid, chosen.nonzero()[:, 0])


def limit_images(images: ImageSet, limit: int) -> ImageSet:
    """Keep at most `limit` images, balanced over classes as far as possible.

    Args:
        images: the training images.
        limit: maximum number of images; 0 keeps all.
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
