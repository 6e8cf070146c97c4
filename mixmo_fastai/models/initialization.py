"""The published initialisation.

Convolutions and linear layers: He-normal (fan-in, gain of ReLU), truncated at two standard
deviations and divided by 0.8796, the deviation that the truncation leaves, so that it stays He's.
Biases zero; BatchNorm one and zero.
"""

import math

import torch
from torch import Tensor, nn

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal that is cut at -2 and 2."""


@torch.no_grad()
def initialize(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw all weights of a network anew.

    Args:
        network: modules without children are convolutions, linear layers, BatchNorm or have no
            parameters.
        generator: on the device of the weights.
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
    """Fill a weight (out, in, …) in place: truncated He-normal with deviation √(2 / fan-in)."""
    fan_in = weight[0].numel()
    std = math.sqrt(2.0 / fan_in) / TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
