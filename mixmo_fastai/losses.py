"""The loss of a network with several members.

Shapes: B batch, M members, K classes.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, equation 4.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.errors import InputError


class MixMoLoss(nn.Module):
    """Weighted sum over members in training, the base loss of the ensemble in evaluation.

    With member predictions: L = reduce over the batch of Σ_i w_i · base(pred_i, target_i). It is a
    sum over members, so a training loss is about M times the validation loss; divide by M to
    compare them. A mean over the batch is that of the base: cross-entropy with class weights, or
    with targets that it ignores, divides by the sum of the targets' weights.

    With ensemble predictions it is the base loss and nothing else.

    Args:
        base: the loss of one member: a class instance with a `reduction` attribute (torch's, or
            fastai's), or a function with a `reduction` argument; cross-entropy where not given.
            Its `activation` and `decodes`, which fastai's inference asks for, carry over. Torch's
            have none: those of cross-entropy are softmax and the likeliest class, those of binary
            cross-entropy of logits the sigmoid and 0.5, and others leave predictions as they are.

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
        if self.reduction == "sum":
            return losses.sum()
        counted = self._counted(targets, pred)
        return losses.mean() if counted is None else losses.sum() / counted

    def member_losses(self, pred: Tensor, targets: Tensor) -> Tensor:
        """Compute each member's own loss: (B, M, K) and targets -> (B, M)."""
        rows, row_targets = pred.flatten(0, 1), targets.flatten(0, 1)
        with self._unreduced():
            losses = self._base_for(rows, row_targets)(rows, row_targets)
        return losses.reshape(*pred.shape[:2], -1).mean(dim=2)

    def activation(self, pred: Tensor) -> Tensor:
        """Turn logits (B, K) into probabilities, as the base loss says."""
        own: Callable[[Tensor], Tensor] | None = getattr(self.base, "activation", None)
        if own is not None:
            return own(pred)
        if _is(self.base, nn.CrossEntropyLoss, F.cross_entropy):
            return pred.softmax(dim=-1)
        if is_multi_label(self.base):
            return pred.sigmoid()
        return pred

    def decodes(self, pred: Tensor) -> Tensor:
        """Turn probabilities (B, K) into decisions, as the base loss says."""
        own: Callable[[Tensor], Tensor] | None = getattr(self.base, "decodes", None)
        if own is not None:
            return own(pred)
        if _is(self.base, nn.CrossEntropyLoss, F.cross_entropy):
            return pred.argmax(dim=-1)
        if is_multi_label(self.base):
            return pred > 0.5
        return pred

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

    def _counted(self, targets: Tensor, pred: Tensor) -> Tensor | None:
        """Give by how much the base divides a batch of one member, its mean over the members.

        Returns:
            a scalar; None where that is the number of images.
        """
        if targets.is_floating_point() or targets.shape == pred.shape:
            return None  # of soft targets torch takes the plain mean
        weighs = _is(self.base, nn.CrossEntropyLoss, F.cross_entropy)
        if not weighs and not _is(self.base, nn.NLLLoss, F.nll_loss):
            return None
        settings = _settings(self.base)
        weight, ignored = settings.get("weight"), settings.get("ignore_index", -100)
        counts = targets != ignored
        if weight is not None:
            counts = counts * weight[targets.where(counts, 0).long()]
        counted: Tensor = counts.sum() / targets.shape[1]
        return counted

    def _base_for(self, pred: Tensor, targets: Tensor) -> Callable[..., Tensor]:
        # fastai's flattening losses take the classes of soft targets for samples.
        soft = targets.shape == pred.shape
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


def is_multi_label(base: Any) -> bool:
    """Tell whether a loss is binary cross-entropy of logits: several labels per image."""
    return _is(base, nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)


def _is(base: Any, kind: type[nn.Module], function: Callable[..., Tensor]) -> bool:
    """Tell whether a loss is one of torch's, as a module, in fastai's wrapper, or as a function."""
    inner = _inner(base)
    plain = inner.func if isinstance(inner, partial) else inner
    return isinstance(plain, kind) or plain is function


def _inner(base: Any) -> Any:
    if isinstance(base, _FunctionLoss):
        return base.function
    # fastai's flattening losses hold torch's.
    return getattr(base, "func", base) if hasattr(base, "is_2d") else base


def _settings(base: Any) -> dict[str, Any]:
    """Give the settings of a loss of torch's."""
    inner = _inner(base)
    if isinstance(inner, nn.Module):
        return {name: getattr(inner, name, None) for name in ("weight", "ignore_index")}
    return dict(inner.keywords) if isinstance(inner, partial) else {}


def _reducible(base: Callable[..., Tensor]) -> Any:
    if hasattr(base, "reduction"):
        return base
    if not callable(base):
        raise InputError(f"loss_func must be a loss, such as nn.CrossEntropyLoss(); got {base!r}.")
    if "reduction" in inspect.signature(base).parameters:
        return _FunctionLoss(base)
    name = getattr(base, "__name__", type(base).__name__)
    raise InputError(
        f"The loss {name!r} cannot give one loss per sample, which MixMo needs to weigh members.\n"
        "Use a loss with a `reduction` attribute or argument, such as nn.CrossEntropyLoss()."
    )
