"""Augmentation of whole training images, by name: RandAugment, random resized crops, and others.

Shapes: P positions of a batch, C channels, H W image size.

A transform is an `ImageTransform`, which processes one image in a worker of the streaming loader,
before crop and flip, or a `BatchTransform`, which processes a whole batch on its device, after
crop and flip. To add one, write a function like that of `resized_crop.py` that takes its options
and returns one of the two, and register it in `choices.TRANSFORMS`. An `OriginalCrop` takes the
place of decoding whole image files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mixmo_fastai.config.choices import TRANSFORMS
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import (
    InputError,
    parameter_names,
    signature_mismatch,
    summarize_error,
    unknown_name_error,
    unknown_option_error,
)
from mixmo_fastai.rng import Stream, derive_seed


@dataclass(frozen=True)
class ImageTransform:
    """A transform of single images; it requires the streaming loader.

    All copies of an image in a batch share its result; crop and flip differ.

    Attributes:
        function: (C, H, W) uint8 -> (C, H, W) uint8. It may draw from torch's global generator,
            whose seed is a function of seed, epoch and image, and whose state is restored.
        stream: stream of its random draws.
    """

    function: Callable[[Tensor], Tensor]
    stream: Stream = "transform"

    def seeded(self, seed: int, epoch: int) -> "SeededTransform":
        """Return the function with the random draws of an epoch."""
        return SeededTransform(self, seed, epoch)


@dataclass(frozen=True)
class SeededTransform:
    """An `ImageTransform` whose random draws are a function of (seed, epoch, image)."""

    transform: ImageTransform
    seed: int
    epoch: int

    def __call__(self, pixels: Tensor, index: int) -> Tensor:
        """Transform one image (C, H, W) uint8; `index` is its number in the training set."""
        with torch.random.fork_rng(devices=[]):
            seed = derive_seed(self.seed, self.transform.stream, self.epoch, index)
            torch.default_generator.manual_seed(seed)  # seeds the CPU generator only
            result = self.transform.function(pixels)
        _check_unchanged_type(result, pixels)
        return result


def _check_unchanged_type(result: Any, images: Tensor) -> None:
    if not isinstance(result, Tensor):
        found = type(result).__name__
    elif result.shape != images.shape or result.dtype != images.dtype:
        found = f"{tuple(result.shape)} {str(result.dtype).removeprefix('torch.')}"
    else:
        return
    raise InputError(
        f"A transform must keep shape and type: {tuple(images.shape)} uint8; got {found}.\n"
        "Convert the result back, for example with result.round().clamp(0, 255).to(torch.uint8)."
    )


@dataclass(frozen=True)
class BatchTransform:
    """A transform of whole batches on their device, for both loaders.

    Every copy of an image in a batch is transformed separately.

    Attributes:
        function: (P, C, H, W) uint8 and a generator on the same device -> (P, C, H, W) uint8. The
            generator is a function of seed, epoch, step and rank.
    """

    function: Callable[[Tensor, Generator], Tensor]

    def __post_init__(self) -> None:
        if reason := signature_mismatch(self.function, "images", "generator"):
            raise InputError(
                f"The function of a BatchTransform must take images and a generator: {reason}.\n"
                "Its draws must come from the generator, so that runs are reproducible."
            )

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Transform images (P, C, H, W) uint8.

        Raises:
            InputError: the function returned another shape or dtype.
        """
        result = self.function(images, generator)
        _check_unchanged_type(result, images)
        return result


@dataclass(frozen=True)
class OriginalCrop:
    """Random crops of image files at their own size, resized to the image size in workers.

    It requires the streaming loader and images that are files. Every copy of an image in a batch
    has its own box; the file is decoded once for all of them.

    Attributes:
        draw: draws boxes; maps their number P, the size (H, W) of an image and a generator to
            (P, 4) int64: top, left, height, width. The generator is a function of seed, epoch and
            image.
    """

    draw: Callable[[int, tuple[int, int], Generator], Tensor]


Transform = ImageTransform | BatchTransform | OriginalCrop


def build_transform(
    name: str, options: Mapping[str, Any] | None = None, image_shape: Sequence[int] = (3, 32, 32)
) -> Transform | None:
    """Build a transform from its name.

    Args:
        name: one of `choices.TRANSFORMS`.
        options: keyword arguments of the transform.
        image_shape: (C, H, W); the transform is tried on an image of this shape.

    Returns:
        The transform; None for "standard" and "none", which only crop and flip, or do not.

    Raises:
        InputError: the name or an option is unknown, or the transform rejects its options or the
            images.
    """
    if name not in TRANSFORMS:
        raise unknown_name_error("transform", name, TRANSFORMS)
    options = dict(options or {})
    target = TRANSFORMS[name].target
    build = (lambda: None) if target is None else resolve_registered("transform", name, target)
    _check_options(name, build, options)
    try:
        transform: Transform | None = build(**options)
        _try_transform(transform, image_shape)
    except InputError as error:
        prefix = f"The transform {name!r}"
        text = str(error)
        raise InputError(text if text.startswith(prefix) else f"{prefix}: {text}") from error
    except Exception as error:
        raise InputError(
            f"The transform {name!r} with options {options} fails on images of shape "
            f"{tuple(image_shape)}:\n{summarize_error(error)}.\n"
            "Use other options or another transform."
        ) from error
    return transform


def _check_options(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    if (allowed := parameter_names(build)) is None:
        return
    if unknown := next((option for option in options if option not in allowed), None):
        raise unknown_option_error(f"The transform {name!r}", unknown, allowed)


def _try_transform(transform: Transform | None, image_shape: Sequence[int]) -> None:
    """Run a transform once, to find invalid options before training."""
    image = torch.zeros(*image_shape, dtype=torch.uint8)
    if isinstance(transform, ImageTransform):
        transform.seeded(0, 0)(image, 0)
    elif isinstance(transform, BatchTransform):
        transform(image.repeat(2, 1, 1, 1), Generator().manual_seed(0))
