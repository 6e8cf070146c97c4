"""Splits of the training set: validation split, test split and balanced subset.

All splits are independent of the seed of the run, so that runs are compared on the same images and
the networks of a deep ensemble share a validation split.
"""

import torch
from torch import Tensor

from mixmo_fastai.config.recipe import default_valid_split
from mixmo_fastai.data.image_sets import DataSource, ImageSet, Subset, groups_of
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


def draw_test(labels: Tensor, fraction: float, groups: Tensor | None = None) -> Tensor:
    """Draw a stratified test set, the same images for every run.

    Args:
        labels: (N,) int64; or (N, K) of 0 and 1 for several labels per image, with which images are
            drawn as by `draw_groups`.
        fraction: fraction of each class, in [0, 1). At least one image of a class is drawn, but
            never its only one.
        groups: (N,) int64, to draw whole groups, as `draw_groups`; None for single images.

    Returns:
        whether each image is in the test set, (N,) bool.
    """
    return _draw(labels, groups, fraction, "test split")


def _draw(labels: Tensor, groups: Tensor | None, fraction: float, stream: str) -> Tensor:
    if groups is not None or labels.ndim == 2:
        return draw_groups(labels, _or_single(groups, labels), fraction, stream)
    ranks, sizes = _ranks_within_class(labels, stream)
    return ranks < (sizes * fraction).round().clamp(min=1).minimum(sizes - 1)


def draw_groups(
    labels: Tensor, groups: Tensor, fraction: float, stream: str, *, keep_classes: bool = True
) -> Tensor:
    """Draw whole groups, so that about the same fraction of each class is drawn.

    Groups are considered in random order, so that large and small ones are drawn alike. One is
    drawn if this brings the drawn fractions of the classes closer to `fraction` (sum of squares),
    and, with `keep_classes`, if each of its classes keeps an image. If none is drawn so, the
    smallest one for which this holds is.

    Args:
        labels: (N,) int64, or (N, K) of 0 and 1; images without labels then count as one more
            class.
        groups: (N,) int64.
        fraction: in (0, 1).
        stream: random stream of the order, see `rng.make_generator`.
        keep_classes: whether each class must keep an image that is not drawn.

    Returns:
        whether each image is drawn, (N,) bool.
    """
    names, members = groups.unique(return_inverse=True)
    classes = _class_membership(labels)
    counts = torch.zeros(len(names), classes.shape[1], dtype=torch.int64)
    counts.index_add_(0, members, classes)
    generator = make_generator(SPLIT_SEED, stream)  # type: ignore[arg-type]
    order = torch.randperm(len(names), generator=generator)
    totals = counts.sum(dim=0)
    weights = 1 / totals.clamp(min=1).double()
    drawn, missing = torch.zeros(len(names), dtype=torch.bool), totals * fraction
    left = totals.clone()
    for group in order.tolist():
        size = counts[group]
        if keep_classes and bool((left[size > 0] <= size[size > 0]).any()):
            continue
        after = missing - size
        if bool((after * weights).square().sum() < (missing * weights).square().sum()):
            drawn[group], missing, left = True, after, left - size
    if not drawn.any() and len(names) > 1:
        kept = (totals > counts) | (counts == 0)
        by_size = order[counts.sum(dim=1)[order].argsort(stable=True)].tolist()
        possible = [group for group in by_size if not keep_classes or bool(kept[group].all())]
        drawn[possible[:1]] = True
    return drawn[members]


def split_validation(images: ImageSet, fraction: float | None) -> tuple[ImageSet, Subset]:
    """Hold out a fraction of every class for validation.

    Args:
        images: the training set.
        fraction: in [0, 1); 0 holds out nothing, None uses `default_valid_split`. At least one
            image of each class is kept for training. If the images have groups, whole groups are
            held out, as by `draw_groups`.

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
    groups = groups_of(images)
    valid = _draw(images.labels, groups, fraction, "split")
    if groups is not None and not valid.any():
        raise InputError(
            f"valid_split={fraction:g} selects none of the {len(groups.unique()):,} groups: each "
            "holds all images of a class.\nTrain without a validation split: --valid-split 0. Or "
            "ignore the groups."
        )
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
    groups, labels = groups_of(valid), valid.labels
    if groups is None and labels.ndim == 1:
        ranks, sizes = _ranks_within_class(labels, "calibration split")
        chosen = ranks < (sizes * fraction).round()
    else:
        stream, groups = "calibration split", _or_single(groups, labels)
        chosen = draw_groups(labels, groups, fraction, stream, keep_classes=False)
    return Subset(valid, (~chosen).nonzero()[:, 0]), Subset(valid, chosen.nonzero()[:, 0])


def limit_images(images: ImageSet, limit: int) -> ImageSet:
    """Keep at most `limit` images, balanced over classes as far as possible.

    Args:
        images: the training images.
        limit: maximum number of images; 0 keeps all.
    """
    if limit == 0 or limit >= len(images):
        return images
    labels = images.labels
    if labels.ndim == 2:
        ranks = _lowest_ranks(_class_membership(labels), "limit")
    else:
        ranks, _ = _ranks_within_class(labels, "limit")
    chosen = ranks.argsort(stable=True)[:limit]  # first one image of each class, then the next
    return Subset(images, chosen.sort().values)


def _or_single(groups: Tensor | None, labels: Tensor) -> Tensor:
    """Return the groups, or for None one per image."""
    return torch.arange(len(labels)) if groups is None else groups


def _class_membership(labels: Tensor) -> Tensor:
    """Return 1 for each class of an image, and 0 for others: (N, K) int64.

    With several labels per image, (N, K + 1): the last class is that of images without labels.
    """
    if labels.ndim == 1:
        return torch.nn.functional.one_hot(labels)
    labels = labels.long()
    return torch.cat([labels, (labels.sum(dim=1, keepdim=True) == 0).long()], dim=1)


def _lowest_ranks(classes: Tensor, stream: str) -> Tensor:
    """Return the lowest random rank of each image within one of its classes (N, K): (N,)."""
    generator = make_generator(SPLIT_SEED, stream)  # type: ignore[arg-type]
    order = torch.randperm(len(classes), generator=generator)
    ranks = torch.empty(classes.shape, dtype=torch.int64)
    ranks[order] = classes[order].cumsum(dim=0) - 1
    return ranks.masked_fill(classes == 0, len(classes)).amin(dim=1)


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
