"""fastai's `aug_transforms` for whole batches, on their device.

Shapes: P positions of a batch, C channels, H W image size.
"""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastai.torch_core import TensorImage
from fasttransform import Pipeline
from torch import Generator, Tensor

from mixmo_fastai.data.transforms import BatchTransform
from mixmo_fastai.errors import InputError


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
