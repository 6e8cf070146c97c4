"""Properties of a member's loss, which may come from torch, fastai or the user.

Shapes: R samples, K classes.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.per_sample import BatchLoss, FunctionLoss


def is_cross_entropy(base: Any) -> bool:
    """Check whether a loss is cross-entropy of logits: one class per image.

    Example:
        >>> is_cross_entropy(nn.CrossEntropyLoss()), is_cross_entropy(nn.MSELoss())
        (True, False)
    """
    return _is_loss(base, nn.CrossEntropyLoss, F.cross_entropy)


def uses_softmax(base: Any) -> bool:
    """Check whether a loss of torch or fastai is one of the softmax of logits.

    Example:
        >>> from fastai.losses import FocalLoss
        >>> uses_softmax(FocalLoss()), uses_softmax(nn.NLLLoss())
        (True, False)
    """
    loss = type(_torch_loss(base))
    return is_cross_entropy(base) or (loss.__module__, loss.__name__) == _FOCAL_LOSS


_FOCAL_LOSS = ("fastai.losses", "FocalLoss")


def is_multi_label(base: Any) -> bool:
    """Check whether a loss is binary cross-entropy of logits: several labels per image.

    Example:
        >>> is_multi_label(nn.BCEWithLogitsLoss()), is_multi_label(nn.CrossEntropyLoss())
        (True, False)
    """
    return _is_loss(base, nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)


def is_known(base: Any) -> bool:
    """Check whether a loss comes from torch or fastai, so that its averaging is known.

    Example:
        >>> class MyLoss(nn.CrossEntropyLoss):
        ...     def forward(self, pred, targets):
        ...         return super().forward(pred, targets).square()
        >>> is_known(nn.CrossEntropyLoss()), is_known(MyLoss())
        (True, False)
    """
    if isinstance(base, BatchLoss) or base.reduction not in {"mean", "sum", "none"}:
        return False
    return all(
        _module_of(loss).startswith(("torch.", "fastai."))
        for loss in (unwrap_loss(base), _torch_loss(base))
    )


def unwrap_loss(base: Any) -> Any:
    """Return the loss that the user passed, without the wrappers of `per_sample`.

    Example:
        >>> unwrap_loss(FunctionLoss(F.l1_loss, "mean")) is F.l1_loss
        True
    """
    while isinstance(base, FunctionLoss | BatchLoss):
        base = base.function
    return base


def loss_name(base: Any) -> str:
    """Return the name of the function or class of a loss, such as MSELoss for fastai's wrapper.

    Example:
        >>> loss_name(nn.MSELoss()), loss_name(FunctionLoss(F.l1_loss, "mean"))
        ('MSELoss', 'l1_loss')
    """
    loss = _unwrap_partial(unwrap_loss(base))
    if type(loss).__name__ == "BaseLoss":  # what fastai's MSELossFlat() and others return
        loss = _unwrap_partial(_torch_loss(loss))
    return str(getattr(loss, "__name__", type(loss).__name__))


def ignored_target(base: Any) -> int:
    """Return the class index that a loss ignores, -100 unless it is set.

    Example:
        >>> ignored_target(nn.CrossEntropyLoss(ignore_index=255)), ignored_target(nn.MSELoss())
        (255, -100)
    """
    value = _loss_arguments(_torch_loss(base)).get("ignore_index")
    return -100 if value is None else int(value)


def label_range_error(label: int, num_classes: int) -> InputError:
    """Build the error for a class index that no output of the network stands for.

    Example:
        >>> str(label_range_error(4, num_classes=4)).splitlines()[0]
        'Labels must be from 0 to 3, as the network has 4 outputs; got 4.'
    """
    return InputError(
        f"Labels must be from 0 to {num_classes - 1}, as the network has {num_classes} outputs; "
        f"got {label}.\nNumber the classes from 0, or build the network for more classes."
    )


def mean_divisor(base: Any, targets: Tensor) -> Tensor | None:
    """Compute the divisor of the mean of a torch loss, for class indices of any shape.

    Returns:
        a scalar; None if it is the number of targets.

    Example:
        >>> targets = torch.tensor([0, 1, 1])
        >>> mean_divisor(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), targets)  # 1 + 3 + 3
        tensor(7.)
        >>> mean_divisor(nn.MSELoss(), targets) is None
        True
    """
    weights = target_weights(base, targets)
    return None if weights is None else weights.sum()


def target_weights(base: Any, targets: Tensor) -> Tensor | None:
    """Compute the weights whose sum is the divisor of the mean of a torch loss.

    Args:
        base: the loss.
        targets: class indices of any shape.

    Returns:
        the weight of each target, or whether it counts without weights of classes; None for a
        loss that is averaged over all targets.

    Example:
        >>> targets = torch.tensor([0, 1, 1])
        >>> target_weights(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), targets)
        tensor([1., 3., 3.])
        >>> target_weights(nn.MSELoss(), targets) is None
        True
    """
    if not is_cross_entropy(base) and not _is_loss(base, nn.NLLLoss, F.nll_loss):
        return None
    arguments = _loss_arguments(_torch_loss(base))
    class_weights, ignored = arguments.get("weight"), arguments.get("ignore_index", -100)
    weights: Tensor = targets != ignored
    if class_weights is not None:
        weights = weights * class_weights[targets.where(weights, 0).long()]
    return weights


def _loss_arguments(loss: Any) -> dict[str, Any]:
    """Return the keyword arguments of a loss module or of a `partial` of a loss function."""
    if isinstance(loss, nn.Module):
        return {name: getattr(loss, name, None) for name in ("weight", "ignore_index")}
    return dict(loss.keywords) if isinstance(loss, partial) else {}


def smoothing_terms(base: Any) -> list[tuple[float, nn.Module]]:
    """Split fastai's label smoothing with class weights into two losses.

    fastai applies the class weights to the term (1 - ε) · cross-entropy and to the divisor of its
    mean, but not to the uniform term with the factor ε, so the two terms have different divisors.

    Returns:
        factors and losses whose weighted sum is the loss; empty for any other loss.

    Example:
        >>> from fastai.losses import LabelSmoothingCrossEntropy
        >>> loss = LabelSmoothingCrossEntropy(eps=0.25, weight=torch.ones(2))
        >>> [factor for factor, _ in smoothing_terms(loss)]  # uniform term, true class
        [0.25, 0.75]
        >>> smoothing_terms(nn.CrossEntropyLoss())
        []
    """
    loss = _torch_loss(base)
    is_smoothing = type(loss).__name__ == "LabelSmoothingCrossEntropy" and is_known(base)
    if not is_smoothing or loss.weight is None:
        return []
    uniform = nn.CrossEntropyLoss(label_smoothing=1.0, reduction=base.reduction)
    target = nn.CrossEntropyLoss(weight=loss.weight, reduction=base.reduction)
    return [(loss.eps, uniform), (1 - loss.eps, target)]


def is_shift_invariant(loss: Callable[..., Tensor], num_classes: int, device: torch.device) -> bool:
    """Check whether a classification loss is invariant to a shift of a sample's logits.

    Losses that depend on the logits only through softmax are invariant, such as cross-entropy in a
    lambda.

    Args:
        loss: predictions (R, K) and class indices (R,) -> a scalar.
        num_classes: K.
        device: device on which to evaluate the loss.

    Example:
        >>> is_shift_invariant(nn.CrossEntropyLoss(), num_classes=3, device=torch.device("cpu"))
        True
        >>> is_shift_invariant(lambda pred, _: pred.mean(), 3, torch.device("cpu"))
        False
    """
    logits = torch.arange(2.0 * num_classes, device=device).mul(1.7).sin().view(2, num_classes)
    shifted = logits + torch.tensor([[1.0], [3.0]], device=device)
    targets = torch.arange(2, device=device) % num_classes
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            original, of_shifted = loss(logits, targets), loss(shifted, targets)
            return bool(original.isfinite().all()) and torch.allclose(
                original, of_shifted, rtol=1e-4
            )
        except _TARGET_ERRORS:  # the loss does not accept class indices
            return False


_TARGET_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


def check_shapes(base: Any, pred: Tensor, targets: Tensor) -> None:
    """Check that an elementwise loss of torch would not broadcast; do not check other losses.

    Args:
        base: any loss; elementwise losses are recognised in fastai's flattening wrapper too.
        pred: (R, …).
        targets: (R, …).

    Raises:
        InputError: predictions and targets differ in shape.

    Example:
        >>> check_shapes(nn.MSELoss(), torch.zeros(4, 1), torch.zeros(4, 1))
        >>> check_shapes(nn.MSELoss(), torch.zeros(4, 1), torch.zeros(4))
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: MSELoss is elementwise: predictions (B, 1) do not match ...
    """
    kinds = (kind for kind, function in _ELEMENTWISE.items() if _is_loss(base, kind, function))
    kind = next(kinds, None)
    if kind is None:
        return
    name = kind.__name__
    wrapper = unwrap_loss(base)
    flattens = is_wrapper(wrapper) and wrapper.flatten and not wrapper.is_2d
    if pred.numel() == targets.numel() if flattens else pred.shape == targets.shape:
        return
    advice = f"Pass targets {_format_shape(pred)}"
    if pred.ndim == targets.ndim + 1 and pred.shape[-1] == 1:
        advice += f", or flatten both: {_FLATTENING.get(name, f'BaseLoss(nn.{name}, is_2d=False)')}"
    elif not targets.is_floating_point():
        advice += ", or for one class per image use CrossEntropyLossFlat()"
    raise InputError(
        f"{name} is elementwise: predictions {_format_shape(pred)} do not match targets "
        f"{_format_shape(targets)}.\n{advice}."
    )


def is_wrapper(base: Any) -> bool:
    """Check whether a loss is fastai's flattening wrapper of a torch loss, or derived from it.

    Example:
        >>> from fastai.losses import CrossEntropyLossFlat
        >>> is_wrapper(CrossEntropyLossFlat()), is_wrapper(nn.CrossEntropyLoss())
        (True, False)
    """
    names = ((each.__module__, each.__name__) for each in type(base).__mro__)
    # A derived class may have an `__init__` that leaves these out.
    has_attributes = all(hasattr(base, name) for name in ("func", "flatten", "is_2d"))
    return has_attributes and ("fastai.losses", "BaseLoss") in names


@contextmanager
def classes_kept(base: Any) -> Iterator[None]:
    """Let fastai's flattening wrapper accept soft targets, whose classes it takes for samples.

    Example:
        >>> from fastai.losses import CrossEntropyLossFlat
        >>> loss = CrossEntropyLossFlat()
        >>> with classes_kept(loss):
        ...     round(float(loss(torch.zeros(3, 2), torch.full((3, 2), 0.5))), 4)  # log 2
        0.6931
    """
    wrapper = unwrap_loss(base)
    if not (is_wrapper(wrapper) and wrapper.flatten and wrapper.is_2d):
        yield
        return
    before, wrapper.flatten = wrapper.flatten, False
    try:
        yield
    finally:
        wrapper.flatten = before


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


def _format_shape(tensor: Tensor) -> str:
    """Format a shape with B for the number of samples, such as (B,) or (B, 3)."""
    sizes = ", ".join(map(str, tensor.shape[1:]))
    return f"(B, {sizes})" if sizes else "(B,)"


def _is_loss(base: Any, kind: type[nn.Module], function: Callable[..., Tensor]) -> bool:
    """Check whether a loss is torch's `kind` or `function`, or fastai's wrapper of either."""
    loss = _unwrap_partial(_torch_loss(base))
    return isinstance(loss, kind) or loss is function


def _torch_loss(base: Any) -> Any:
    """Return the torch loss in fastai's flattening wrapper, or the loss itself."""
    loss = unwrap_loss(base)
    return loss.func if is_wrapper(loss) else loss


def _unwrap_partial(loss: Any) -> Any:
    return loss.func if isinstance(loss, partial) else loss


def _module_of(loss: Any) -> str:
    """Return the name of the Python module that defines the code of a loss."""
    loss = _unwrap_partial(loss)
    if inspect.isroutine(loss):
        code: Any = loss
    else:
        code = type(loss).forward if isinstance(loss, nn.Module) else type(loss).__call__
    return str(getattr(code, "__module__", ""))
