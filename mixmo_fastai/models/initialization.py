"""The published initialisation.

Convolutions and linear layers: He-normal (fan-in, ReLU gain), truncated at two standard deviations
and divided by 0.8796, the standard deviation of a normal truncated there, to restore He's standard
deviation. Biases are zero; BatchNorm weights are one and biases zero.
"""

import math

import torch
from torch import Tensor, nn

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal distribution truncated at -2 and 2."""


@torch.no_grad()
def initialize(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise all weights of a network.

    Args:
        network: all its parameters must belong to convolutions, linear layers or BatchNorm.
        generator: on the device of the weights.

    Example:
        >>> linear = nn.Linear(50, 2000)
        >>> initialize(linear, torch.Generator().manual_seed(0))
        >>> round(linear.weight.std().item(), 2), linear.bias.any().item()  # √(2 / 50)
        (0.2, False)
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            he_normal_(module.weight, generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


@torch.no_grad()
def he_normal_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight (out, in, …) in place: truncated He-normal, std √(2 / fan-in).

    Example:
        >>> weight = he_normal_(torch.empty(2000, 50), torch.Generator().manual_seed(0))
        >>> round(weight.std().item(), 2)  # √(2 / 50)
        0.2
    """
    fan_in = weight[0].numel()
    std = math.sqrt(2.0 / fan_in) / TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
