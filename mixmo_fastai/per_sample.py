"""Losses of single samples, from whatever loss a user has.

Shapes: R samples, K classes.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import vmap

from mixmo_fastai.errors import InputError

Average = Literal["values", "samples", "nothing"]
"""What a loss divides the sum of its values by: all of them, the samples, or nothing."""


class FunctionLoss(nn.Module):
    """A loss function with a `reduction` argument, as an object with a `reduction` attribute."""

    def __init__(self, function: Callable[..., Tensor], reduction: str) -> None:
        super().__init__()
        self.function, self.reduction = function, reduction

    def forward(self, pred: Tensor, targets: Tensor) -> Tensor:
        return self.function(pred, targets, reduction=self.reduction)


class BatchLoss(nn.Module):
    """A loss without a choice of reduction, as an object with a `reduction` attribute.

    "mean" returns what the loss gives for the batch; "none" returns the losses (R,) of the samples,
    each taken as a batch of its own, and "sum" their sum.

    Args:
        function: (R, …) predictions and (R, …) targets -> a scalar.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.reduction = function, "mean"
        self.can_vmap = True

    def forward(self, pred: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "mean":
            return self.function(pred, targets)
        with (
            warnings.catch_warnings()
        ):  # of what the loss makes of one sample, and of slow batching
            warnings.simplefilter("ignore")
            losses = self._losses_of_samples(pred.as_subclass(Tensor), targets.as_subclass(Tensor))
        return losses.sum() if self.reduction == "sum" else losses

    def _losses_of_samples(self, pred: Tensor, targets: Tensor) -> Tensor:
        def loss_of(sample: Tensor, target: Tensor) -> Tensor:
            return self.function(sample[None], target[None]).as_subclass(Tensor)

        if self.can_vmap:
            try:
                losses: Tensor = vmap(loss_of)(pred, targets)
                return losses
            except RuntimeError:  # such as for branches that depend on values
                self.can_vmap = False
        return torch.stack([loss_of(*sample) for sample in zip(pred, targets, strict=True)])


def averages_of(whole: Tensor, values: Tensor) -> list[Average]:
    """Find how the loss of a batch may follow from the losses of its samples.

    Args:
        whole: loss of the batch, a scalar.
        values: unreduced losses (R, k), k numbers per sample.

    Returns:
        what their sum may be divided by; empty when the batch's loss is no such average. There are
        several when they are equal here, or all losses are zero.
    """
    total, scale = values.sum(), values.abs().sum()
    # Sums of the same numbers in another order, in the precision at hand.
    tolerance = torch.finfo(whole.dtype).eps ** 0.5
    divisors: dict[Average, int] = {
        "values": values.numel(),
        "samples": len(values),
        "nothing": 1,
    }
    return [
        average
        for average, divisor in divisors.items()
        if (whole - total / divisor).abs() <= tolerance * scale / divisor
    ]


def reducible(loss: Callable[..., Tensor]) -> Any:
    """Return a loss with a `reduction` attribute: the loss itself, or around it.

    Raises:
        InputError: it is not callable.
    """
    if not callable(loss):
        raise InputError(f"loss_func must be a loss, such as nn.CrossEntropyLoss(); got {loss!r}.")
    if hasattr(loss, "reduction"):
        return loss
    try:
        argument = inspect.signature(loss).parameters.get("reduction")
    except ValueError:  # of some that are not written in Python
        argument = None
    if argument is None:
        return BatchLoss(loss)
    return FunctionLoss(loss, argument.default if isinstance(argument.default, str) else "mean")
