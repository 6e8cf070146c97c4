"""The loss of a network with several members.

Shapes: B batch, M members, K classes.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, equation 4.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.base_losses import (
    check_shapes,
    classes_kept,
    is_known,
    is_multi_label,
    is_shift_invariant,
    label_range_error,
    loss_name,
    mean_divisor,
    smoothing_terms,
    target_weights,
    unwrap_loss,
    uses_softmax,
)
from mixmo_fastai.mixing.per_sample import (
    Average,
    BatchLoss,
    FunctionLoss,
    ensure_reduction,
    matching_averages,
)

__all__ = ["MixMoLoss", "is_multi_label"]

CHECKED_BATCHES = 10
"""Number of training batches on which a user's loss is compared with its per-sample losses."""


class MixMoLoss(nn.Module):
    """Weighted sum over members in training; base loss of the ensemble in evaluation.

    With member predictions, L = reduce over the batch of Σ_i w_i · base(pred_i, target_i). L is a
    sum over members, about M times a validation loss; `MixMoCallback` divides the loss that fastai
    records by M. The mean over the batch is computed as in the base: cross-entropy with class
    weights or ignored targets divides by the sum of the targets' weights.

    With ensemble predictions, L is exactly the base loss.

    If the base has no `reduction`, as for a lambda, the loss of each sample is computed as a batch
    of one by `torch.func.vmap`. A base that is not part of torch or fastai is checked on the first
    `CHECKED_BATCHES` batches: its loss must be the mean or the sum of the per-sample losses. If it
    is neither, the base is called once per member; this is exact if all samples of a batch have the
    same weights, and an error otherwise.

    Args:
        base: loss of one member: a loss of torch or fastai, or any function or module of
            predictions and targets; cross-entropy by default. Its `activation` and `decodes`, which
            fastai needs at inference, are used if it has them. Otherwise, cross-entropy, and any
            classification loss of yours that is invariant to a shift of a sample's logits, use
            softmax and argmax; binary cross-entropy of logits uses the sigmoid and a threshold of
            0.5; other losses return predictions unchanged.

    Raises:
        InputError: `base` is not callable; its samples cannot be weighted in training; predictions
            and targets of an elementwise loss differ in shape.

    Example:
        >>> pred, targets = torch.zeros(4, 2, 10), torch.zeros(4, 2, dtype=torch.int64)
        >>> MixMoLoss()(pred, targets, weights=torch.ones(4, 2))  # two members, log 10 each
        tensor(4.6052)
        >>> MixMoLoss()(pred.mean(dim=1), targets[:, 0])  # ensemble, log 10
        tensor(2.3026)
    """

    checks_left = 0
    averages: tuple[Average, ...] = get_args(Average)
    """Kinds of averaging that are consistent with all checked batches."""

    def __init__(self, base: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.base = ensure_reduction(nn.CrossEntropyLoss() if base is None else base)
        self.checks_left = 0 if is_known(self.base) else CHECKED_BATCHES

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base loss that this loss does not have, such as `thresh`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._parts().get("base")
            if name.startswith("__") or base is None or not hasattr(unwrap_loss(base), name):
                raise
            return getattr(unwrap_loss(base), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the base loss if only the base has it."""
        is_own = hasattr(type(self), name) or name in (parts := self._parts())
        base = None if is_own else parts.get("base")
        if base is not None and hasattr(unwrap_loss(base), name):
            setattr(unwrap_loss(base), name, value)
        else:
            super().__setattr__(name, value)

    def _parts(self) -> dict[str, Any]:
        """Return the attributes of this loss itself."""
        return {**vars(self), **vars(self).get("_modules", {})}

    @property
    def average(self) -> Average | None:
        """How the base averages over samples; None if it does not average."""
        return self.averages[0] if self.averages else None

    @property
    def reduction(self) -> str:
        """Reduction over the batch: "mean", "sum" or "none"."""
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
        own_weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        An image mixed by MSDA has two targets. Cross-entropy is linear in the target, so no one-hot
        mixture is needed: s · CE(target) + (1 - s) · CE(pasted).

        Args:
            pred: member logits (B, M, K), or ensemble logits (B, K) without `weights`.
            targets: (B, M) classes or (B, M, K) soft; (B,) or (B, K) for ensemble logits.
            weights: (B, M) from `mixing.loss_weights`.
            pasted_targets: targets of the pasted images, shaped like `targets`; None without MSDA.
            own_weights: s, (B, M), weight of `targets`; required with `pasted_targets`.

        Returns:
            A scalar, or (B,) if `reduction` is "none".

        Example:
            >>> pred = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log()  # (B, M, K)
            >>> targets, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 1.5]])
            >>> MixMoLoss()(pred, targets, weights)  # 0.5 · log 4/3 + 1.5 · log 2
            tensor(1.1836)
        """
        if weights is None:  # ensemble logits
            check_shapes(self.base, pred, targets)
            return self._base_loss(pred, targets)
        if terms := smoothing_terms(self.base):
            batch = pred, targets, weights, pasted_targets, own_weights
            return torch.stack([factor * MixMoLoss(term)(*batch) for factor, term in terms]).sum(0)
        if self.checks_left and self.reduction != "none":
            self._check_average(pred, targets)
        if self.average is None:
            return self._sum_over_members(pred, targets, weights, is_pasted=own_weights is not None)
        # The usual case.
        member_losses = self.member_losses(pred, targets)  # (B, M)
        divisor = self._divisor(targets, pred)
        if pasted_targets is not None:
            if own_weights is None:
                raise InputError("own_weights is required with pasted_targets.")
            pasted_losses = self.member_losses(pred, pasted_targets)
            member_losses = own_weights * member_losses + (1 - own_weights) * pasted_losses
            divisor = self._mixed_divisor(targets, pasted_targets, own_weights, divisor)
        losses = (weights * member_losses).sum(dim=1)  # (B,)
        return self._reduced(losses, divisor)

    def member_losses(self, pred: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each sample and member: (B, M, K) and targets -> (B, M).

        Example:
            >>> pred = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log()
            >>> MixMoLoss().member_losses(pred, torch.tensor([[0, 1]]))  # log 4/3 and log 2
            tensor([[0.2877, 0.6931]])
        """
        rows, row_targets = pred.flatten(0, 1), targets.flatten(0, 1)
        check_shapes(self.base, rows, row_targets)
        values = self._unreduced_losses(rows, row_targets).reshape(*pred.shape[:2], -1)
        is_mean = self.average == "values" and self.reduction != "sum"
        return values.mean(dim=2) if is_mean else values.sum(dim=2)

    def activation(self, pred: Tensor) -> Tensor:
        """Convert logits (B, K) to probabilities with the activation of the base loss.

        Example:
            >>> MixMoLoss().activation(torch.tensor([[3.0, 1.0]]).log())
            tensor([[0.7500, 0.2500]])
            >>> MixMoLoss(nn.MSELoss()).activation(torch.tensor([[3.0, 1.0]]))
            tensor([[3., 1.]])
        """
        activation: Callable[[Tensor], Tensor] | None = getattr(
            unwrap_loss(self.base), "activation", None
        )
        if activation is not None:
            return activation(pred)
        if self._uses_softmax(pred):
            return pred.softmax(dim=-1)
        if is_multi_label(self.base):
            return pred.sigmoid()
        return pred

    def decodes(self, pred: Tensor) -> Tensor:
        """Convert probabilities (B, K) to decisions with `decodes` of the base loss.

        Example:
            >>> MixMoLoss().decodes(torch.tensor([[0.75, 0.25]]))
            tensor([0])
            >>> MixMoLoss(nn.BCEWithLogitsLoss()).decodes(torch.tensor([[0.75, 0.25]]))
            tensor([[ True, False]])
        """
        decodes: Callable[[Tensor], Tensor] | None = getattr(
            unwrap_loss(self.base), "decodes", None
        )
        if decodes is not None:
            return decodes(pred)
        if self._uses_softmax(pred):
            return pred.argmax(dim=-1)
        if is_multi_label(self.base):
            return pred > 0.5
        return pred

    def to(self, *args: Any, **kwargs: Any) -> "MixMoLoss":
        """Move tensors such as class weights, including those of a base that is not a module.

        Example:
            >>> loss = MixMoLoss(nn.CrossEntropyLoss(weight=torch.ones(10))).to(torch.float64)
            >>> loss.base.weight.dtype
            torch.float64
        """
        super().to(*args, **kwargs)
        loss = unwrap_loss(self.base)
        if not isinstance(loss, nn.Module) and hasattr(loss, "to"):
            loss.to(*args, **kwargs)
        return self

    def _reduced(self, losses: Tensor, divisor: Tensor | None) -> Tensor:
        """Reduce losses (B,) over the batch as the base does, by its divisor from `_divisor`."""
        if self.reduction == "none":
            return losses
        if self.reduction == "sum" or self.average == "nothing":
            return losses.sum()
        return losses.mean() if divisor is None else losses.sum() / divisor

    def _unreduced_losses(self, rows: Tensor, row_targets: Tensor) -> Tensor:
        """Compute the unreduced base loss of samples (R, …): (R,) or (R, k)."""
        with self._without_reduction():
            return self._base_loss(rows, row_targets)

    def _check_average(self, pred: Tensor, targets: Tensor) -> None:
        """Determine whether and how the base averages over samples."""
        rows, row_targets = pred.flatten(0, 1), targets.flatten(0, 1)
        devices = [pred.device] if pred.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            batch_loss = self._base_loss(rows, row_targets).as_subclass(Tensor)
            if batch_loss.numel() == 1 and not batch_loss.isfinite():
                return  # training stops at a loss that is not finite
            try:
                losses = self._unreduced_losses(rows, row_targets)
                if len(rows) > 1 and losses.numel() == 1:  # the base ignores its reduction
                    self.base = BatchLoss(self.base)
                    losses = self._unreduced_losses(rows, row_targets)
            except (RuntimeError, ValueError, IndexError):  # the base rejects single samples
                losses = rows.new_full((len(rows),), torch.nan)
        self.checks_left -= 1
        divisor = self._divisor(targets, pred)
        if divisor is not None:
            batch_loss = batch_loss * divisor / len(targets)
        # One loss per sample or per predicted number; any other count results from broadcasting.
        is_valid = batch_loss.numel() == 1 and losses.numel() in {len(rows), rows.numel()}
        losses = losses.as_subclass(Tensor)
        matching = matching_averages(batch_loss, losses.reshape(len(rows), -1)) if is_valid else []
        self.averages = tuple(average for average in self.averages if average in matching)
        if not self.averages:
            self.checks_left = 0  # one counterexample suffices

    def _sum_over_members(
        self, pred: Tensor, targets: Tensor, weights: Tensor, *, is_pasted: bool
    ) -> Tensor:
        """Call a base that is not an average once for each member; return the weighted sum.

        Raises:
            InputError: weights differ within the batch, or predictions (B, 1) would be broadcast.
        """
        is_column = pred.ndim == targets.ndim + 1 and pred.shape[-1] == 1
        if is_column or is_pasted or not bool((weights == weights[:1]).all()):
            raise InputError(
                f"The loss {loss_name(self.base)!r} is not the mean or the sum of its samples' "
                "losses, so MixMo cannot weight them.\n"
                f"{_COLUMN_ADVICE if is_column else _WEIGHTS_ADVICE}"
            )
        losses = [
            weights[0, i] * self._base_loss(pred[:, i].contiguous(), targets[:, i].contiguous())
            for i in range(pred.shape[1])
        ]
        return torch.stack(losses).sum()

    def _uses_softmax(self, pred: Tensor) -> bool:
        if is_known(self.base):
            return uses_softmax(self.base)
        return pred.ndim == 2 and is_shift_invariant(self.base, pred.shape[1], pred.device)

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        reduction, self.reduction = self.reduction, "none"
        try:
            yield
        finally:
            self.reduction = reduction

    def _divisor(self, targets: Tensor, pred: Tensor) -> Tensor | None:
        """Compute the divisor of the base's mean for one member, averaged over the members.

        Returns:
            a scalar; None if it is the number of images.
        """
        if targets.shape == pred.shape:
            return None  # torch divides by the number of images if targets are soft
        divisor = mean_divisor(self.base, targets)
        return None if divisor is None else divisor / targets.shape[1]

    def _mixed_divisor(
        self, targets: Tensor, pasted_targets: Tensor, own_weights: Tensor, divisor: Tensor | None
    ) -> Tensor | None:
        """Return the divisor with the weights of both targets of each image, if classes have any.

        The arguments are those of `forward`, and the divisor of `targets` alone.
        """
        if divisor is None:
            return None
        own, pasted = (target_weights(self.base, each) for each in (targets, pasted_targets))
        if own is None or pasted is None or not own.is_floating_point():
            return divisor
        return (own_weights * own + (1 - own_weights) * pasted).sum() / targets.shape[1]

    def _base_loss(self, pred: Tensor, targets: Tensor) -> Tensor:
        """Compute the base loss, without fastai's flattening if targets are soft."""
        try:
            with classes_kept(self.base) if targets.shape == pred.shape else nullcontext():
                loss: Tensor = self.base(pred, targets)
        except IndexError as error:  # on a CPU; a GPU stops the process
            if found := re.fullmatch(r"Target (-?\d+) is out of bounds\.", str(error)):
                raise label_range_error(int(found[1]), pred.shape[-1]) from error
            raise
        return loss


_COLUMN_ADVICE = "Predictions are (B, 1) and targets (B,): reshape one of them in the loss."
_WEIGHTS_ADVICE = (
    "Use a loss such as nn.CrossEntropyLoss(), or equal weights for all samples: "
    "weight_root=float('inf'), msda=None."
)
_FunctionLoss = FunctionLoss  # its name in Learners exported by version 0.1.0
