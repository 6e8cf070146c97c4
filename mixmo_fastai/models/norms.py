"""Replace the BatchNorm layers of a network by those of other classes."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixmo_fastai.errors import InputError


class Activated:
    """Mixin of a BatchNorm with the `drop` and `act` of timm's BatchNormAct2d, applied after it.

    Example:
        >>> import torch
        >>> class Norm(Activated, nn.BatchNorm2d):
        ...     drop, act = nn.Identity(), nn.ReLU()
        >>> Norm(2).eval()(torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)).flatten() > 0
        tensor([False,  True])
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[misc]
        return out


def timm_norm() -> type[nn.BatchNorm2d] | None:
    """Return timm's BatchNormAct2d, a BatchNorm with an activation; None before timm is imported.

    Example:
        >>> import timm.layers
        >>> timm_norm().__name__
        'BatchNormAct2d'
    """
    kind: type[nn.BatchNorm2d] | None = getattr(
        sys.modules.get("timm.layers"), "BatchNormAct2d", None
    )
    return kind


def replace_norms(
    network: nn.Module, kinds: Mapping[type[nn.Module] | None, Callable[..., Any]]
) -> nn.Module:
    """Replace the layers of some classes in a network, in place; parameters and buffers are kept.

    Args:
        network: any module; it is not a layer of these classes itself.
        kinds: for each class of layers to replace, a class or function with the arguments of
            `nn.BatchNorm2d`; subclasses are not replaced. None stands for no layer.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm2d(2))
        >>> weight = network[0].weight
        >>> replace_norms(network, {nn.BatchNorm2d: nn.BatchNorm2d})[0].weight is weight
        True
    """
    converted: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if type(child) in kinds:
                if child not in converted:
                    converted[child] = _convert_norm(child, kinds[type(child)])
                setattr(module, name, converted[child])
    return network


def check_norms(network: nn.Module, purpose: str) -> None:
    """Check that a network has no layers derived from BatchNorm other than those of torch and timm.

    Args:
        network: any module.
        purpose: why they are replaced, for the message.

    Raises:
        InputError: it has one; what it computes besides BatchNorm would be lost.

    Example:
        >>> check_norms(nn.Sequential(nn.BatchNorm2d(2)), "ghost batches")
    """
    for module in network.modules():
        kind = type(module)
        is_known = kind.__module__.startswith(("torch.nn.", "mixmo_fastai.")) or (
            kind.__module__.startswith("timm.") and kind.__name__ in _NORMS_OF_TIMM
        )
        if isinstance(module, _BatchNorm) and not is_known:
            raise InputError(
                f"The network has layers of class {type(module).__name__}, derived from BatchNorm; "
                f"{purpose} can\nreplace only those of torch and timm's BatchNormAct2d."
            )


_NORMS_OF_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")


def _convert_norm(norm: Any, make: Callable[..., Any]) -> nn.Module:
    converted: nn.Module = make(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    converted.train(norm.training)
    # The same Parameter objects, because an optimizer may already hold them.
    converted._parameters.update(norm._parameters)
    converted._buffers.update(norm._buffers)
    if hasattr(norm, "act"):  # timm's, or one that has replaced it
        converted.drop, converted.act = norm.drop, norm.act
    return converted
