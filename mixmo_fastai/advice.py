"""At most one line of advice after a training, from its history. Standard library only.

The test set has no part in it.
"""

import math
from collections.abc import Mapping, Sequence

from mixmo_fastai.recipe import Recipe
from mixmo_fastai.sizing import (
    ENOUGH_IMAGES_SEEN,
    ENOUGH_WIDTH,
    MOST_VIEWS,
    narrow_network,
    too_small_for_members,
)

GOOD_ACCURACY = 0.95
"""Of the validation split, from which on nothing is advised."""
LOW_LOSS = 0.1
"""Of training: the true class has a probability of 0.9 (geometric mean), so that the accuracy on
training images is near 100 %."""
FAR_BELOW = 0.85
"""The validation accuracy below which that is overfitting."""
LAST_SHARE = 0.25
"""Part of the epochs, at the end, in which a falling validation loss is looked for."""
STILL_FALLING = 0.05
"""Part of the validation loss that falls in it at least."""


def advise(recipe: Recipe, history: Sequence[Mapping[str, str]], images_seen: int) -> str | None:
    """Say what the curves of a finished training call for, if anything.

    In this order: several members in a network or training that is too small for them, overfitting,
    a validation loss that is still falling.

    Args:
        recipe: of the run, with nothing left open.
        history: rows of history.csv; of a deep ensemble, of one of its networks.
        images_seen: by one network in all of its training.
    """
    rows = [row for row in history if row.get("valid_loss")]
    if not rows:
        return None
    accuracy, train_loss = float(rows[-1]["accuracy"]), float(rows[-1]["train_loss"])
    if accuracy >= GOOD_ACCURACY:
        return None
    if too_small_for_members(recipe, images_seen):
        return _too_small(recipe, images_seen)
    if train_loss <= LOW_LOSS and accuracy < FAR_BELOW:
        return _overfit(recipe)
    if _is_falling([float(row["valid_loss"]) for row in rows]):
        epochs = recipe.train.epochs or len(rows)
        return f"The validation loss was still falling: train longer, as with --epochs {2 * epochs}"
    return None


def members_advice(recipe: Recipe, lacks: str) -> str:
    """Return the advice before training if several members lack something.

    Args:
        recipe: decided.
        lacks: of `sizing.too_small_for_members`.
    """
    members = recipe.model.num_members
    return f"{members} members pay from {lacks}; below, --members 1 is usually more accurate"


def _too_small(recipe: Recipe, images_seen: int) -> str:
    """Return the advice after a training that was too small for several members."""
    members, changes = recipe.model.num_members, []
    if images_seen < ENOUGH_IMAGES_SEEN:
        epochs = math.ceil((recipe.train.epochs or 1) * ENOUGH_IMAGES_SEEN / max(images_seen, 1))
        if epochs * recipe.mix.batch_repetitions > MOST_VIEWS:
            return f"{members} members need more training images than these: take --members 1"
        changes.append(f"--epochs {epochs}")
    if narrow := narrow_network(recipe):
        changes.append(f"--arch wrn{narrow.depth}_{ENOUGH_WIDTH}")
    return (
        f"Compare with --members 1, or train {members} members with {' '.join(changes)} "
        "(docs/recipes.md)"
    )


def _overfit(recipe: Recipe) -> str:
    remedy = "get more images, or take --msda cutmix"
    if recipe.mix.msda != "none":
        remedy = "get more images, or raise optimizer.weight_decay"
    return f"Training accuracy is near 100 %, validation accuracy far below: {remedy}"


def _is_falling(losses: Sequence[float]) -> bool:
    """Tell whether the loss fell to its lowest in the last part of training.

    Every schedule lowers the rate there, and the loss falls a little with it, so that little does
    not count.
    """
    last = max(1, round(LAST_SHARE * len(losses)))
    if len(losses) <= last:
        return False
    before = min(losses[:-last])
    return losses[-1] <= min(losses) and losses[-1] < (1 - STILL_FALLING) * before
