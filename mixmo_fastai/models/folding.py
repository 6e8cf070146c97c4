"""Fold BatchNorm into the convolution before it, for inference.

In evaluation, BatchNorm multiplies and shifts each channel by constants. If its input is the output
of a convolution, both together are a convolution with other weights; the result is equal up to
rounding. In a pre-activation network, where most BatchNorm layers follow a sum, this concerns the
second of each block; in a ResNet it concerns all of them.

Shapes: B batch, C channels, H W image size.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights, parametrize
from torch.overrides import TorchFunctionMode

from mixmo_fastai.models.ghost_norm import GhostBatchNorm2d, GhostBatchNormAct2d
from mixmo_fastai.models.norms import timm_norm

TOLERANCE = 1e-4
"""Largest difference of an output, such as the logits of a class, relative to its scale."""
MIN_SCALE = 1e-2
"""Smallest scale of an output, relative to the median of all outputs' scales."""
_NORMS = (nn.BatchNorm2d, GhostBatchNorm2d, nn.SyncBatchNorm)


def fold_batch_norm(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a network for inference, with BatchNorm folded into convolutions where that is exact.

    A BatchNorm layer is folded if, in a forward pass of `images`, it is the only user of a
    convolution's output, and both are called once. The result is used only if its outputs, the
    logits of the members if the network has `member_logits`, equal the original ones.

    Networks with hooks are not folded, since the two passes would run their hooks.

    Args:
        network: in evaluation mode; it is not changed.
        images: (B, C, H, W), on the network's device.

    Returns:
        A copy; or the network itself if no layer can be folded, it cannot be copied, or the outputs
        differ.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> fold_batch_norm(network.eval(), torch.zeros(2, 3, 4, 4))[:2]
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    modules = [*network.modules()]
    if not any(map(_is_norm, modules)) or any(map(_has_hooks, modules)):
        return network
    try:
        folded = copy.deepcopy(network)
    except (RuntimeError, TypeError):  # for example, it holds a tensor with a gradient, or a lock
        return network
    with torch.no_grad():
        expected, pairs = _find_pairs(folded, images)
        for convolution, norm in pairs:
            _fold(convolution, norm)
        _replace_norms(folded, {norm for _, norm in pairs})
        try:
            is_equal = bool(pairs) and _is_equal(_outputs(folded, images), expected)
        except AttributeError:  # the network reads an attribute of a layer that was folded
            return network
    return folded if is_equal else network


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Uses(TorchFunctionMode):
    """Counts how often each tensor is an argument of an operation that returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if next(_tensors(result), None) is not None:  # unlike sizes, which do not use the values
            for tensor in _tensors((args, kwargs)):
                self.counts[id(tensor)] += 1
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _find_pairs(
    network: nn.Module, images: Tensor
) -> tuple[Tensor, list[tuple[nn.Conv2d, nn.Module]]]:
    """Run a network; return its outputs and the pairs of layers that can be folded."""
    calls: Counter[nn.Module] = Counter()
    producers: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # with the tensor, so that its id is unique
    candidates: list[tuple[nn.Conv2d, nn.Module, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[layer] += 1
        if isinstance(layer, nn.Conv2d):
            producers[id(output)] = layer, output
            uses.counts[id(output)] = 0  # freed tensors may have had the same id
        elif inputs and id(inputs[0]) in producers:
            convolution, x = producers[id(inputs[0])]
            candidates.append((convolution, layer, x))

    layers, uses = [module for module in network.modules() if _can_fold(module)], _Uses()
    with _recorded(layers, record), uses:
        outputs = _outputs(network, images)
    names = Counter(module for _, module in network.named_modules(remove_duplicate=False))
    pairs = [
        (convolution, norm)
        for convolution, norm, output in candidates
        if calls[convolution] == calls[norm] == names[convolution] == names[norm] == 1
        and uses.counts[id(output)] == uses.counts[id(convolution.weight)] == 1
    ]
    return outputs, pairs


@contextmanager
def _recorded(layers: list[nn.Module], record: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _can_fold(layer: nn.Module) -> bool:
    """Check the type of a layer; subclasses and parametrisations may do something else."""
    if parametrize.is_parametrized(layer):
        return False
    if _is_norm(layer):
        return not layer.training and layer.running_var is not None
    return type(layer) is nn.Conv2d


def _is_norm(layer: nn.Module) -> bool:
    return type(layer) in _NORMS or _is_timm_norm(layer)


def _is_timm_norm(layer: nn.Module) -> bool:
    """Check for timm's BatchNorm with activation, which ends with its layers `drop` and `act`."""
    return type(layer) in (GhostBatchNormAct2d, timm_norm())  # the first in place of the second


def _fold(convolution: nn.Conv2d, norm: Any) -> None:
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.weight = nn.Parameter(weight.contiguous(memory_format=_format(convolution.weight)))
    convolution.bias = nn.Parameter(bias)


def _format(weight: Tensor) -> torch.memory_format:
    is_last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _replace_norms(network: nn.Module, norms: set[nn.Module]) -> None:
    """Replace folded layers by what remains of them."""
    for parent in [*network.modules()]:
        for name, child in parent.named_children():
            if child in norms:
                setattr(parent, name, _without_norm(child))


def _without_norm(norm: Any) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if _is_timm_norm(norm) else nn.Identity()


def _outputs(network: Any, images: Tensor) -> Tensor:
    outputs: Tensor = getattr(network, "member_logits", network)(images)
    return outputs


def _is_equal(outputs: Tensor, expected: Tensor) -> bool:
    """Compare outputs (B, …, K), each of the K on its own scale.

    A class that is excluded by a logit of -1e9 does not hide errors of the others.
    """
    scale = expected.abs().flatten(0, -2).amax(dim=0)  # (K,)
    scale = scale.clamp(min=MIN_SCALE * float(scale.median()))
    difference = (outputs - expected).abs().flatten(0, -2).amax(dim=0)
    return bool((difference <= TOLERANCE * scale).all())  # False for nan
