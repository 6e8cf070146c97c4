"""Replace the BatchNorm layers of a network by those of another class."""

from collections.abc import Callable

from torch import nn


def replace_norms(
    network: nn.Module, kind: type[nn.BatchNorm2d], make: Callable[..., nn.BatchNorm2d]
) -> nn.Module:
    """Replace every layer of a class in a network, in place; parameters and buffers are kept.

    Args:
        network: any module; it is not a layer of this class itself.
        kind: class of the layers to replace; its subclasses are not replaced.
        make: class or function with the arguments of `nn.BatchNorm2d`.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm2d(2))
        >>> weight = network[0].weight
        >>> replace_norms(network, nn.BatchNorm2d, nn.BatchNorm2d)[0].weight is weight
        True
    """
    converted: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if type(child) is kind:
                if child not in converted:
                    converted[child] = _convert_norm(child, make)
                setattr(module, name, converted[child])
    return network


def _convert_norm(norm: nn.BatchNorm2d, make: Callable[..., nn.BatchNorm2d]) -> nn.BatchNorm2d:
    converted = make(
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
    return converted
