"""Fuse a MixMo network into a plain network for inference.

At inference all encoders see the same image, so their sum equals one convolution with the summed
weights. All heads see the same embedding, so their mean equals one linear layer with the mean
weights. Both are exact up to rounding, and inference costs as much as that of a plain network.

Shapes: B batch, M members, C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.backbone_core import BackboneCore
from mixmo_fastai.models.ghost_norm import use_full_batches


class FusedNetwork(nn.Module):
    """A plain network of one encoder, the core and one head.

    Args:
        encoder: (B, C, H, W) -> (B, D, h, w).
        core: (B, D, h, w) -> (B, features).
        head: (B, features) -> (B, num_votes · K).
        num_votes: M if the head stacks the heads of all members, 1 if it is their mean.
        output: layer that turns the mean logits into predictions; see `MixMoModel`.

    Example:
        >>> parts = nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 2 * 10)
        >>> network = FusedNetwork(*parts, num_votes=2)
        >>> network(torch.zeros(5, 3, 4, 4)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        encoder: nn.Module,
        core: nn.Module,
        head: nn.Module,
        num_votes: int = 1,
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.core, self.head, self.num_votes = encoder, core, head, num_votes
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """Compute ensemble logits, or predictions with `output`: (B, C, H, W) -> (B, K).

        Example:
            >>> parts = nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10)
            >>> FusedNetwork(*parts, output=nn.Softmax(dim=1))(torch.zeros(5, 3, 4, 4)).shape
            torch.Size([5, 10])
        """
        logits = self._head_outputs(x) if self.num_votes == 1 else self.member_logits(x).mean(dim=1)
        # Pickles of version 0.1.0 have no `output`.
        output: nn.Module | None = getattr(self, "output", None)
        return logits if output is None else output(logits)

    def member_logits(self, x: Tensor) -> Tensor:
        """Compute the logits of each head: (B, C, H, W) -> (B, num_votes, K).

        Example:
            >>> parts = nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 2 * 10)
            >>> FusedNetwork(*parts, num_votes=2).member_logits(torch.zeros(5, 3, 4, 4)).shape
            torch.Size([5, 2, 10])
        """
        logits = self._head_outputs(x)
        return logits.view(len(logits), self.num_votes, -1)

    def _head_outputs(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(run_core(self.core, self.encoder(x), x))
        return logits


def run_core(core: nn.Module, features: Tensor, image: Tensor) -> Tensor:
    """Run a core on features (B, D, h, w) of images (…, H, W), from which some cores need H, W.

    Example:
        >>> features, image = torch.zeros(2, 8, 1, 1), torch.zeros(2, 3, 4, 4)
        >>> run_core(nn.Flatten(), features, image).shape
        torch.Size([2, 8])
    """
    if isinstance(core, BackboneCore):
        embedding: Tensor = core(features, (image.shape[-2], image.shape[-1]))
    else:
        embedding = core(features)
    return embedding


def fuse_parts(
    encoders: Sequence[nn.Module],
    core: nn.Module,
    heads: Sequence[nn.Module],
    output: nn.Module | None = None,
    *,
    keep_members: bool = False,
) -> nn.Module:
    """Build a plain network from copies of the parts; see `MixMoModel.fuse`.

    Raises:
        InputError: an encoder is not a convolution, a head is not a linear layer, or the members'
            layers differ in more than their weights.

    Example:
        >>> encoders = [nn.Conv2d(3, 8, 4) for _ in range(2)]
        >>> heads = [nn.Linear(8, 10) for _ in range(2)]
        >>> fused = fuse_parts(encoders, nn.Flatten(), heads)
        >>> torch.allclose(fused.encoder.weight, encoders[0].weight + encoders[1].weight)
        True
    """
    _check_same_layers(encoders, nn.Conv2d, "encoder", "convolution")
    _check_same_layers(heads, nn.Linear, "head", "linear layer")
    encoder = _combine(encoders, torch.sum)
    head = _stack_heads(heads) if keep_members else _combine(heads, torch.mean)
    if keep_members:
        parts = encoder, copy.deepcopy(core), head, len(heads), copy.deepcopy(output)
        fused: nn.Module = FusedNetwork(*parts)
    else:
        fused = assemble(encoder, core, head, output)
    return use_full_batches(fused).train(core.training)


def assemble(
    encoder: nn.Module, core: nn.Module, head: nn.Module, output: nn.Module | None = None
) -> nn.Module:
    """Build a plain network from one encoder and one head, with copies of core and output.

    Example:
        >>> network = assemble(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
        >>> network(torch.zeros(5, 3, 4, 4)).shape
        torch.Size([5, 10])
    """
    output = copy.deepcopy(output)
    if isinstance(core, BackboneCore):
        return core.rebuild(encoder, head, output)
    return FusedNetwork(encoder, copy.deepcopy(core), head, output=output)


def _check_same_layers(layers: Sequence[nn.Module], kind: type, part: str, layer_name: str) -> None:
    for layer in layers:
        if not isinstance(layer, kind):
            raise InputError(
                f"fuse() needs one {layer_name} per {part}; found {type(layer).__name__}."
            )
    if len({layer.extra_repr() for layer in layers}) > 1:
        raise InputError(
            f"fuse() cannot combine {part}s that differ in more than their weights:\n"
            f"{', '.join(map(str, layers))}."
        )
    # A subclass may change the computation, for example by normalising its weights.
    subclasses = [type(layer).__name__ for layer in layers if type(layer) is not kind]
    if subclasses and not _is_linear_in_weights(layers):
        raise InputError(
            f"fuse() cannot combine {part}s of type {subclasses[0]}, which is not linear in its "
            "weights."
        )


@torch.no_grad()
def _is_linear_in_weights(layers: Sequence[nn.Module]) -> bool:
    """Check numerically that summing the weights is the same as summing the layers' outputs."""
    weight = layers[0].get_parameter("weight")
    size = [4 * side for side in weight.shape[2:]]
    channels = getattr(layers[0], "in_channels", weight.shape[1])
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)).to(weight)
    combined, summed = _combine(layers, torch.sum)(x), sum(layer(x) for layer in layers)
    return torch.allclose(combined, summed, rtol=1e-3, atol=1e-3 * float(summed.abs().max()))


@torch.no_grad()
def _combine(layers: Sequence[nn.Module], reduce: Callable[..., Tensor]) -> nn.Module:
    """Build one layer whose parameters are reduced over the members, such as by `torch.sum`."""
    combined = copy.deepcopy(layers[0])
    for name, parameter in combined.named_parameters():
        members = torch.stack([layer.get_parameter(name) for layer in layers])
        # In double precision, so that only the final result is rounded.
        parameter.copy_(reduce(members.to("cpu", torch.float64), dim=0))
    return combined


@torch.no_grad()
def _stack_heads(heads: Sequence[nn.Module]) -> nn.Linear:
    """Stack all heads in one linear layer: (B, features) -> (B, M · K)."""
    weight = torch.cat([head.get_parameter("weight") for head in heads])
    first = heads[0].get_parameter("weight")
    has_bias = getattr(heads[0], "bias", None) is not None
    stacked = nn.Linear(
        weight.shape[1], weight.shape[0], bias=has_bias, device=first.device, dtype=first.dtype
    )
    stacked.weight.copy_(weight)
    if has_bias:
        stacked.bias.copy_(torch.cat([head.get_parameter("bias") for head in heads]))
    return stacked
