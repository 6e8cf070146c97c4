"""Count the floating-point operations (FLOPs) of a network, to estimate time and utilisation."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixmo_fastai.models.mixmo_model import unwrap

BACKWARD_COST = 2
"""Cost of a backward pass, in forward passes: one for input gradients, one for weight gradients."""
UNCOUNTABLE = (RuntimeError, NotImplementedError, TypeError)
"""What layers without support for the meta device may raise."""


def count_flops(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Count the FLOPs of a forward pass on one image; a multiply-add counts as two.

    Only matrix products and convolutions are counted; other operations cost little. The pass runs
    on the meta device, without computing values.

    Args:
        model: a `MixMoModel`, or any module with the input (B, C, H, W).
        image_shape: (C, H, W).

    Example:
        >>> count_flops(nn.Conv2d(3, 8, kernel_size=1), (3, 4, 4))  # 2 · 3 · 8 per position
        768
    """
    network = copy.deepcopy(unwrap(model)).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, *image_shape, device="meta"))
    return int(counter.get_total_flops())


def training_flops(model: nn.Module, image_shape: tuple[int, ...], num_images: int) -> float:
    """Count the FLOPs of training on `num_images` images: forward and backward passes.

    Example:
        >>> training_flops(nn.Conv2d(3, 8, kernel_size=1), (3, 4, 4), num_images=10)  # 3 · 768 · 10
        23040.0
    """
    return float(1 + BACKWARD_COST) * count_flops(model, image_shape) * num_images
