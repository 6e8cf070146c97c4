"""Losses of recipes, by name.

To add a loss, write a function like those below, which returns a loss of logits (B, K) and class
indices (B,), and register it in `choices.LOSSES`. If it has an argument `weight`, it can be
weighted by class.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat
from torch import Tensor, nn

from mixmo_fastai.config.choices import LOSSES
from mixmo_fastai.config.recipe import Loss
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.errors import (
    InputError,
    parameter_names,
    summarize_error,
    unknown_option_error,
)
from mixmo_fastai.mixing.loss import MixMoLoss


def cross_entropy(weight: Tensor | None = None, label_smoothing: float = 0.0) -> nn.Module:
    """Return cross-entropy.

    Args:
        weight: (K,), weights of the classes; None for equal ones.
        label_smoothing: fraction of each label that is spread over all classes.
    """
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing)


class FocalLoss(nn.Module):
    """The focal loss (Lin et al., ICCV 2017): w · (1 - p)^gamma · -log p, averaged over images.

    p is the probability of an image's class, and w the weight of that class. Unlike fastai's
    `FocalLoss`, which replaces p by p^w, and has no finite gradient at p = 1 for gamma below 1.

    Args:
        weight: (K,), weights of the classes; None for equal ones.
        gamma: how much less well classified images count.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self, weight: Tensor | None = None, gamma: float = 2.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.gamma, self.reduction = gamma, reduction
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of logits (B, K) and classes (B,)."""
        cross_entropies = F.cross_entropy(logits, labels, reduction="none")
        others = -torch.expm1(-cross_entropies)  # 1 - p
        losses = others.clamp_min(torch.finfo(others.dtype).tiny) ** self.gamma * cross_entropies
        if self.weight is not None:
            losses = losses * self.weight[labels]
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.mean()


def focal(weight: Tensor | None = None, gamma: float = 2.0) -> nn.Module:
    """Return the focal loss; see `FocalLoss`."""
    if not (isinstance(gamma, int | float) and gamma >= 0):
        raise InputError(f"gamma must be 0 or more; got {gamma!r}.")
    return FocalLoss(weight, gamma)


def recipe_loss(settings: Loss, dls: DataLoaders) -> Any:
    """Build the loss of a recipe for its loaders, with one label per image or several.

    Returns:
        None for the default of `mixmo_learner`.

    Raises:
        InputError: see `loss_from_recipe`; or the loaders do not have what the settings need.
    """
    if getattr(dls.train, "is_multi_label", False):
        if settings != Loss():
            raise InputError(
                "The settings of [loss] are for one class per image; images with several labels "
                "are trained with binary cross-entropy.\nRemove them."
            )
        return BCEWithLogitsLossFlat()
    if settings == Loss():
        return None
    device = dls.device or torch.device("cpu")
    weights = partial(_class_weights, dls)
    return MixMoLoss(loss_from_recipe(settings, weights, device)).to(device)


def _class_weights(dls: DataLoaders) -> Tensor:
    if not isinstance(dls.train, BatchLoader):
        raise InputError(
            "loss.class_weights needs the loaders of make_dataloaders, which know all labels.\n"
            "Pass loss_func, such as CrossEntropyLossFlat(weight=weights)."
        )
    return balanced_weights(dls.train.images.labels, dls.c)


def loss_from_recipe(
    settings: Loss, class_weights: Callable[[], Tensor], device: torch.device | str = "cpu"
) -> Any:
    """Build the loss of one member from the section `[loss]` of a recipe.

    Args:
        settings: the section.
        class_weights: returns (K,), the weights for "balanced", such as `balanced_weights`.
        device: device of the weights.

    Raises:
        InputError: the loss has no such option or rejects it, cannot be weighted by class, or
            cannot be called.
    """
    build = resolve_registered("loss", settings.name, LOSSES[settings.name])
    if not callable(build):
        raise InputError(f"The loss {settings.name!r} must be a function; got {build!r}.")
    options = dict(settings.options)
    if settings.label_smoothing:
        options["label_smoothing"] = settings.label_smoothing
    _check_options(settings.name, build, options)
    if settings.class_weights == "balanced":
        if "weight" not in inspect.signature(build).parameters:
            raise InputError(
                f"The loss {settings.name!r} has no weights of classes: its function lacks an "
                "argument weight.\nRemove loss.class_weights."
            )
        options["weight"] = class_weights().to(device)
    try:
        loss = build(**options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The loss {settings.name!r} rejects its options: {summarize_error(error)}."
        ) from error
    if not callable(loss):
        raise InputError(
            f"The function of the loss {settings.name!r} must return a loss of logits and classes; "
            f"it returned {loss!r}."
        )
    return loss


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Compute weights with which all classes count equally: N / (K · n_c).

    Args:
        labels: (N,).
        num_classes: K.

    Returns:
        (K,) float32; 0 for a class without images. The mean weight of an image is 1 if no class is
        absent.

    Example:
        >>> balanced_weights(torch.tensor([0, 0, 0, 1]), num_classes=2)
        tensor([0.6667, 2.0000])
    """
    counts = labels.cpu().bincount(minlength=num_classes).double()
    weights = len(labels) / (num_classes * counts)
    return weights.where(counts > 0, torch.zeros(())).float()


def _check_options(name: str, build: Callable[..., Any], options: dict[str, Any]) -> None:
    if (parameters := parameter_names(build)) is None:
        return
    allowed = [each for each in parameters if each != "weight"]
    for option in options:
        if option not in allowed:
            raise unknown_option_error(f"The loss {name}", option, allowed)
