"""What a recipe leaves open: network, epochs and image size, by the data and the device.

One table, `DEFAULTS`, which `docs/recipes.md` shows. A run's recipe holds what was decided, so that
nothing is decided again when it is resumed or evaluated. Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixmo_fastai.names import DATASETS, Architecture, parse_architecture
from mixmo_fastai.recipe import Recipe


@dataclass(frozen=True)
class Default:
    """A row of the table: what images of a size are trained with.

    Attributes:
        side: of the largest images that it is for, in pixels; the square root of H · W.
        arch: the network.
        images_seen: by the network, repetitions included.
    """

    side: float
    arch: str
    images_seen: int


DEFAULTS = {
    "cpu": (
        Default(20, "wrn10_4", 1_500_000),
        Default(40, "wrn10_4", 250_000),
        Default(math.inf, "resnet18", 250_000),
    ),
    "cuda": (
        Default(40, "wrn16_8", 20_000_000),
        Default(96, "preact_resnet18_2", 10_000_000),
        Default(math.inf, "resnet50", 5_000_000),
    ),
}
"""By device, the first row whose side is large enough."""
CPU_SIDE = 64
"""Height and width to which the images of a folder are scaled on a CPU if a side is longer."""
MOST_VIEWS = 1200
"""Times that each image is seen at most, by default: as published, 300 epochs of 4 repetitions."""
PUBLISHED_ARCH, PUBLISHED_EPOCHS = "wrn28_10", 300
"""Of the named data sets, where a recipe leaves it open."""

ENOUGH_IMAGES_SEEN = 1_500_000
"""From here on, two members in one network have been found better than a plain network."""
ENOUGH_WIDTH = 4
"""The narrowest WideResNet of which that was found."""
OPEN = ("data.image_size", "model.arch", "train.epochs")
"""Settings that a recipe may leave open."""


def default_for(device: str, image_shape: Sequence[int]) -> Default:
    """Return the row of the table for a device ("cpu" or "cuda") and images (C, H, W)."""
    side = math.sqrt(image_shape[1] * image_shape[2])
    rows = DEFAULTS.get(device, DEFAULTS["cpu"])
    return next(row for row in rows if side <= row.side)


def undecided(recipe: Recipe) -> list[str]:
    """List the settings that a recipe leaves open."""
    pairs = [(name, *name.split(".")) for name in OPEN]
    return [name for name, section, key in pairs if getattr(getattr(recipe, section), key) is None]


def decide(
    recipe: Recipe,
    *,
    device: str,
    image_shape: Sequence[int],
    num_images: int,
    scaled_to: int = 0,
) -> Recipe:
    """Fill in what a recipe leaves open; what it says stays.

    Args:
        recipe: what to train.
        device: "cpu" or "cuda".
        image_shape: (C, H, W) of the images as they were read.
        num_images: that train, without those of the validation split.
        scaled_to: height and width to which the images of a folder were scaled; 0 for their own.
    """
    data, model, train = recipe.data, recipe.model, recipe.train
    if data.image_size is None:
        data = replace(data, image_size=scaled_to)
    arch, epochs = PUBLISHED_ARCH, PUBLISHED_EPOCHS
    if data.dataset not in DATASETS:
        default = default_for(device, image_shape)
        images_seen = min(default.images_seen, MOST_VIEWS * num_images)
        seen_per_epoch = recipe.mix.batch_repetitions * num_images
        arch, epochs = default.arch, max(1, round(images_seen / seen_per_epoch))
    if model.arch is None:
        model = replace(model, arch=arch)
    if train.epochs is None:
        train = replace(train, epochs=epochs)
    return replace(recipe, data=data, model=model, train=train)


def narrow_network(recipe: Recipe) -> Architecture | None:
    """Return the network if it is a WideResNet of less than `ENOUGH_WIDTH`, otherwise None."""
    parsed = parse_architecture(recipe.model.arch or PUBLISHED_ARCH)
    return parsed if parsed.family == "wrn" and parsed.width < ENOUGH_WIDTH else None


def too_small_for_members(recipe: Recipe, images_seen: int) -> str | None:
    """Say what a network of several members lacks to be better than a plain one, if anything.

    The digits are so easy that they need neither.

    Args:
        recipe: decided.
        images_seen: by one network in all of its training.
    """
    if recipe.model.num_members == 1 or recipe.data.dataset == "digits":
        return None
    lacks = []
    if images_seen < ENOUGH_IMAGES_SEEN:
        lacks.append(f"about {ENOUGH_IMAGES_SEEN:,} images seen (here {images_seen:,})")
    if narrow := narrow_network(recipe):
        lacks.append(f"a width of {ENOUGH_WIDTH} (here {narrow.width})")
    return " and ".join(lacks) or None
