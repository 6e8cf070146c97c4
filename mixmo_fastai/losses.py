"""The loss of a network with several members.

Shapes: B batch, M members, K classes.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, equation 4.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mixmo_fastai.errors import InputError


class MixMoLoss(nn.Module):
    """Weighted sum over members in training, the base loss of the ensemble in evaluation.

    With member predictions: L = reduce over the batch of Σ_i w_i · base(pred_i, target_i). It is a
    sum over members, so a training loss is about M times the validation loss; divide by M to
    compare them.

    With ensemble predictions it is the base loss and nothing else.

    Args:
        base: the loss of one member: a class instance with a `reduction` attribute (torch's, or
            fastai's), or a function with a `reduction` argument; cross-entropy where not given.
            Its `activation` and `decodes`, which fastai's inference asks for, carry over.

    Raises:
        InputError: `base` cannot give one loss per sample.
    """

    def __init__(self, base: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.base = _reducible(nn.CrossEntropyLoss() if base is None else base)

    @property
    def reduction(self) -> str:
        """How the losses of a batch become one number: "mean", "sum" or "none"."""
        return str(self.base.reduction)

    @reduction.setter
    def reduction(self, value: str) -> None:
        self.base.reduction = value

    def forward(
        self,
        pred: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        pasted_targets: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Images that were mixed inside a member have two targets. Cross-entropy is linear in the
        target, so their mixture needs no one-hot tensor: s · CE(target) + (1 - s) · CE(pasted).

        Args:
            pred: member logits (B, M, K), or ensemble logits (B, K) where `weights` is not given.
            targets: (B, M) classes or (B, M, K) soft; (B,) or (B, K) for ensemble logits.
            weights: (B, M) from `mixing.loss_weights`.
            pasted_targets: like `targets`, of the pasted images; None where nothing was pasted.
            shares: (B, M), the share of `targets`; goes with `pasted_targets`.

        Returns:
            A scalar, or (B,) where `reduction` is "none".
        """
        if weights is None:
            return self._base_for(pred, targets)(pred, targets)
        member_losses = self.member_losses(pred, targets)  # (B, M)
        if pasted_targets is not None and shares is not None:
            pasted_losses = self.member_losses(pred, pasted_targets)
            member_losses = shares * member_losses + (1 - shares) * pasted_losses
        losses = (weights * member_losses).sum(dim=1)  # (B,)
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.mean()

    def member_losses(self, pred: Tensor, targets: Tensor) -> Tensor:
        """Compute each member's own loss: (B, M, K) and targets -> (B, M)."""
        rows, row_targets = pred.flatten(0, 1), targets.flatten(0, 1)
        with self._unreduced():
            losses = self._base_for(rows, row_targets)(rows, row_targets)
        return losses.reshape(*pred.shape[:2], -1).mean(dim=2)

    def activation(self, pred: Tensor) -> Tensor:
        """Turn logits (B, K) into probabilities, as the base loss says; softmax by default."""
        own: Callable[[Tensor], Tensor] | None = getattr(self.base, "activation", None)
        return own(pred) if own else pred.softmax(dim=-1)

    def decodes(self, pred: Tensor) -> Tensor:
        """Turn probabilities or logits (B, K) into decisions; the likeliest class by default."""
        own: Callable[[Tensor], Tensor] | None = getattr(self.base, "decodes", None)
        return own(pred) if own else pred.argmax(dim=-1)

    def to(self, *args: Any, **kwargs: Any) -> "MixMoLoss":
        """Move class weights and the like; a base that is not a module is moved as well."""
        super().to(*args, **kwargs)
        if not isinstance(self.base, nn.Module) and hasattr(self.base, "to"):
            self.base.to(*args, **kwargs)
        return self

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        reduction, self.reduction = self.reduction, "none"
        try:
            yield
        finally:
            self.reduction = reduction

    def _base_for(self, pred: Tensor, targets: Tensor) -> Callable[..., Tensor]:
        # fastai's flattening losses take the classes of soft targets for samples.
        soft = targets.ndim == pred.ndim
        flattens_rows = getattr(self.base, "flatten", False) and getattr(self.base, "is_2d", False)
        base: Callable[..., Tensor] = self.base.func if soft and flattens_rows else self.base
        return base


class _FunctionLoss(nn.Module):
    """A loss function with a `reduction` argument, as an object with a `reduction` attribute."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.reduction = function, "mean"

    def forward(self, pred: Tensor, targets: Tensor) -> Tensor:
        return self.function(pred, targets, reduction=self.reduction)


def _reducible(base: Callable[..., Tensor]) -> Any:
    if hasattr(base, "reduction"):
        return base
    if "reduction" in inspect.signature(base).parameters:
        return _FunctionLoss(base)
    name = getattr(base, "__name__", type(base).__name__)
    raise InputError(
        f"The loss {name!r} cannot give one loss per sample, which MixMo needs to weigh members.\n"
        "Use a loss with a `reduction` attribute or argument, such as nn.CrossEntropyLoss()."
    )
