"""From a data source to fastai DataLoaders: split, limit, augment, load."""

from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import default_device

from mixmo_fastai.augment import StoredImages
from mixmo_fastai.data.image_sets import DataSource, ImageSet
from mixmo_fastai.data.loaders import Augmentation, BatchLoader, ResidentLoader, StreamingLoader
from mixmo_fastai.data.loose_images import EVALUATION_BATCH
from mixmo_fastai.data.splits import limit_images, training_parts
from mixmo_fastai.errors import InputError

HOST_BUDGET = 8 * 2**30
"""Bytes of decoded images that are kept in the main memory at most."""
GPU_SHARE = 0.25
"""Share of the free memory of a GPU that decoded images may take."""


class BatchTooLargeError(InputError):
    """The training images do not fill one batch.

    Attributes:
        num_images: training images, after the split and the limit.
        problem: the first line of the message, without a full stop.
    """

    def __init__(self, num_images: int, batch_size: int) -> None:
        self.num_images = num_images
        self.problem = (
            f"{num_images} training images do not fill one batch of {batch_size} distinct images"
        )
        super().__init__(f"{self.problem}.\nLower batch_size to {num_images} or less.")


def make_dataloaders(
    source: DataSource,
    *,
    batch_size: int,
    valid_split: float | None = None,
    limit: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    loader: str = "auto",
    num_workers: int = 2,
) -> DataLoaders:
    """Build the loaders of training, validation and test; the test set is number 2.

    Args:
        source: from `load_source`.
        batch_size: distinct images per training batch, before any repetition.
        valid_split: fraction of each class of the training set that validates; 0 for none, and the
            validation loader is then empty. None takes `recipe.default_valid_split`: 2 %, and more
            of fewer than 5,000 images. Not used when the source has validation images.
        limit: at most so many training images, balanced; 0 for all.
        augmentation: of training; the source's own where not given.
        seed: of order and augmentation.
        device: where batches are made; fastai's default device where not given.
        loader: "resident", "streaming", or "auto" for resident where the images fit.
        num_workers: of the streaming loader.

    Raises:
        InputError: fewer than two classes, or too few images for one batch.
    """
    train, valid = _training_parts(source, batch_size, valid_split, limit)
    device = torch.device(default_device() if device is None else device)
    augmentation = augmentation or Augmentation(source.crop_padding, source.flip)
    kind = _loader_kind(loader, (train, valid, source.test), device, augmentation)
    settings = _settings(source, seed=seed, device=device, num_workers=num_workers)
    training = (StreamingLoader if augmentation.augmix else kind)(
        train, bs=batch_size, shuffle=True, augmentation=augmentation, **settings
    )
    others = (kind(part, bs=EVALUATION_BATCH, **settings) for part in (valid, source.test))
    return DataLoaders(training, *others, device=device)


def make_evaluation_loaders(
    source: DataSource,
    *parts: ImageSet,
    device: torch.device | str | None = None,
    loader: str = "auto",
    num_workers: int = 2,
) -> tuple[BatchLoader, ...]:
    """Build the loaders of parts of a source, without training.

    Args:
        source: says how images are normalised.
        parts: what is evaluated, such as the source's test part.
        device: as for `make_dataloaders`.
        loader: as there.
        num_workers: as there.
    """
    device = torch.device(default_device() if device is None else device)
    kind = _loader_kind(loader, parts, device)
    settings = _settings(source, seed=0, device=device, num_workers=num_workers)
    return tuple(kind(part, bs=EVALUATION_BATCH, **settings) for part in parts)


def _training_parts(
    source: DataSource, batch_size: int, valid_split: float | None, limit: int
) -> tuple[ImageSet, ImageSet]:
    if len(source.classes) < 2:
        raise InputError(
            f"{source.name} has {len(source.classes)} class; a classifier needs two or more."
        )
    train, valid = training_parts(source, valid_split)
    train = limit_images(train, limit)
    if len(train) < batch_size:
        raise BatchTooLargeError(len(train), batch_size)
    return train, valid


def _settings(source: DataSource, **settings: Any) -> dict[str, Any]:
    return {"classes": source.classes, "mean": source.mean, "std": source.std, **settings}


def _loader_kind(
    loader: str,
    parts: tuple[ImageSet, ...],
    device: torch.device,
    of_first: Augmentation = Augmentation(),  # noqa: B008
) -> type[BatchLoader]:
    if loader != "auto":
        return {"resident": ResidentLoader, "streaming": StreamingLoader}[loader]
    augmentations = [of_first, *(Augmentation() for _ in parts[1:])]
    needed = sum(
        StoredImages.num_bytes(len(part), part.image_shape, own.crop_padding, own.flip)
        for part, own in zip(parts, augmentations, strict=True)
    )
    budget = HOST_BUDGET
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    return ResidentLoader if needed <= budget else StreamingLoader
