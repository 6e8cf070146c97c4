"""Readouts: how the heads read the feature maps of the core.

Shapes: B batch, M members, F channels and a b size of the core's maps, D h w encoder's output.

The default readout, "core", is the core's own pooling: the mean over all positions in the published
networks, the original pooling in a converted network. Any other readout is a module that receives
the maps and the masks with which the features were mixed. To add a readout, write a class and
register it in `choices.READOUTS`.
"""

from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from mixmo_fastai.config.choices import READOUTS
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, signature_mismatch, unknown_name_error


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

    A readout that changes during training also has `set_progress(progress)`: `MixMoCallback` calls
    it before every training step with the completed fraction of training, in [0, 1), and in
    `lr_find` with 1.

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
        InputError: the name is unknown, or the readout is neither a name nor a module.

    Example:
        >>> build_readout("core") is None
        True
        >>> build_readout("attention")
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: Unknown readout 'attention'...
    """
    if readout is None or isinstance(readout, nn.Module):
        return readout
    if not isinstance(readout, str):
        hint = f"{readout.__name__}()" if isinstance(readout, type) else "a Readout"
        raise InputError(
            f"readout must be a name, a module or None; got {readout!r}.\n"
            f"Names: {', '.join(READOUTS)}. To pass a module, pass an instance: readout={hint}."
        )
    if readout not in READOUTS:
        raise unknown_name_error("readout", readout, READOUTS)
    target = READOUTS[readout]
    if target is None:
        return None
    built: nn.Module = resolve_registered("readout", readout, target)()
    return built


def set_readout_progress(network: nn.Module, progress: float) -> None:
    """Pass the completed fraction of training to a network's readout, if it has `set_progress`.

    Example:
        >>> network, readout = nn.Module(), Readout()
        >>> readout.set_progress = print
        >>> network.readout = readout
        >>> set_readout_progress(network, 0.5)
        0.5
    """
    set_progress = getattr(getattr(network, "readout", None), "set_progress", None)
    if set_progress is not None:
        set_progress(progress)


def check_readout(readout: nn.Module, core: nn.Module) -> None:
    """Check that a readout takes maps and masks, and that a core has maps.

    Raises:
        InputError: the readout takes other arguments, or the core has no method `maps`.

    Example:
        >>> check_readout(Readout(), core=nn.Flatten())
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: The readout Readout needs feature maps, but ...
    """
    if reason := signature_mismatch(readout.forward, "maps", "masks"):
        raise InputError(
            f"The readout {type(readout).__name__} must have a method forward(maps, masks): "
            f"{reason}.\nMasks are None at inference."
        )
    if not isinstance(core, HasMaps):
        raise InputError(
            f"The readout {type(readout).__name__} needs feature maps, but the core "
            f"{type(core).__name__} returns pooled features only.\n"
            "Use wrn<depth>_<width> or preact_resnet18_<width>, or give the core a method "
            "maps(features) -> (B, F, a, b)."
        )


def embed(
    readout: nn.Module,
    core: nn.Module,
    features: Tensor,
    masks: Tensor | None,
    num_features: int | None = None,
) -> Tensor:
    """Apply a core and a readout to mixed features.

    Args:
        readout: module that takes (maps, masks); see `Readout`.
        core: core with a method `maps`.
        features: (B, D, h, w).
        masks: (B, M, 1 or D, h, w), or None.
        num_features: F, the number of features that the heads take; None if it is unknown.

    Returns:
        (B, F), or (B, M, F) with one embedding per head.

    Raises:
        InputError: the readout returns something else.

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
    maps = core.maps(features)
    embedding = readout(maps, masks)
    _check_embedding(readout, embedding, maps, masks, num_features)
    return embedding  # type: ignore[no-any-return]


def _check_embedding(
    readout: nn.Module,
    embedding: Any,
    maps: Tensor,
    masks: Tensor | None,
    num_features: int | None,
) -> None:
    batch, features = len(maps), num_features or maps.shape[1]
    allowed: list[tuple[int, ...]] = [(batch, features)]
    if masks is not None:
        allowed.append((batch, masks.shape[1], features))
    shape = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
    if shape in allowed or (num_features is None and shape[:-1] in {each[:-1] for each in allowed}):
        return
    expected = " or ".join(map(str, allowed))
    raise InputError(
        f"The readout {type(readout).__name__} returned {shape} for maps {tuple(maps.shape)}; "
        f"expected {expected}.\n"
        "It must return (B, F) for all heads or, with masks, (B, M, F) with one embedding per head."
    )
