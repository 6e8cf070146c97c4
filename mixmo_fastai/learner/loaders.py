"""What a Learner's network must know of its loaders: shape of the images, targets, classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize, get_c
from fasttransform import Pipeline
from torch import Tensor

from mixmo_fastai.callbacks.checks import check_batch, count_inputs_and_targets
from mixmo_fastai.data.first_batch import first_batch, preserved_random_states
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.data.statistics import for_channels
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.base_losses import label_range_error

PIXEL_TOLERANCE = 1e-3
"""How far interpolation may take pixels out of [0, 1]."""


@dataclass(frozen=True)
class FirstBatch:
    """What the first training batch shows.

    Attributes:
        image_shape: (C, H, W).
        targets: of the batch; None if they are no tensor, and for the project's own loaders.
        limits: smallest and largest value of the images; None for the project's own loaders.
    """

    image_shape: tuple[int, int, int]
    targets: Tensor | None = None
    limits: tuple[float, float] | None = None


def inspect_batches(dls: DataLoaders) -> FirstBatch:
    """Inspect the first training batch; the random states stay as they are.

    Raises:
        InputError: batches do not have one input and one target, or the input is no image.
    """
    if isinstance(dls.train, BatchLoader):
        return FirstBatch(dls.train.images.image_shape)
    with preserved_random_states(dls.train):
        batch = first_batch(dls.train)
        counts = count_inputs_and_targets(dls, batch)  # may run a sample through the transforms
    check_batch(*counts)
    images, *targets = batch
    if getattr(images, "ndim", 0) != 4:
        raise InputError(
            "Batches must be images (n, C, H, W); the loader's first input is "
            f"{getattr(images, 'shape', type(images).__name__)}."
        )
    if not images.is_floating_point():
        raise InputError(
            f"Images must be floating-point numbers; the loader's first batch holds {images.dtype}."
            "\nConvert them in the data set, such as image.float() / 255."
        )
    channels, height, width = images.shape[1:]
    first_targets = targets[0] if targets and isinstance(targets[0], Tensor) else None
    limits = float(images.min()), float(images.max())
    return FirstBatch((int(channels), int(height), int(width)), first_targets, limits)


def normalize_for_weights(
    dls: DataLoaders, batch: FirstBatch, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Add fastai's `Normalize` with the statistics of pretrained weights, as `vision_learner` does.

    Loaders stay as they are if they have a `Normalize` or no batch transforms, or if their images
    are no pixels in [0, 1], for example because the data set has standardised them.

    Args:
        dls: loaders.
        batch: their first batch.
        mean: one value per channel of the weights; other numbers of channels get the mean of them.
        std: the same for the standard deviation.
    """
    low, high = batch.limits or (-math.inf, math.inf)
    if low < -PIXEL_TOLERANCE or high > 1 + PIXEL_TOLERANCE:
        return
    pipelines = [getattr(loader, "after_batch", None) for loader in dls.loaders]
    if not all(isinstance(pipeline, Pipeline) for pipeline in pipelines):
        return
    if any(isinstance(transform, Normalize) for pipeline in pipelines for transform in pipeline.fs):
        return
    channels = batch.image_shape[0]
    statistics = (torch.tensor(for_channels(values, channels)) for values in (mean, std))
    transform = Normalize.from_stats(*statistics, cuda=False)
    device = dls.device or torch.device("cpu")
    transform.mean, transform.std = transform.mean.to(device), transform.std.to(device)
    dls.add_tfms([transform], "after_batch")


def check_classes(targets: Tensor | None, num_classes: int | None, num_data_classes: int) -> None:
    """Check that the shape of the targets is supported and the network has enough classes.

    Args:
        targets: of the first batch; None if they are not known.
        num_classes: K; None for that of a given network.
        num_data_classes: number of classes of the data; 0 if it is not known.
    """
    if targets is None:
        return
    if targets.ndim > 2:
        raise InputError(
            f"The targets have shape {tuple(targets.shape)}; they must be (n,) or (n, K): one "
            "class, several labels or regression targets per image."
        )
    are_classes = targets.ndim == 1 and not targets.is_floating_point()
    if are_classes and num_classes is not None and num_classes < num_data_classes:
        raise InputError(
            f"num_classes must be at least {num_data_classes}, the number of classes of the data; "
            f"got {num_classes}.\nOmit num_classes."
        )


def check_labels(targets: Tensor | None, num_classes: int, ignored: int) -> None:
    """Check that class indices of the first batch are indices of the network's outputs.

    Args:
        targets: of the batch; only class indices (n,) are checked.
        num_classes: number of outputs; 0 if it is not known.
        ignored: target that the loss ignores.

    Raises:
        InputError: a label is out of range.
    """
    if targets is None or targets.ndim != 1 or targets.is_floating_point() or num_classes < 2:
        return
    labels = targets[targets != ignored]
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise label_range_error(int(wrong[0]), num_classes)


def check_outputs(targets: Tensor | None, num_outputs: int, num_data_classes: int) -> None:
    """Check that a network for class indices has an output for each class of the data.

    One output, for a binary decision, may do for two classes. The losses of torch and fastai need
    this; others may not.
    """
    are_classes = targets is None or (targets.ndim == 1 and not targets.is_floating_point())
    if are_classes and 1 < num_outputs < num_data_classes:
        raise InputError(
            f"The network has {num_outputs} outputs, the data {num_data_classes} classes.\n"
            "Build the network for the data."
        )


def known_classes(dls: DataLoaders) -> int:
    """Return K if the loaders know it, otherwise 0."""
    return int(get_c(dls) or 0) if isinstance(dls.train, DataLoader) else 0


def count_classes(dls: DataLoaders) -> int:
    """Return K.

    Raises:
        InputError: the loaders do not know it.
    """
    number = known_classes(dls)
    if not number:
        raise InputError(
            "The loaders do not report the number of classes. Pass it, e.g. num_classes=10."
        )
    return number
