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
"""What a loss divides its sum by: the number of values, the number of samples, or nothing."""


class FunctionLoss(nn.Module):
    """Wrap a loss function with a `reduction` argument as a module with that attribute.

    Example:
        >>> loss = FunctionLoss(nn.functional.l1_loss, reduction="none")
        >>> loss(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor([1., 3.])
    """

    def __init__(self, function: Callable[..., Tensor], reduction: str) -> None:
        super().__init__()
        self.function, self.reduction = function, reduction

    def forward(self, pred: Tensor, targets: Tensor) -> Tensor:
        return self.function(pred, targets, reduction=self.reduction)


class BatchLoss(nn.Module):
    """Wrap a loss without `reduction` as a module with that attribute.

    "mean" returns the loss of the batch. "none" returns the per-sample losses (R,), each computed
    on a batch of one; "sum" returns their sum.

    Args:
        function: (R, …) predictions and (R, …) targets -> a scalar.

    Example:
        >>> loss = BatchLoss(lambda pred, targets: (pred - targets).square().mean())
        >>> loss(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor(5.)
        >>> loss.reduction = "none"
        >>> loss(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor([1., 9.])
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.reduction = function, "mean"
        self.can_vmap = True

    def forward(self, pred: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "mean":
            return self.function(pred, targets)
        with warnings.catch_warnings():
            # torch warns about batches of one and about slow batching rules.
            warnings.simplefilter("ignore")
            losses = self._per_sample_losses(pred.as_subclass(Tensor), targets.as_subclass(Tensor))
        return losses.sum() if self.reduction == "sum" else losses

    def _per_sample_losses(self, pred: Tensor, targets: Tensor) -> Tensor:
        def sample_loss(sample: Tensor, target: Tensor) -> Tensor:
            return self.function(sample[None], target[None]).as_subclass(Tensor)

        if self.can_vmap:
            try:
                losses: Tensor = vmap(sample_loss)(pred, targets)
                return losses
            except RuntimeError:  # for example, if branches depend on values
                self.can_vmap = False
        return torch.stack([sample_loss(*sample) for sample in zip(pred, targets, strict=True)])


def matching_averages(batch_loss: Tensor, losses: Tensor) -> list[Average]:
    """Find the kinds of averaging that reproduce the loss of a batch from unreduced losses.

    Args:
        batch_loss: loss of the batch, a scalar.
        losses: unreduced losses (R, k), k values per sample.

    Returns:
        the matching kinds; empty if the batch loss is not an average. Several match if their
        divisors are equal for this batch or all losses are zero.

    Example:
        >>> losses = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # two samples, two values each
        >>> matching_averages(torch.tensor(4.0), losses)  # 16 / 4
        ['values']
        >>> matching_averages(torch.tensor(8.0), losses)  # 16 / 2
        ['samples']
    """
    total, scale = losses.sum(), losses.abs().sum()
    # Sums in another order differ by rounding.
    tolerance = torch.finfo(batch_loss.dtype).eps ** 0.5
    divisors: dict[Average, int] = {
        "values": losses.numel(),
        "samples": len(losses),
        "nothing": 1,
    }
    return [
        average
        for average, divisor in divisors.items()
        if (batch_loss - total / divisor).abs() <= tolerance * scale / divisor
    ]


def ensure_reduction(loss: Callable[..., Tensor]) -> Any:
    """Return a loss with a `reduction` attribute, wrapping it if it has none.

    Raises:
        InputError: `loss` is not callable.

    Example:
        >>> ensure_reduction(nn.CrossEntropyLoss())
        CrossEntropyLoss()
        >>> ensure_reduction(lambda pred, targets: (pred - targets).abs().mean()).reduction
        'mean'
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
