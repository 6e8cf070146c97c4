"""Readouts: how the heads read the feature maps of the core.

Shapes: B batch, M members, F channels and a b size of the core's maps, D h w encoder's output.

The default readout, "core", is the core's own pooling: the mean over all positions in the published
networks, the original pooling in a converted network. Any other readout is a module that receives
the maps and the masks with which the features were mixed. To add a readout, write a class and
register it in `choices.READOUTS`.
"""

from pkgutil import resolve_name
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.config.choices import READOUTS
from mixmo_fastai.errors import InputError, unknown_name_error


@runtime_checkable
class HasMaps(Protocol):
    """A core that can return its feature maps before pooling.

    Example:
        >>> from mixmo_fastai.models.wide_resnet import WideResNetCore
        >>> core = WideResNetCore(depth=10, width=1)
        >>> isinstance(core, HasMaps), isinstance(nn.Flatten(), HasMaps)
        (True, False)
    """

    def maps(self, features: Tensor) -> Tensor:
        """Compute feature maps: (B, D, h, w) -> (B, F, a, b)."""


class Readout(nn.Module):
    """Base class of readouts.

    Subclasses implement `forward(maps, masks)`:

        maps: (B, F, a, b).
        masks: (B, M, 1 or D, h, w) in training; None if all members see the same image.

    It returns one embedding for all heads (B, F), or one per head (B, M, F). Without masks, it must
    return one for all heads.

    Attributes:
        is_fusable: whether the readout without masks equals the core's own pooling, so that `fuse`
            remains exact.

    Example:
        >>> class MaxPooling(Readout):
        ...     def forward(self, maps, masks):
        ...         return maps.amax(dim=(2, 3))
        >>> MaxPooling()(torch.zeros(4, 64, 8, 8), masks=None).shape
        torch.Size([4, 64])
    """

    is_fusable = False


def average(maps: Tensor) -> Tensor:
    """Compute the mean over all positions: (B, F, a, b) -> (B, F).

    Example:
        >>> average(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[1.5000]])
    """
    return F.adaptive_avg_pool2d(maps, 1).flatten(1)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Average masks over channels and pool them to a coarser size.

    Args:
        masks: (B, M, 1 or D, h, w).
        size: (a, b).

    Returns:
        (B, M, a, b), summing to one over the members if the masks do.

    Example:
        >>> masks = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(1, 1, 1, 4, 4)
        >>> resize_masks(masks, (2, 2)).tolist()
        [[[[1.0, 0.5], [1.0, 0.5]]]]
    """
    return F.adaptive_avg_pool2d(masks.mean(dim=2), size)


def build_readout(readout: str | nn.Module | None) -> nn.Module | None:
    """Build a readout from its name; modules and None are returned unchanged.

    Raises:
        InputError: the name is unknown.

    Example:
        >>> build_readout("core") is None
        True
        >>> build_readout("attention")
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: Unknown readout 'attention'...
    """
    if not isinstance(readout, str):
        return readout
    if readout not in READOUTS:
        raise unknown_name_error("readout", readout, READOUTS)
    target = READOUTS[readout]
    return None if target is None else resolve_name(target)()


def check_readout(readout: nn.Module, core: nn.Module) -> None:
    """Check that a core has the feature maps that a readout needs.

    Raises:
        InputError: the core has no method `maps`.

    Example:
        >>> check_readout(Readout(), core=nn.Flatten())
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: The readout Readout needs feature maps, but ...
    """
    if not isinstance(core, HasMaps):
        raise InputError(
            f"The readout {type(readout).__name__} needs feature maps, but the core "
            f"{type(core).__name__} returns pooled features only.\n"
            "Use wrn<depth>_<width> or preact_resnet18_<width>, or give the core a method "
            "maps(features) -> (B, F, a, b)."
        )


def embed(readout: nn.Module, core: nn.Module, features: Tensor, masks: Tensor | None) -> Tensor:
    """Apply a core and a readout to mixed features.

    Args:
        readout: module that takes (maps, masks); see `Readout`.
        core: core with a method `maps`.
        features: (B, D, h, w).
        masks: (B, M, 1 or D, h, w), or None.

    Returns:
        (B, F), or (B, M, F) with one embedding per head.

    Example:
        >>> from mixmo_fastai.models.wide_resnet import WideResNetCore
        >>> class MaxPooling(Readout):
        ...     def forward(self, maps, masks):
        ...         return maps.amax(dim=(2, 3))
        >>> core, features = WideResNetCore(depth=10, width=1), torch.zeros(4, 16, 8, 8)
        >>> embed(MaxPooling(), core, features, masks=None).shape
        torch.Size([4, 64])
    """
    assert isinstance(core, HasMaps)
    embedding: Tensor = readout(core.maps(features), masks)
    return embedding
