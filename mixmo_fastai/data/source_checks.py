"""Checks of data sources, so that mistakes in one's own data are found before training.

They read labels and metadata only; pixels may be mapped from a file larger than the memory.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, check_count


def check_array_images(pixels: Any, labels: Any, names: Sequence[str]) -> None:
    """Check the attributes of an `ArrayImages`.

    Raises:
        InputError: pixels are not (N, C, H, W) uint8, labels are not (N,) int64 or (N, K) uint8, or
            there are not N names.
    """
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 4:
        advice = "Scale floats to 0…255 and round them, then call .to(torch.uint8)."
        if isinstance(pixels, np.ndarray):
            advice = "Convert the array: torch.from_numpy(pixels)."
        elif isinstance(pixels, Tensor) and pixels.ndim == 3:
            advice = "Add the axis of the channels: pixels[:, None] for images of one channel."
        raise InputError(
            f"pixels must be a tensor (N, C, H, W) of uint8; got {_describe(pixels)}.\n{advice}"
        )
    if pixels.shape[1] > 4 and pixels.shape[3] <= 4:
        raise InputError(
            f"pixels must be (N, C, H, W); got {tuple(pixels.shape)}, which looks like "
            "(N, H, W, C).\nMove the channels: pixels.permute(0, 3, 1, 2).contiguous()."
        )
    kinds = (torch.int64, 1), (torch.uint8, 2)
    if not isinstance(labels, Tensor) or (labels.dtype, labels.ndim) not in kinds:
        raise InputError(
            f"labels must be a tensor (N,) of int64; got {_describe(labels)}.\n"
            "Use torch.tensor(labels), or labels.long(); with several per image, (N, K) of uint8."
        )
    if not len(pixels) == len(labels) == len(names):
        raise InputError(
            f"There must be one label and one name per image; got {len(pixels)} images, "
            f"{len(labels)} labels and {len(names)} names."
        )


def check_source(source: Any) -> None:
    """Check the attributes of a `DataSource`.

    Raises:
        InputError: labels are not indices of classes, splits differ in their image shape, or
            normalisation, padding or flip have invalid values.
    """
    _check_classes(source.classes)
    splits = {"train": source.train, "test": source.test}
    if source.valid is not None:
        splits["valid"] = source.valid
    shape = tuple(source.train.image_shape)
    for name, images in splits.items():
        _check_labels(f"{source.name!r}, {name}", images.labels, len(source.classes))
        if len(images) and tuple(images.image_shape) != shape:
            raise InputError(
                f"All images of {source.name!r} must have one shape; training images have {shape}, "
                f"those of {name} {tuple(images.image_shape)}.\nResize them to one size."
            )
    _check_normalization("mean", source.mean, shape[0], is_zero_allowed=True)
    _check_normalization("std", source.std, shape[0], is_zero_allowed=False)
    check_count("crop_padding", source.crop_padding, minimum=0)


def check_against_facts(source: Any, info: Any, *, may_have_fewer_classes: bool = False) -> None:
    """Check that a named data set has the properties that `choices.DATASETS` states.

    Args:
        source: the `DataSource`.
        info: its entry in `DATASETS`.
        may_have_fewer_classes: whether users may have removed classes, such as folders of images.

    Raises:
        InputError: the number of classes or the image shape differs.
    """
    found = {"num_classes": len(source.classes), "image_shape": tuple(source.train.image_shape)}
    if may_have_fewer_classes and found["num_classes"] < info.num_classes:
        del found["num_classes"]
    for name, value in found.items():
        if (stated := getattr(info, name)) != value:
            raise InputError(
                f"The data set {source.name!r} has {name} {value}, but its entry in DATASETS "
                f"states {stated}.\nCorrect the entry in mixmo_fastai/config/choices.py."
            )


def _check_classes(classes: Any) -> None:
    is_sequence = isinstance(classes, Sequence) and not isinstance(classes, str)
    if not is_sequence or not all(isinstance(name, str) for name in classes):
        raise InputError(
            f"classes must be the names of the classes, as strings; got {classes!r:.80}."
        )


def _check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    if labels.ndim == 2:
        _check_multi_labels(name, labels, num_classes)
        return
    if not len(labels):
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"Labels of {name} must be indices of its {num_classes} classes, from 0 to "
            f"{num_classes - 1}; got {low} to {high}."
        )


def _check_multi_labels(name: str, labels: Tensor, num_classes: int) -> None:
    if labels.shape[1] != num_classes or bool((labels > 1).any()):
        raise InputError(
            f"Labels of {name} must be (N, {num_classes}) of 0 and 1; got {tuple(labels.shape)} "
            f"with values up to {int(labels.max()) if labels.numel() else 0}."
        )


def _check_normalization(name: str, values: Any, channels: int, *, is_zero_allowed: bool) -> None:
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str)
    is_valid = is_sequence and len(values) == channels
    if not is_valid or not all(0 <= value <= 1 and (value or is_zero_allowed) for value in values):
        bounds = "from 0 to 1" if is_zero_allowed else "above 0 and at most 1"
        raise InputError(
            f"{name} must have one number {bounds} per channel, here {channels}, since pixels are "
            f"divided by 255; got {values!r}."
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
