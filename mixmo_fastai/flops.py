"""Arithmetic of a network: how long it takes, and how well hardware is used."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixmo_fastai.models.mixmo_model import unwrap

BACKWARD = 2
"""What a backward pass costs, in forward passes: one for the inputs, one for the weights."""


def count_flops(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Count the operations of one forward pass of one image, a multiply-add as two.

    Matrix products and convolutions count; all else is small. Nothing is computed.

    Args:
        model: a `MixMoModel`, or another network of images.
        image_shape: (C, H, W).
    """
    network = copy.deepcopy(unwrap(model)).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, *image_shape, device="meta"))
    return int(counter.get_total_flops())


def training_flops(model: nn.Module, image_shape: tuple[int, ...], num_images: int) -> float:
    """Count the operations of training on so many images: forward and backward."""
    return float(1 + BACKWARD) * count_flops(model, image_shape) * num_images
