"""Properties of the loss of a member, which may come from torch, fastai or a user.

Shapes: R samples, K classes.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.per_sample import BatchLoss, FunctionLoss


def is_cross_entropy(base: Any) -> bool:
    """Check whether a loss is cross-entropy of logits: one class per image."""
    return _is(base, nn.CrossEntropyLoss, F.cross_entropy)


def is_multi_label(base: Any) -> bool:
    """Check whether a loss is binary cross-entropy of logits: several labels per image."""
    return _is(base, nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)


def is_known(base: Any) -> bool:
    """Check whether a loss comes from torch or fastai, so that its averaging is known."""
    if isinstance(base, BatchLoss) or base.reduction not in {"mean", "sum", "none"}:
        return False
    return all(
        _module_of(loss).startswith(("torch.", "fastai."))
        for loss in (unwrap_loss(base), _inner(base))
    )


def unwrap_loss(base: Any) -> Any:
    """Return the loss that the user passed."""
    while isinstance(base, FunctionLoss | BatchLoss):
        base = base.function
    return base


def name_of(base: Any) -> str:
    """Return the name of a loss as the user wrote it."""
    loss = _unbound(unwrap_loss(base))
    return str(getattr(loss, "__name__", type(loss).__name__))


def mean_divisor(base: Any, targets: Tensor) -> Tensor | None:
    """Compute the divisor of the mean of a torch loss, for class indices (R,).

    Returns:
        a scalar; None if it is the number of samples.
    """
    if not is_cross_entropy(base) and not _is(base, nn.NLLLoss, F.nll_loss):
        return None
    settings = _settings(_inner(base))
    weight, ignored = settings.get("weight"), settings.get("ignore_index", -100)
    counts = targets != ignored
    if weight is not None:
        counts = counts * weight[targets.where(counts, 0).long()]
    divisor: Tensor = counts.sum()
    return divisor


def _settings(loss: Any) -> dict[str, Any]:
    if isinstance(loss, nn.Module):
        return {name: getattr(loss, name, None) for name in ("weight", "ignore_index")}
    return dict(loss.keywords) if isinstance(loss, partial) else {}


def smoothing_parts(base: Any) -> list[tuple[float, nn.Module]]:
    """Split fastai's label smoothing with class weights into two losses.

    Its class weights enter (1 - ε) · cross-entropy and the mean of that part, but not the part ε
    that is spread over all classes, so the two parts have different divisors.

    Returns:
        factors and losses whose weighted sum is the loss; empty for any other loss.
    """
    inner = _inner(base)
    is_fastais = _module_of(inner).startswith("fastai.") and type(inner).__name__ == _SMOOTHING
    if not is_fastais or inner.weight is None:
        return []
    uniform = nn.CrossEntropyLoss(label_smoothing=1.0, reduction=base.reduction)
    target = nn.CrossEntropyLoss(weight=inner.weight, reduction=base.reduction)
    return [(inner.eps, uniform), (1 - inner.eps, target)]


_SMOOTHING = "LabelSmoothingCrossEntropy"


def ignores_shifts(loss: Callable[..., Tensor], num_classes: int, device: torch.device) -> bool:
    """Check whether a classification loss is invariant to a shift of a sample's logits.

    Losses that depend on logits only through softmax, such as cross-entropy in a lambda, are
    invariant.

    Args:
        loss: predictions (R, K) and class indices (R,) -> a scalar.
        num_classes: K.
        device: device on which to evaluate the loss.
    """
    logits = torch.arange(2.0 * num_classes, device=device).mul(1.7).sin().view(2, num_classes)
    shifted = logits + torch.tensor([[1.0], [3.0]], device=device)
    targets = torch.arange(2, device=device) % num_classes
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            original, moved = (loss(each, targets) for each in (logits, shifted))
            return bool(original.isfinite().all()) and torch.allclose(original, moved, rtol=1e-4)
        except _UNSUITABLE:  # the loss does not accept class indices
            return False


_UNSUITABLE = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


def check_shapes(base: Any, pred: Tensor, targets: Tensor) -> None:
    """Check that an elementwise loss of torch would not broadcast; other losses pass.

    Args:
        base: any loss; elementwise ones are recognised also in fastai's flattening wrapper.
        pred: (R, …).
        targets: (R, …).

    Raises:
        InputError: predictions and targets differ in shape.
    """
    name = next((kind.__name__ for kind, f in _ELEMENTWISE.items() if _is(base, kind, f)), None)
    if name is None:
        return
    flattens = getattr(base, "flatten", False) and hasattr(base, "is_2d")
    if pred.numel() == targets.numel() if flattens else pred.shape == targets.shape:
        return
    advice = f"Pass targets {_shape(pred)}"
    if pred.ndim == targets.ndim + 1 and pred.shape[-1] == 1:
        advice += f", or flatten both: {_FLATTENING.get(name, f'BaseLoss(nn.{name}, is_2d=False)')}"
    elif not targets.is_floating_point():
        advice += ", or for one class per image use CrossEntropyLossFlat()"
    raise InputError(
        f"{name} is elementwise: predictions {_shape(pred)} do not match targets "
        f"{_shape(targets)}.\n{advice}."
    )


_ELEMENTWISE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.KLDivLoss: F.kl_div,
}
_FLATTENING = {
    "MSELoss": "MSELossFlat()",
    "L1Loss": "L1LossFlat()",
    "BCELoss": "BCELossFlat()",
    "BCEWithLogitsLoss": "BCEWithLogitsLossFlat()",
}
"""Losses of `fastai.losses` that flatten predictions and targets."""


def _shape(tensor: Tensor) -> str:
    """Format a shape with B for the number of samples, such as (B,) or (B, 3)."""
    sizes = ", ".join(map(str, tensor.shape[1:]))
    return f"(B, {sizes})" if sizes else "(B,)"


def _is(base: Any, kind: type[nn.Module], function: Callable[..., Tensor]) -> bool:
    """Check whether a loss is torch's `kind` or `function`, also in fastai's wrapper."""
    loss = _unbound(_inner(base))
    return isinstance(loss, kind) or loss is function


def _inner(base: Any) -> Any:
    loss = unwrap_loss(base)
    # fastai's flattening losses wrap torch losses.
    return getattr(loss, "func", loss) if hasattr(loss, "is_2d") else loss


def _unbound(loss: Any) -> Any:
    return loss.func if isinstance(loss, partial) else loss


def _module_of(loss: Any) -> str:
    """Return the name of the module that defines the code of a loss."""
    unbound = _unbound(loss)
    if inspect.isroutine(unbound):
        code: Any = unbound
    else:
        code = type(unbound).forward if isinstance(unbound, nn.Module) else type(unbound).__call__
    return str(getattr(code, "__module__", ""))
