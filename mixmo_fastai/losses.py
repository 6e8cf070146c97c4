"""The loss of a network with several members.

Shapes: B batch, M members, K classes.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, equation 4.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mixmo_fastai.base_losses import (
    check_shapes,
    counted_by,
    given,
    ignores_shifts,
    is_cross_entropy,
    is_known,
    is_multi_label,
    name_of,
    smoothing_parts,
)
from mixmo_fastai.errors import InputError
from mixmo_fastai.per_sample import Average, BatchLoss, FunctionLoss, averages_of, reducible

__all__ = ["MixMoLoss", "is_multi_label"]

CHECKED_BATCHES = 10
"""Training batches on which a loss of unknown make is held against its samples' losses."""


class MixMoLoss(nn.Module):
    """Weighted sum over members in training, the base loss of the ensemble in evaluation.

    With member predictions: L = reduce over the batch of Σ_i w_i · base(pred_i, target_i). It is a
    sum over members, about M times a validation loss; `MixMoCallback` divides what fastai records.
    A mean over the batch is that of the base: cross-entropy with class weights, or with targets
    that it ignores, divides by the sum of the targets' weights.

    With ensemble predictions it is the base loss and nothing else.

    A base without a choice of reduction, such as a lambda, is asked for the loss of each sample as
    a batch of its own, by `torch.func.vmap`. A base that neither torch nor fastai has written is
    checked on the first `CHECKED_BATCHES` batches: its loss must be the mean or the sum of its
    samples' losses. Otherwise it is called once per member, which is exact when the weights are the
    same throughout the batch, or refused.

    Args:
        base: the loss of one member: torch's, fastai's, or any function or module of predictions
            and targets; cross-entropy when not given. Its `activation` and `decodes`, which
            fastai's inference needs, carry over. Without them, cross-entropy, and any loss of
            classes that does not change when all logits of a sample grow alike, has softmax and the
            most likely class; binary cross-entropy of logits has the sigmoid and 0.5; others leave
            predictions as they are.

    Raises:
        InputError: `base` is not callable; in training, its samples cannot be weighted; predictions
            and targets of a loss that compares number by number differ in shape.
    """

    checks_left = 0
    averages: tuple[Average, ...] = get_args(Average)
    """Ways of averaging that hold on all checked batches."""

    def __init__(self, base: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.base = reducible(nn.CrossEntropyLoss() if base is None else base)
        self.checks_left = 0 if is_known(self.base) else CHECKED_BATCHES

    @property
    def average(self) -> Average | None:
        """How the base averages over its samples; None if it does not."""
        return self.averages[0] if self.averages else None

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
            check_shapes(self.base, pred, targets)
            return self._base_for(pred, targets)(pred, targets)
        if parts := smoothing_parts(self.base):
            batch = pred, targets, weights, pasted_targets, shares
            return torch.stack([factor * MixMoLoss(part)(*batch) for factor, part in parts]).sum(0)
        if self.checks_left and self.reduction != "none":
            self._check_average(pred, targets)
        if self.average is None:
            return self._sum_of_members(pred, targets, weights, is_pasted=shares is not None)
        member_losses = self.member_losses(pred, targets)  # (B, M)
        if pasted_targets is not None and shares is not None:
            pasted_losses = self.member_losses(pred, pasted_targets)
            member_losses = shares * member_losses + (1 - shares) * pasted_losses
        losses = (weights * member_losses).sum(dim=1)  # (B,)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum" or self.average == "nothing":
            return losses.sum()
        counted = self._counted(targets, pred)
        return losses.mean() if counted is None else losses.sum() / counted

    def member_losses(self, pred: Tensor, targets: Tensor) -> Tensor:
        """Compute each member's own loss: (B, M, K) and targets -> (B, M)."""
        rows, row_targets = pred.flatten(0, 1), targets.flatten(0, 1)
        check_shapes(self.base, rows, row_targets)
        values = self._values(rows, row_targets).reshape(*pred.shape[:2], -1)
        is_mean = self.average == "values" and self.reduction != "sum"
        return values.mean(dim=2) if is_mean else values.sum(dim=2)

    def activation(self, pred: Tensor) -> Tensor:
        """Turn logits (B, K) into probabilities, as the base loss says."""
        own: Callable[[Tensor], Tensor] | None = getattr(given(self.base), "activation", None)
        if own is not None:
            return own(pred)
        if self._is_of_softmax(pred):
            return pred.softmax(dim=-1)
        if is_multi_label(self.base):
            return pred.sigmoid()
        return pred

    def decodes(self, pred: Tensor) -> Tensor:
        """Turn probabilities (B, K) into decisions, as the base loss says."""
        own: Callable[[Tensor], Tensor] | None = getattr(given(self.base), "decodes", None)
        if own is not None:
            return own(pred)
        if self._is_of_softmax(pred):
            return pred.argmax(dim=-1)
        if is_multi_label(self.base):
            return pred > 0.5
        return pred

    def to(self, *args: Any, **kwargs: Any) -> "MixMoLoss":
        """Move class weights and the like; a base that is not a module is moved as well."""
        super().to(*args, **kwargs)
        own = given(self.base)
        if not isinstance(own, nn.Module) and hasattr(own, "to"):
            own.to(*args, **kwargs)
        return self

    def _values(self, rows: Tensor, row_targets: Tensor) -> Tensor:
        """Compute the base loss without reduction, of samples (R, …): (R,) or (R, k)."""
        with self._unreduced():
            values: Tensor = self._base_for(rows, row_targets)(rows, row_targets)
        return values

    def _check_average(self, pred: Tensor, targets: Tensor) -> None:
        """Find how the base averages over the samples; None if any batch shows that it does not."""
        rows, row_targets = pred.flatten(0, 1), targets.flatten(0, 1)
        devices = [pred.device] if pred.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            whole = self._base_for(rows, row_targets)(rows, row_targets).as_subclass(Tensor)
            if whole.numel() == 1 and not whole.isfinite():
                return  # training ends for another reason
            try:
                values = self._values(rows, row_targets)
                if len(rows) > 1 and values.numel() == 1:  # the base ignores its reduction
                    self.base = BatchLoss(self.base)
                    values = self._values(rows, row_targets)
            except (RuntimeError, ValueError, IndexError):  # one sample is too few for it
                values = rows.new_full((len(rows),), torch.nan)
        self.checks_left -= 1
        counted = self._counted(targets, pred)
        if counted is not None:
            whole = whole * counted / len(targets)
        # As many values as samples, or as predicted numbers; others have been broadcast.
        fits = whole.numel() == 1 and values.numel() in {len(rows), rows.numel()}
        values = values.as_subclass(Tensor)
        found = averages_of(whole, values.reshape(len(rows), -1)) if fits else []
        self.averages = tuple(average for average in self.averages if average in found)
        if not self.averages:
            self.checks_left = 0  # a batch on which it looks like an average proves nothing

    def _sum_of_members(
        self, pred: Tensor, targets: Tensor, weights: Tensor, *, is_pasted: bool
    ) -> Tensor:
        """Call a base that is no average once per member, which must have one weight each.

        Raises:
            InputError: weights differ within the batch, or the base broadcasts a column.
        """
        is_column = pred.ndim == targets.ndim + 1 and pred.shape[-1] == 1
        if is_column or is_pasted or not bool((weights == weights[:1]).all()):
            raise InputError(
                f"The loss {name_of(self.base)!r} is not the mean or the sum of its samples' "
                f"losses, so MixMo cannot weight them.\n{_COLUMN if is_column else _UNLIKE}"
            )
        losses = [
            weights[0, i] * self.base(pred[:, i].contiguous(), targets[:, i].contiguous())
            for i in range(pred.shape[1])
        ]
        return torch.stack(losses).sum()

    def _is_of_softmax(self, pred: Tensor) -> bool:
        if is_known(self.base):
            return is_cross_entropy(self.base)
        return pred.ndim == 2 and ignores_shifts(self.base, pred.shape[1], pred.device)

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        reduction, self.reduction = self.reduction, "none"
        try:
            yield
        finally:
            self.reduction = reduction

    def _counted(self, targets: Tensor, pred: Tensor) -> Tensor | None:
        """Give by how much the base divides a batch of one member, its mean over the members.

        Returns:
            a scalar; None where that is the number of images.
        """
        if targets.is_floating_point() or targets.shape == pred.shape:
            return None  # of soft targets torch takes the plain mean
        counted = counted_by(self.base, targets)
        return None if counted is None else counted / targets.shape[1]

    def _base_for(self, pred: Tensor, targets: Tensor) -> Callable[..., Tensor]:
        # fastai's flattening losses take the classes of soft targets for samples.
        soft = targets.shape == pred.shape
        flattens_rows = getattr(self.base, "flatten", False) and getattr(self.base, "is_2d", False)
        base: Callable[..., Tensor] = self.base.func if soft and flattens_rows else self.base
        return base


_COLUMN = "Predictions are (B, 1) and targets (B,): let the loss give both one shape."
_UNLIKE = (
    "Use a loss that is, such as nn.CrossEntropyLoss(), or give all samples equal weights: "
    "weight_root=float('inf'), msda=None."
)
_FunctionLoss = FunctionLoss  # its name in Learners that version 0.1.0 has exported
