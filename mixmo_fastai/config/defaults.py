"""Default network, number of epochs and image size, by data and device.

The defaults are in one table, `DEFAULTS`, which `docs/recipes.md` shows. The recipe of a run holds
the values that were chosen, so resuming and evaluating use the same. Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixmo_fastai.config.choices import DATASETS, Architecture, parse_architecture
from mixmo_fastai.config.recipe import Recipe


@dataclass(frozen=True)
class Default:
    """Defaults for images up to a size.

    Attributes:
        side: largest size of the images in pixels: the square root of H · W.
        arch: name of the network.
        images_seen: number of inputs seen by the network, including repetitions; a mixture of M
            images counts as one.
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
"""Rows by device; the first row whose side is large enough applies."""
MAX_CPU_SIDE = 64
"""Height and width to which images of a folder are resized on a CPU if a side is longer."""
MAX_VIEWS = 1200
"""Largest default number of views of each image: as published, 300 epochs of 4 repetitions."""
PUBLISHED_ARCH, PUBLISHED_EPOCHS = "wrn28_10", 300
"""Defaults for the named data sets."""
MAX_VIEWS_PRETRAINED = 20
"""The same for pretrained weights and one member, with which few epochs are usual."""
PRETRAINED = {"cpu": "resnet18", "cuda": "resnet50"}
"""Networks by device if `model.pretrained` is set."""

MIN_IMAGES_SEEN = 1_500_000
"""Number of images seen from which two members were found more accurate than a plain network, with
2,000 training images."""
MIN_IMAGES_SEEN_SHORT = 600_000
"""With `SHORT_SETTINGS` and 2,000 training images, from how many two members were as accurate as a
plain network with CutMix, with a lower NLL."""
MIN_VIEWS = 300
"""With `SHORT_SETTINGS`, from how many views of each image this was found; with 150, one network
was better. With the published settings it was found with 750; fewer were not tried with enough
images seen."""
MIN_IMAGES_SEEN_PRETRAINED, MIN_VIEWS_PRETRAINED = 59_500, 30
"""The same for pretrained weights: how many images seen, and how many views of each image."""
SHORT_SETTINGS = {"batch_repetitions": 2, "early_repetition": 1.0, "early_span": 0.6}
"""Settings of `mix` for short trainings, see docs/results.md."""
LENGTH_TOLERANCE = 0.03
"""Fraction by which a training may be shorter, since lengths are rounded to epochs and batches."""
MIN_WIDTH = 2
"""Smallest width of a WideResNet for which this was found. Ahead of two networks, 4."""
OPTIONAL_SETTINGS = ("data.image_size", "model.arch", "train.epochs")
"""Settings that a recipe may leave open (None)."""
MIN_LR_FIND_STEPS = 30
"""Number of steps of the shortest learning-rate range test that shows anything."""


def default_for(device: str, image_shape: Sequence[int]) -> Default:
    """Return the row of the table for a device ("cpu" or "cuda") and images (C, H, W)."""
    side = math.sqrt(image_shape[1] * image_shape[2])
    rows = DEFAULTS.get(device, DEFAULTS["cpu"])
    return next(row for row in rows if side <= row.side)


def default_arch(recipe: Recipe, device: str, image_shape: Sequence[int]) -> str:
    """Return the network for a recipe that leaves it open.

    Args:
        recipe: the recipe.
        device: "cpu" or "cuda".
        image_shape: (C, H, W) of the images as read.
    """
    if recipe.model.pretrained:
        return PRETRAINED.get(device, PRETRAINED["cpu"])
    if recipe.data.dataset in DATASETS:
        return PUBLISHED_ARCH
    return default_for(device, image_shape).arch


def open_settings(recipe: Recipe) -> list[str]:
    """List the settings that a recipe leaves open: None; epochs only without images_seen."""
    pairs = [(name, *name.split(".")) for name in OPTIONAL_SETTINGS]
    names = [name for name, section, key in pairs if getattr(getattr(recipe, section), key) is None]
    return [name for name in names if name != "train.epochs" or recipe.train.images_seen is None]


def fill_defaults(
    recipe: Recipe,
    *,
    device: str,
    image_shape: Sequence[int],
    num_images: int,
    scaled_to: int = 0,
) -> Recipe:
    """Fill in the settings that a recipe leaves open; other settings are unchanged.

    Args:
        recipe: the recipe.
        device: "cpu" or "cuda".
        image_shape: (C, H, W) of the images as read.
        num_images: number of training images, without the validation split.
        scaled_to: height and width to which images of a folder were resized; 0 if not resized.
    """
    data, model, train = recipe.data, recipe.model, recipe.train
    if data.image_size is None:
        data = replace(data, image_size=scaled_to)
    epochs = PUBLISHED_EPOCHS
    if data.dataset not in DATASETS:
        limit = default_for(device, image_shape).images_seen
        epochs = _default_epochs(recipe, limit, num_images)
    if model.arch is None:
        model = replace(model, arch=default_arch(recipe, device, image_shape))
    if train.images_seen is not None:
        seen_per_epoch = images_per_epoch(recipe, num_images) * model.num_nets
        epochs = max(1, round(train.images_seen / seen_per_epoch))
    if train.epochs is None:
        train = replace(train, epochs=epochs, images_seen=None)
    return replace(recipe, data=data, model=model, train=train)


def is_pretrained(recipe: Recipe) -> bool:
    """Check whether training starts from weights instead of random numbers."""
    return bool(recipe.model.pretrained or recipe.model.weights)


def _default_epochs(recipe: Recipe, limit: int, num_images: int) -> int:
    """Return the default number of epochs of a recipe for about `limit` images seen or fewer.

    It is rounded up where several members need that many and would get too few.
    """
    images_seen = min(limit, MAX_VIEWS * num_images)
    if is_pretrained(recipe) and recipe.model.num_members == 1:
        images_seen = min(images_seen, MAX_VIEWS_PRETRAINED * num_images)
    elif is_pretrained(recipe):  # several members need longer than one
        required = max(MIN_VIEWS_PRETRAINED * num_images, MIN_IMAGES_SEEN_PRETRAINED)
        if (images_seen := min(images_seen, required)) < limit:
            return math.ceil(images_seen / images_per_epoch(recipe, num_images))
    epochs = max(1, round(images_seen / (recipe.mix.batch_repetitions * num_images)))
    if recipe.model.num_members > 1 and images_seen >= MIN_IMAGES_SEEN:
        epoch = images_per_epoch(recipe, num_images)
        if not is_enough(epochs * epoch, MIN_IMAGES_SEEN):
            return math.ceil(MIN_IMAGES_SEEN / epoch)
    return epochs


def images_per_epoch(recipe: Recipe, num_images: int) -> int:
    """Return how many inputs a network sees per epoch, without the incomplete last batch.

    Args:
        recipe: the recipe.
        num_images: number of training images.
    """
    num_distinct = max(1, recipe.train.batch_size // recipe.mix.batch_repetitions)
    return max(1, num_images // num_distinct) * num_distinct * recipe.mix.batch_repetitions


def narrow_network(recipe: Recipe) -> Architecture | None:
    """Return the network if it is a WideResNet narrower than `MIN_WIDTH`, otherwise None."""
    parsed = parse_architecture(recipe.model.arch or PUBLISHED_ARCH)
    return parsed if parsed.family == "wrn" and parsed.width < MIN_WIDTH else None


def min_images_seen(recipe: Recipe, images_seen: int) -> int:
    """Return from how many images seen several members were found as good as a plain network.

    Args:
        recipe: recipe without open settings.
        images_seen: number of images seen by one network in training.
    """
    if has_short_settings(recipe):
        return min_images_seen_short(recipe, images_seen)
    if is_pretrained(recipe):
        return MIN_IMAGES_SEEN
    return max(MIN_IMAGES_SEEN, _images_for_views(MIN_VIEWS, recipe, images_seen))


def min_images_seen_short(recipe: Recipe, images_seen: int) -> int:
    """Return the same as `min_images_seen`, for training with `SHORT_SETTINGS`."""
    if not is_pretrained(recipe):
        return max(MIN_IMAGES_SEEN_SHORT, _images_for_views(MIN_VIEWS, recipe, images_seen))
    required = _images_for_views(MIN_VIEWS_PRETRAINED, recipe, images_seen)
    return min(MIN_IMAGES_SEEN, max(MIN_IMAGES_SEEN_PRETRAINED, required))


def num_views(recipe: Recipe) -> int:
    """Return how often one network sees each image in training: epochs times repetitions."""
    return (recipe.train.epochs or 1) * recipe.mix.batch_repetitions


def _images_for_views(views: int, recipe: Recipe, images_seen: int) -> int:
    """Return how many images are seen in a training with `views` views of each image."""
    return math.ceil(views * images_seen / num_views(recipe))


def is_enough(images_seen: int, required: int) -> bool:
    """Check whether a training has the required number of images seen, or nearly so."""
    return images_seen >= (1 - LENGTH_TOLERANCE) * required


def _rounded_up(number: int) -> int:
    """Round up to two digits."""
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return math.ceil(number / unit) * unit


def has_short_settings(recipe: Recipe) -> bool:
    """Check whether a recipe has `SHORT_SETTINGS`, or fewer repetitions."""
    mix = recipe.mix
    return (
        mix.batch_repetitions <= SHORT_SETTINGS["batch_repetitions"]
        and (mix.early_repetition or 0.0) >= SHORT_SETTINGS["early_repetition"]
        and mix.early_span >= SHORT_SETTINGS["early_span"]
    )


def unmet_requirement(recipe: Recipe, images_seen: int) -> str | None:
    """Describe the unmet requirements for several members to outperform a plain network, or None.

    The digits are easy enough that they have no requirements.

    Args:
        recipe: recipe without open settings.
        images_seen: number of images seen by one network in training.
    """
    if recipe.model.num_members == 1 or recipe.data.dataset == "digits":
        return None
    unmet = []
    if not is_enough(images_seen, required := min_images_seen(recipe, images_seen)):
        unmet.append(_images_text(recipe, required, images_seen))
    if narrow := narrow_network(recipe):
        unmet.append(f"a width of {MIN_WIDTH} (here {narrow.width})")
    return " and ".join(unmet) or None


def _images_text(recipe: Recipe, required: int, images_seen: int) -> str:
    """Describe the required number of images seen, as views of each image if these decide."""
    views = MIN_VIEWS_PRETRAINED if is_pretrained(recipe) else MIN_VIEWS
    if required == _images_for_views(views, recipe, images_seen):
        return f"about {views} views of each image (here {num_views(recipe)})"
    return f"about {_rounded_up(required):,} images seen (here {images_seen:,})"
