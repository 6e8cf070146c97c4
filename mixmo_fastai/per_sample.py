"""Per-sample losses of any loss function.

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
"""Divisor of the sum of a loss: the number of values, the number of samples, or one."""


class FunctionLoss(nn.Module):
    """Wrap a loss function with a `reduction` argument as a module with that attribute."""

    def __init__(self, function: Callable[..., Tensor], reduction: str) -> None:
        super().__init__()
        self.function, self.reduction = function, reduction

    def forward(self, pred: Tensor, targets: Tensor) -> Tensor:
        return self.function(pred, targets, reduction=self.reduction)


class BatchLoss(nn.Module):
    """Wrap a loss without `reduction` as a module with that attribute.

    "mean" returns the loss of the batch; "none" returns the per-sample losses (R,), each computed
    on a batch of one, and "sum" their sum.

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about batches of one and slow batching rules
            losses = self._losses_of_samples(pred.as_subclass(Tensor), targets.as_subclass(Tensor))
        return losses.sum() if self.reduction == "sum" else losses

    def _losses_of_samples(self, pred: Tensor, targets: Tensor) -> Tensor:
        def loss_of(sample: Tensor, target: Tensor) -> Tensor:
            return self.function(sample[None], target[None]).as_subclass(Tensor)

        if self.can_vmap:
            try:
                losses: Tensor = vmap(loss_of)(pred, targets)
                return losses
            except RuntimeError:  # for example, for branches that depend on values
                self.can_vmap = False
        return torch.stack([loss_of(*sample) for sample in zip(pred, targets, strict=True)])


def averages_of(whole: Tensor, values: Tensor) -> list[Average]:
    """Find the averages of per-sample losses that equal the loss of a batch.

    Args:
        whole: loss of the batch, a scalar.
        values: unreduced losses (R, k), k numbers per sample.

    Returns:
        the possible divisors; empty if the loss of the batch is not an average. Several are
        possible if they coincide for this batch or all losses are zero.
    """
    total, scale = values.sum(), values.abs().sum()
    # Rounding of sums in a different order.
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
    """Return a loss with a `reduction` attribute, wrapping it if it has none.

    Raises:
        InputError: `loss` is not callable.
    """
    if not callable(loss):
        raise InputError(f"loss_func must be a loss, such as nn.CrossEntropyLoss(); got {loss!r}.")
    if hasattr(loss, "reduction"):
        return loss
    try:
        argument = inspect.signature(loss).parameters.get("reduction")
    except ValueError:  # some builtins have no signature
        argument = None
    if argument is None:
        return BatchLoss(loss)
    return FunctionLoss(loss, argument.default if isinstance(argument.default, str) else "mean")
