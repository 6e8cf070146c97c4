"""Initial weights of the encoders and heads of a converted network."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from mixmo_fastai.errors import check_count, check_fraction

PERTURBATION = 0.1
"""Default standard deviation of perturbations, and the largest of heads."""


@dataclass(frozen=True)
class MemberInit:
    """How the encoders and heads of a converted network are initialised.

    Attributes:
        num_members: M.
        perturbation: see `convert_to_mixmo`.
        independent_encoders, independent_heads: whether these are initialised independently.
        new_heads: whether heads are initialised as torch initialises a linear layer, whatever the
            original's weights and number of classes.

    Example:
        >>> MemberInit(num_members=3).perturbation
        0.1
    """

    num_members: int = 2
    perturbation: float = PERTURBATION
    independent_encoders: bool = False
    independent_heads: bool = False
    new_heads: bool = False

    def __post_init__(self) -> None:
        check_count("num_members", self.num_members)
        check_fraction("perturbation", self.perturbation)

    def make_encoders(self, layer: nn.Module, generator: torch.Generator | None) -> list[nn.Module]:
        """Create M encoders from a convolution.

        Example:
            >>> layer, generator = nn.Conv2d(3, 8, 3), torch.Generator().manual_seed(0)
            >>> first, second = MemberInit(num_members=2).make_encoders(layer, generator)
            >>> torch.allclose(first.weight + second.weight, layer.weight, atol=1e-6)
            True
        """
        if self.independent_encoders:
            return permuted_copies(layer, self.num_members, generator)
        scale = 1 / self.num_members
        return perturbed_copies(layer, self.num_members, scale, self.perturbation, generator)

    def make_heads(self, layer: nn.Module, generator: torch.Generator | None) -> list[nn.Module]:
        """Create M heads from a linear layer.

        Example:
            >>> layer, generator = nn.Linear(8, 10), torch.Generator().manual_seed(0)
            >>> first, second = MemberInit(num_members=2).make_heads(layer, generator)
            >>> torch.allclose((first.weight + second.weight) / 2, layer.weight, atol=1e-6)
            True
        """
        if self.independent_heads:
            return permuted_copies(layer, self.num_members, generator)
        perturbation = min(self.perturbation, PERTURBATION)
        return perturbed_copies(layer, self.num_members, 1.0, perturbation, generator)


@torch.no_grad()
def perturbed_copies(
    layer: nn.Module,
    count: int,
    scale: float,
    perturbation: float,
    generator: torch.Generator | None,
) -> list[nn.Module]:
    """Copy and scale a layer, with weight perturbations that sum to zero over the copies.

    Args:
        layer: its biases are copied without perturbation.
        count: number of copies.
        scale: factor of weights and biases.
        perturbation: standard deviation, as a fraction of that of the weights, before the mean over
            the copies is subtracted.
        generator: on the CPU.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> first, second = perturbed_copies(layer, 2, 0.5, 0.1, torch.Generator().manual_seed(0))
        >>> torch.allclose(first.weight + second.weight, layer.weight)
        True
    """
    copies = [copy.deepcopy(layer) for _ in range(count)]
    for name, parameter in layer.named_parameters():
        noise = parameter.new_zeros(count, *parameter.shape)
        if parameter.ndim > 1 and count > 1 and perturbation:  # not biases
            noise = torch.randn(noise.shape, generator=generator).to(parameter)
            std = float(parameter.float().std(correction=0))
            noise = (noise - noise.mean(dim=0)) * (perturbation * std)
        for i, layer_copy in enumerate(copies):
            layer_copy.get_parameter(name).copy_(scale * (parameter + noise[i]))
    return copies


@torch.no_grad()
def permuted_copies(
    layer: nn.Module, count: int, generator: torch.Generator | None
) -> list[nn.Module]:
    """Copy a layer, and permute the values of each parameter independently for each copy.

    Args:
        layer: the layer, which is not changed.
        count: number of copies.
        generator: on the CPU.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> (copied,) = permuted_copies(layer, 1, torch.Generator().manual_seed(0))
        >>> torch.equal(copied.weight.flatten().sort()[0], layer.weight.flatten().sort()[0])
        True
    """
    copies = [copy.deepcopy(layer) for _ in range(count)]
    for layer_copy in copies:
        for parameter in layer_copy.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copies
