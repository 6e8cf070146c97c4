"""Build fastai DataLoaders from a data source."""

from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import default_device

from mixmo_fastai.data.augment import StoredImages
from mixmo_fastai.data.cuts import Augmentation
from mixmo_fastai.data.image_sets import DataSource, ImageSet
from mixmo_fastai.data.loaders import BatchLoader, ResidentLoader, StreamingLoader
from mixmo_fastai.data.loose_images import EVALUATION_BATCH
from mixmo_fastai.data.pixel_reader import required_files
from mixmo_fastai.data.splits import limit_images, split_calibration, training_parts
from mixmo_fastai.data.transforms import ImageTransform, OriginalCrop
from mixmo_fastai.errors import InputError

HOST_BUDGET = 8 * 2**30
"""Maximum bytes of decoded images that are kept in main memory."""
GPU_MEMORY_FRACTION = 0.25
"""Maximum fraction of the free GPU memory that decoded images may use."""


class BatchTooLargeError(InputError):
    """The training images do not fill one batch.

    Attributes:
        num_images: training images, after the split and the limit.
        problem: the first line of the message, without the period.
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
    calibration_split: float | None = None,
    limit: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    loader: str = "auto",
    num_workers: int = 2,
) -> DataLoaders:
    """Build the loaders for training, validation and test, in this order, and for calibration.

    Args:
        source: from `load_source`.
        batch_size: distinct images per training batch, before any repetition.
        valid_split: fraction of each training class to hold out for validation; with 0 the
            validation loader is empty. None for `recipe.default_valid_split`: 2 %, and more for
            fewer than 5,000 images. Ignored if the source has validation images.
        calibration_split: fraction of each class of the validation images for a fourth loader, for
            calibration; None or 1 for none, since all validation images then serve for both.
        limit: maximum number of training images, balanced over classes; 0 for all.
        augmentation: augmentation of training images; None for that of the source.
        seed: seed of order and augmentation.
        device: device of the batches; None for fastai's default device.
        loader: "resident", "streaming", or "auto" for resident if the images fit in memory.
        num_workers: number of worker processes of the streaming loader.

    Raises:
        InputError: the source has fewer than two classes, or too few images for one batch.
    """
    train, valid = _training_parts(source, batch_size, valid_split, limit)
    valid, calibration = split_calibration(valid, calibration_split)
    evaluated = [valid, source.test, *([] if calibration is None else [calibration])]
    device = torch.device(default_device() if device is None else device)
    augmentation = augmentation or Augmentation(source.crop_padding, source.flip)
    kind = _loader_kind(loader, (train, *evaluated), device, augmentation)
    settings = _settings(source, seed=seed, device=device, num_workers=num_workers)
    if isinstance(augmentation.transform, ImageTransform | OriginalCrop):
        if loader == "resident":
            raise InputError(
                "This transform processes single images, which requires the streaming loader.\n"
                "Use loader='streaming' or 'auto'."
            )
        if isinstance(augmentation.transform, OriginalCrop):
            required_files(train)  # fail before training
        training_kind: type[BatchLoader] = StreamingLoader
    else:
        training_kind = kind
    training = training_kind(
        train, bs=batch_size, shuffle=True, augmentation=augmentation, **settings
    )
    others = (kind(part, bs=EVALUATION_BATCH, **settings) for part in evaluated)
    return DataLoaders(training, *others, device=device)


def make_evaluation_loaders(
    source: DataSource,
    *parts: ImageSet,
    device: torch.device | str | None = None,
    loader: str = "auto",
    num_workers: int = 2,
) -> tuple[BatchLoader, ...]:
    """Build loaders for evaluation, one per image set.

    Args:
        source: the source, for its classes and normalisation.
        parts: the image sets to evaluate, such as `source.test`.
        device: see `make_dataloaders`.
        loader: see `make_dataloaders`.
        num_workers: see `make_dataloaders`.
    """
    device = torch.device(default_device() if device is None else device)
    kind = _loader_kind(loader, parts, device)
    settings = _settings(source, seed=0, device=device, num_workers=num_workers)
    return tuple(kind(part, bs=EVALUATION_BATCH, **settings) for part in parts)


def _training_parts(
    source: DataSource, batch_size: int, valid_split: float | None, limit: int
) -> tuple[ImageSet, ImageSet]:
    if not isinstance(source, DataSource):
        raise InputError(
            f"source must be a DataSource; got {type(source).__name__}.\n"
            "Load one: make_dataloaders(load_source(FOLDER_OR_NAME), …)."
        )
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
    first_augmentation: Augmentation = Augmentation(),  # noqa: B008
) -> type[BatchLoader]:
    if loader != "auto":
        return {"resident": ResidentLoader, "streaming": StreamingLoader}[loader]
    augmentations = [first_augmentation, *(Augmentation() for _ in parts[1:])]
    needed = sum(
        StoredImages.num_bytes(len(part), part.image_shape, each.crop_padding, each.flip)
        for part, each in zip(parts, augmentations, strict=True)
    )
    budget = HOST_BUDGET
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * GPU_MEMORY_FRACTION)
    return ResidentLoader if needed <= budget else StreamingLoader
