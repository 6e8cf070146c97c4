"""One line of advice after training, based on its history; never on the test set.

Standard library only.
"""

import math
from collections.abc import Mapping, Sequence

from mixmo_fastai.config.defaults import (
    MAX_VIEWS,
    MIN_WIDTH,
    SHORT_SETTINGS,
    has_short_settings,
    is_enough,
    is_pretrained,
    min_images_seen,
    min_images_seen_short,
    narrow_network,
    num_views,
    unmet_requirement,
)
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import recipes_for_one_member

GOOD_ACCURACY = 0.95
"""Validation accuracy from which no advice is given."""
LOW_TRAIN_LOSS = 0.1
"""Training loss that indicates a training accuracy near 100 %: the geometric mean of the true
class's probability is 0.9."""
OVERFIT_ACCURACY = 0.85
"""Validation accuracy below which a low training loss counts as overfitting."""
LAST_FRACTION = 0.25
"""Fraction of the epochs, at the end, in which a decreasing validation loss is detected."""
MIN_DECREASE = 0.05
"""Fraction by which the validation loss must decrease in these epochs."""


def advise(
    recipe: Recipe,
    history: Sequence[Mapping[str, str]],
    images_seen: int,
    *,
    is_multi_label: bool = False,
) -> str | None:
    """Return advice based on the curves of a finished training, or None.

    Checked in this order: a network or training too small for several members, overfitting, a
    validation loss that is still decreasing.

    Args:
        recipe: recipe of the run, without open settings.
        history: rows of history.csv; for a deep ensemble, those of one network.
        images_seen: number of images seen by one network in training.
        is_multi_label: whether images have several labels, for which there is no advice.
    """
    rows = [row for row in history if row.get("valid_loss")]
    if not rows or is_multi_label:  # the accuracy of labels says little
        return None
    accuracy, train_loss = float(rows[-1]["accuracy"]), float(rows[-1]["train_loss"])
    if accuracy >= GOOD_ACCURACY:
        return None
    if unmet_requirement(recipe, images_seen):
        return _size_advice(recipe, images_seen)
    if train_loss <= LOW_TRAIN_LOSS and accuracy < OVERFIT_ACCURACY:
        return _overfitting_advice(recipe)
    if _is_decreasing([float(row["valid_loss"]) for row in rows]):
        epochs = recipe.train.epochs or len(rows)
        return f"The validation loss was still decreasing: train longer, e.g. --epochs {2 * epochs}"
    return None


def members_advice(recipe: Recipe, requirement: str, images_seen: int) -> str:
    """Return the advice before a training that is too small for several members.

    Args:
        recipe: recipe without open settings.
        requirement: from `defaults.unmet_requirement`.
        images_seen: number of images seen by one network in training.
    """
    text = f"{recipe.model.num_members} members need {requirement}"
    flags = []
    if narrow_network(recipe) is None:
        flags += _longer_flags(recipe, images_seen)
        if _short_settings_help(recipe, images_seen):
            flags.append(_short_flags(recipe, images_seen))
    text += f": {', or '.join(flags)}" if flags else ""
    return f"{text}; otherwise {_one_member(recipe)} is often more accurate"


def _longer_flags(recipe: Recipe, images_seen: int) -> list[str]:
    """Return the flag for a training of the required length.

    The list is empty if the length is enough, or images would be seen more than `MAX_VIEWS` times.
    """
    required = min_images_seen(recipe, images_seen)
    is_long = is_enough(images_seen, required)
    if is_long or _views_needed(recipe, images_seen, required) > MAX_VIEWS:
        return []
    epochs = (recipe.train.epochs or 1) * required / max(images_seen, 1)
    return [f"--epochs {math.ceil(epochs)}"]


def _one_member(recipe: Recipe) -> str:
    """Return the flag for one member, and the recipe that replaces it together with --recipe."""
    names = recipes_for_one_member(recipe)
    return f"--members 1 (or --recipe {names[0]})" if names else "--members 1"


def _size_advice(recipe: Recipe, images_seen: int) -> str:
    """Return the advice after a training that was too small for several members."""
    members, changes = recipe.model.num_members, []
    if _short_settings_help(recipe, images_seen):
        changes.append(_short_flags(recipe, images_seen))
    elif not is_enough(images_seen, min_images_seen(recipe, images_seen)):
        if longer := _longer_flags(recipe, images_seen):
            changes += longer
        else:
            required = min_images_seen_short(recipe, images_seen)
            views = _views_needed(recipe, images_seen, required)
            if is_pretrained(recipe) or has_short_settings(recipe) or views > MAX_VIEWS:
                return f"{members} members need more training images: use {_one_member(recipe)}"
            changes.append(_short_flags(recipe, images_seen))
    narrow = narrow_network(recipe)
    if narrow and not recipe.model.weights:  # they fit no other width
        changes.append(f"--arch wrn{narrow.depth}_{MIN_WIDTH}")
    if not changes:
        return f"{members} members need a width of {MIN_WIDTH}: compare with {_one_member(recipe)}"
    return (
        f"Compare with {_one_member(recipe)}, or train {members} members with {' '.join(changes)} "
        "(docs/recipes.md)"
    )


def _views_needed(recipe: Recipe, images_seen: int, required: float) -> float:
    """Return how often each image is seen in a training of the required length."""
    return num_views(recipe) * required / max(images_seen, 1)


def _short_settings_help(recipe: Recipe, images_seen: int) -> bool:
    """Check whether a training is too short only with the settings of long ones."""
    lowest = 0 if is_pretrained(recipe) else min_images_seen_short(recipe, images_seen)
    required = min_images_seen(recipe, images_seen)
    is_between = is_enough(images_seen, lowest) and not is_enough(images_seen, required)
    return is_between and not has_short_settings(recipe)


def _short_flags(recipe: Recipe, images_seen: int) -> str:
    """Return the flags of `SHORT_SETTINGS`, and the epochs that show as many images as before.

    In fine-tuning, the epochs show as many images as these settings need.
    """
    short, repetitions = SHORT_SETTINGS, recipe.mix.batch_repetitions
    flags = (
        f"--set mix.early_repetition={short['early_repetition']:g} "
        f"--set mix.early_span={short['early_span']:g}"
    )
    required = min_images_seen_short(recipe, images_seen)
    longer = 1.0 if is_enough(images_seen, required) else required / max(images_seen, 1)
    fewer = min(int(short["batch_repetitions"]), repetitions)
    if fewer == repetitions and longer == 1:
        return flags
    epochs = math.ceil((recipe.train.epochs or 1) * longer * repetitions / fewer)
    repeat = f"--repeat {fewer} " if fewer < repetitions else ""
    return f"{repeat}--epochs {epochs} {flags}"


def _overfitting_advice(recipe: Recipe) -> str:
    remedy = "add images, or use --msda cutmix"
    if recipe.mix.msda != "none":
        remedy = "add images, or increase optimizer.weight_decay"
    return f"The network overfits (training accuracy near 100 %): {remedy}"


def _is_decreasing(losses: Sequence[float]) -> bool:
    """Check whether the last loss is the lowest, and clearly lower than those before the last part.

    A small decrease does not count, since every schedule lowers the learning rate at the end and
    the loss with it.
    """
    num_last = max(1, round(LAST_FRACTION * len(losses)))
    if len(losses) <= num_last:
        return False
    earlier = min(losses[:-num_last])
    return losses[-1] <= min(losses) and losses[-1] < (1 - MIN_DECREASE) * earlier
