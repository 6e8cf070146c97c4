"""Losses of recipes, by name.

To add a loss, write a function like those below, which returns a loss of logits (B, K) and class
indices (B,), and register it in `choices.LOSSES`. If it has an argument `weight`, it can be
weighted by class.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from fastai.losses import FocalLossFlat
from torch import Tensor, nn

from mixmo_fastai.config.choices import LOSSES
from mixmo_fastai.config.recipe import Loss
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, summarize_error, unknown_option_error


def cross_entropy(weight: Tensor | None = None, label_smoothing: float = 0.0) -> nn.Module:
    """Return cross-entropy.

    Args:
        weight: (K,), weights of the classes; None for equal ones.
        label_smoothing: fraction of each label that is spread over all classes.
    """
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing)


def focal(weight: Tensor | None = None, gamma: float = 2.0) -> Any:
    """Return the focal loss (Lin et al., ICCV 2017), (1 - p)^gamma times the cross-entropy.

    Args:
        weight: (K,), weights of the classes; None for equal ones.
        gamma: how much less well classified images count.
    """
    if not (isinstance(gamma, int | float) and gamma >= 0):
        raise InputError(f"gamma must be 0 or more; got {gamma!r}.")
    return FocalLossFlat(weight=weight, gamma=gamma)


def loss_from_recipe(settings: Loss, labels: Tensor, num_classes: int) -> Any:
    """Build the loss of one member from the section `[loss]` of a recipe.

    Args:
        settings: the section.
        labels: (N,), classes of the training images.
        num_classes: K.

    Raises:
        InputError: the loss has no such option or rejects it, or cannot be weighted by class.
    """
    build = resolve_registered("loss", settings.name, LOSSES[settings.name])
    options = dict(settings.options)
    if settings.label_smoothing:
        options["label_smoothing"] = settings.label_smoothing
    _check_options(settings.name, build, options)
    if settings.class_weights == "balanced":
        if "weight" not in _parameters(build):
            raise InputError(
                f"The loss {settings.name!r} has no weights of classes: its function lacks an "
                "argument weight.\nRemove loss.class_weights."
            )
        options["weight"] = balanced_weights(labels, num_classes)
    try:
        return build(**options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The loss {settings.name!r} rejects its options: {summarize_error(error)}."
        ) from error


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
    parameters = _parameters(build)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [each for each in parameters if each != "weight"]
    for option in options:
        if option not in allowed:
            raise unknown_option_error(f"The loss {name}", option, allowed)


def _parameters(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(build).parameters)
