"""Augmentation of whole training images, by name: RandAugment, random resized crops, and others.

Shapes: P positions of a batch, C channels, H W image size.

A transform is an `ImageTransform`, which processes one image in a worker of the streaming loader,
before crop and flip, or a `BatchTransform`, which processes a whole batch on its device, after
crop and flip. To add one, write a function like those below that takes its options and returns one
of the two, and register it in `choices.TRANSFORMS`.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastai.torch_core import TensorImage
from fasttransform import Pipeline
from torch import Generator, Tensor

from mixmo_fastai.config.choices import TRANSFORMS
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, nearest, summarize_error, unknown_name_error
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
        try:
            inspect.signature(self.function).bind("images", "generator")
        except TypeError as error:
            raise InputError(
                f"The function of a BatchTransform must take images and a generator: {error}.\n"
                "Its draws must come from the generator, so that runs are reproducible."
            ) from None
        except ValueError:  # a builtin without a signature
            pass

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Transform images (P, C, H, W) uint8.

        Raises:
            InputError: the function returned another shape or dtype.
        """
        result = self.function(images, generator)
        _check_unchanged_type(result, images)
        return result


Transform = ImageTransform | BatchTransform


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
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The transform {name!r} with options {options} fails on images of shape "
            f"{tuple(image_shape)}: {summarize_error(error)}.\n"
            "Use other options or another transform."
        ) from error
    return transform


def _check_options(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := next((option for option in options if option not in parameters), None):
        guess = nearest(unknown, parameters)
        raise InputError(
            f"The transform {name!r} has no option {unknown!r}."
            f"{f' Did you mean {guess!r}?' if guess else ''}\n"
            f"Allowed: {', '.join(parameters) or 'none'}."
        )


def _try_transform(transform: Transform | None, image_shape: Sequence[int]) -> None:
    """Run a transform once, to find invalid options before training."""
    image = torch.zeros(*image_shape, dtype=torch.uint8)
    if isinstance(transform, ImageTransform):
        transform.seeded(0, 0)(image, 0)
    elif isinstance(transform, BatchTransform):
        transform(image.repeat(2, 1, 1, 1), Generator().manual_seed(0))


def rand_augment(
    num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31
) -> ImageTransform:
    """Return torchvision's RandAugment.

    Source: Cubuk et al., "RandAugment", NeurIPS 2020.

    Args:
        num_ops: number of operations per image.
        magnitude: strength of the operations, from 0 to `num_magnitude_bins` - 1.
        num_magnitude_bins: number of strengths.
    """
    from torchvision.transforms import RandAugment  # importing takes 1.5 s, and few runs need it

    return ImageTransform(RandAugment(num_ops, magnitude, num_magnitude_bins))


def trivial_augment(num_magnitude_bins: int = 31) -> ImageTransform:
    """Return torchvision's TrivialAugmentWide: one operation of random strength per image.

    Source: Müller, Hutter, "TrivialAugment", ICCV 2021.

    Args:
        num_magnitude_bins: number of strengths.
    """
    from torchvision.transforms import TrivialAugmentWide

    return ImageTransform(TrivialAugmentWide(num_magnitude_bins))


def augmix(
    severity: int = 3,
    mixture_width: int = 3,
    chain_depth: int = -1,
    alpha: float = 1.0,
    all_ops: bool = True,
) -> ImageTransform:
    """Return torchvision's AugMix, without its consistency loss.

    Source: Hendrycks et al., "AugMix", ICLR 2020.

    Args:
        severity: strength of the operations, from 1 to 10.
        mixture_width: number of chains of operations that are averaged.
        chain_depth: operations per chain; -1 to draw 1 to 3.
        alpha: concentration of the weights of the chains.
        all_ops: whether to use brightness, colour, contrast and sharpness too, which overlap with
            the corruptions of CIFAR-C.
    """
    from torchvision.transforms import AugMix

    return ImageTransform(
        AugMix(severity, mixture_width, chain_depth, alpha, all_ops), stream="augmix"
    )


def random_resized_crop(
    scale: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> BatchTransform:
    """Return random crops that are resized to the image size, as in training on ImageNet.

    Boxes are drawn as by torchvision's `RandomResizedCrop`, and resized with bilinear
    interpolation. A crop is never larger than the result, so antialiasing would have no effect.

    Args:
        scale: smallest and largest fraction of the image's area.
        ratio: smallest and largest ratio of width to height.

    Raises:
        InputError: a range is empty, or not positive.
    """
    for name, bounds, highest in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
        is_pair = isinstance(bounds, Sequence) and len(bounds) == 2
        if not is_pair or not 0 < bounds[0] <= bounds[1] <= highest:
            limit = " and at most 1" if name == "scale" else ""
            raise InputError(
                f"{name} must be two numbers in ascending order, above 0{limit}; got {bounds!r}."
            )

    def crop(images: Tensor, generator: Generator) -> Tensor:
        count, (height, width) = len(images), images.shape[-2:]
        boxes = draw_boxes(count, (height, width), scale, ratio, generator)
        return resize_boxes(images, boxes)

    return BatchTransform(crop)


_ATTEMPTS = 10


def draw_boxes(
    count: int,
    size: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    generator: Generator,
) -> Tensor:
    """Draw boxes of random area and shape, distributed as in torchvision's `RandomResizedCrop`.

    Up to ten pairs of area and ratio are drawn per box, until the box fits into the image.
    Otherwise the box is the largest centred box with the nearest permitted ratio.

    Args:
        count: P, number of boxes.
        size: (H, W) of the images.
        scale: see `random_resized_crop`.
        ratio: see `random_resized_crop`.
        generator: generator on the device of the result.

    Returns:
        (P, 4) int64: top, left, height, width.
    """
    height, width = size
    uniform = torch.rand(4, count, _ATTEMPTS, generator=generator, device=generator.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = torch.exp(low + (high - low) * uniform[1])
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    tops = (uniform[2] * (height - heights + 1)).floor()
    lefts = (uniform[3] * (width - widths + 1)).floor()
    candidates = torch.stack([tops, lefts, heights, widths], dim=2)  # (P, attempts, 4)
    first = fits.to(torch.uint8).argmax(dim=1)  # the first that fits
    chosen = candidates[torch.arange(count, device=first.device), first]
    fallback_width, fallback_height = width, height
    if width / height < ratio[0]:
        fallback_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        fallback_width = round(height * ratio[1])
    top, left = (height - fallback_height) // 2, (width - fallback_width) // 2
    fallback = chosen.new_tensor([top, left, fallback_height, fallback_width])
    return torch.where(fits.any(dim=1)[:, None], chosen, fallback).long()


def resize_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Resize a box of each image to the image size, with bilinear interpolation.

    Args:
        images: (P, C, H, W) uint8.
        boxes: (P, 4) int64: top, left, height, width.

    Returns:
        (P, C, H, W) uint8, rounded.
    """
    height, width = images.shape[-2:]
    rows = _interpolation(boxes[:, 0], boxes[:, 2], height)  # (P, H, H)
    columns = _interpolation(boxes[:, 1], boxes[:, 3], width)  # (P, W, W)
    values = rows[:, None] @ images.float() @ columns[:, None].transpose(2, 3)
    return values.round().clamp(0, 255).to(torch.uint8)


def _interpolation(starts: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Return the weights of linear interpolation from an interval to the whole axis.

    Args:
        starts: (P,) int64, first position of each interval.
        lengths: (P,) int64.
        size: number of positions of the axis.

    Returns:
        (P, size, size): the weight of each input position for each output position.
    """
    positions = torch.arange(size, device=starts.device, dtype=torch.float32)
    lengths = lengths[:, None]
    inside = (positions + 0.5) * (lengths / size) - 0.5  # in the interval, as with half pixels
    inside = torch.minimum(inside.clamp(min=0), lengths - 1.0)
    sources = starts[:, None] + inside  # (P, size)
    return (1 - (sources[:, :, None] - positions).abs()).clamp(min=0)


def aug_transforms(**options: Any) -> BatchTransform:
    """Return fastai's `aug_transforms`: rotation, zoom, warp and lighting.

    Horizontal flips are those of the loader, which respects `data.flip`; otherwise the transforms
    are fastai's, with its defaults.

    Args:
        options: arguments of fastai's `aug_transforms`, except for `do_flip`, `size`, `min_scale`
            and `xtra_tfms`. With `flip_vert`, images are also mirrored and rotated by 90°.

    Raises:
        InputError: an option is unknown or excluded.
    """
    from fastai.vision.augment import aug_transforms as fastai_transforms

    excluded = {"do_flip": "data.flip", "size": "data.image_size", "min_scale": "", "xtra_tfms": ""}
    parameters = inspect.signature(fastai_transforms).parameters
    allowed = [name for name in parameters if name not in excluded]
    for option in options:
        if option not in allowed:
            instead = f" Use {excluded[option]}." if excluded.get(option) else ""
            raise InputError(
                f"The transform 'aug-transforms' has no option {option!r}.{instead}\n"
                f"Allowed: {', '.join(allowed)}."
            )
    transforms = fastai_transforms(do_flip=bool(options.get("flip_vert")), **options)
    pipeline = Pipeline(transforms, split_idx=0)

    def augment(images: Tensor, generator: Generator) -> Tensor:
        with _global_generators_seeded(generator.initial_seed(), images.device):
            values = pipeline(TensorImage(images.float() / 255)).as_subclass(Tensor)
        return (255 * values).round().clamp(0, 255).to(torch.uint8)

    return BatchTransform(augment)


@contextmanager
def _global_generators_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of Python and torch in a with block; then restore their states."""
    python_state = random.getstate()
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        try:
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
