"""MixMo around any backbone with a first convolution and a last linear layer.

The first convolution becomes M encoders, the last linear layer M heads, and what lies between them
the core. A network that is converted gives what it gave before, so that a pretrained one can be
trained on.

Shapes: B batch, M members, C image channels, H W image size, D feature channels, h w feature size
after the convolution, K classes.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.anatomy import Seen, first_convolution, last_linear, look
from mixmo_fastai.models.mixmo_model import MixMoModel

EXACTNESS = 1e-4
"""Largest difference of logits that rounding may make, as a share of the largest."""


class GivenFeatures(nn.Module):
    """Stands where the first convolution was, and gives what the core has been handed instead."""

    def __init__(self) -> None:
        super().__init__()
        self.features: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        features, self.features = self.features, None
        if features is None:
            raise RuntimeError("the first convolution of the network was called more than once")
        return features


class BackboneCore(nn.Module):
    """A network without its first convolution and its last linear layer.

    Its own forward pass runs as written, on an image of zeros that takes no memory, for networks
    that look at the size of what they are shown.

    Args:
        body: the network, with `GivenFeatures` in place of the convolution and nothing in place of
            the linear layer.
        entry: name of the former.
        convolution: as it was, for the size of the image.

    Shapes: (B, D, h, w) -> (B, features).
    """

    def __init__(self, body: nn.Module, entry: str, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.body, self.entry = body, entry
        self.in_channels, self.filler = convolution.in_channels, 0.0
        fixed = isinstance(convolution.padding, tuple) and type(convolution) is nn.Conv2d
        padding = convolution.padding if fixed else None
        self.geometry = [
            _Geometry(
                int(convolution.kernel_size[axis]),
                int(convolution.stride[axis]),
                int(convolution.dilation[axis]),
                None if padding is None else int(padding[axis]),
            )
            for axis in range(2)
        ]

    def forward(self, features: Tensor) -> Tensor:
        size = [own.input_size(n) for own, n in zip(self.geometry, features.shape[2:], strict=True)]
        shape = (features.shape[0], self.in_channels, *size)  # a symbol where it is exported
        entry: Any = self.body.get_submodule(self.entry)
        entry.features = features
        embedding = self.body(features.new_full((), self.filler).expand(shape))
        if not isinstance(embedding, Tensor):
            raise InputError(
                f"{type(self.body).__name__} gives {type(embedding).__name__} in training, not "
                "logits alone.\nBuild it without auxiliary outputs, as with aux_logits=False."
            )
        return embedding


@dataclass(frozen=True)
class _Geometry:
    """How a convolution's output size follows from its input's, along one axis."""

    kernel: int
    stride: int
    dilation: int
    padding: int | None  # None for as much as keeps the size

    def input_size(self, output_size: int) -> int:
        if self.padding is None:
            return output_size * self.stride
        reach = self.dilation * (self.kernel - 1) + 1
        # The smallest that gives this output; with patches, the only one.
        return max(1, (output_size - 1) * self.stride + reach - 2 * self.padding)


def convert_to_mixmo(
    model: nn.Module,
    num_members: int = 2,
    *,
    encoder: str | None = None,
    head: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    perturbation: float = 0.1,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> MixMoModel:
    """Turn a network into a MixMo network of several members; the network itself is left alone.

    Encoders start as the first convolution divided by M, heads as copies of the last linear layer,
    each with a small perturbation of its own. Over the members these sum to zero, so that symmetry
    is broken and yet the converted network gives the outputs of the given one.

    Args:
        model: (B, C, H, W) -> (B, K): from torchvision, timm, fastai, or your own.
        num_members: M.
        encoder: name of the first convolution, as in `model.named_modules()`; found by running the
            model once where not given.
        head: name of the last linear layer; found likewise.
        image_size: at which the model is tried; its own, or what works, where not given.
        perturbation: deviation of the perturbations, as a share of that of the weights.
        num_classes: K of new heads, drawn at random; the given one's where not given.
        generator: of the perturbations and of new heads.

    Raises:
        InputError: the model cannot be converted; the message says which part is missing.
    """
    if num_members < 1:
        raise InputError(f"num_members must be 1 or more; got {num_members}.")
    if not 0 <= perturbation < 1:
        raise InputError(f"perturbation must be at least 0 and below 1; got {perturbation}.")
    seen = look(model, image_size)
    entry = first_convolution(seen, encoder)
    last = last_linear(seen, head)
    body = copy.deepcopy(model)
    convolution, linear = body.get_submodule(entry), body.get_submodule(last)
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    _replace(body, entry, GivenFeatures())
    _replace(body, last, nn.Identity())
    encoders = _perturbed(convolution, num_members, 1 / num_members, perturbation, generator)
    heads = _perturbed(linear, num_members, 1.0, perturbation, generator)
    converted = MixMoModel(encoders, BackboneCore(body, entry, convolution), heads)
    converted.train(model.training)
    _check_same(converted, seen, entry)
    if num_classes is not None and num_classes != linear.out_features:
        converted.heads = nn.ModuleList(
            _new_head(linear, num_classes, generator) for _ in range(num_members)
        )
    return converted


@torch.no_grad()
def draw_apart(model: MixMoModel, generator: torch.Generator | None = None) -> MixMoModel:
    """Let the members of an untrained network start apart, each from weights of its own.

    Encoders and heads become independent draws of the initialisation that they have: its numbers in
    another order for each.

    Args:
        model: from `convert_to_mixmo`; changed in place.
        generator: of the orders.

    Returns:
        the model.
    """
    scale = float(model.num_members)
    for layers, factor in ((model.encoders, scale), (model.heads, 1.0)):
        whole = {
            name: torch.stack([layer.get_parameter(name) for layer in layers]).mean(dim=0)
            for name, _ in layers[0].named_parameters()
        }
        for layer in layers:
            for name, parameter in layer.named_parameters():
                order = torch.randperm(parameter.numel(), generator=generator)
                values = factor * whole[name].flatten()[order.to(parameter.device)]
                parameter.copy_(values.view_as(parameter))
    return model


@torch.no_grad()
def with_channels(model: nn.Module, in_channels: int) -> nn.Module:
    """Let a network's first convolution take another number of channels, in place.

    Each new channel gets a share of the old ones' weights, as many times as it takes: one channel
    their sum, six channels each of three twice at half the weight. So an image whose channels are
    all alike gives what it gave.

    Args:
        model: with a convolution.
        in_channels: C.

    Returns:
        the model.
    """
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    own = first.in_channels
    if own == in_channels or first.groups != 1:
        return model
    channels = torch.arange(max(own, in_channels))
    spread = torch.zeros(in_channels, own).index_put_(
        (channels % in_channels, channels % own), torch.ones(len(channels))
    )
    spread = spread / spread.sum(dim=0)  # what each old channel gives to each new one
    weight = torch.einsum("dchw,nc->dnhw", first.weight, spread.to(first.weight))
    first.weight, first.in_channels = nn.Parameter(weight.contiguous()), in_channels
    return model


def _replace(body: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(body.get_submodule(parent), own, module.train(body.training))


@torch.no_grad()
def _perturbed(
    layer: nn.Module,
    count: int,
    scale: float,
    perturbation: float,
    generator: torch.Generator | None,
) -> list[nn.Module]:
    """Copy a layer, scaled, with perturbations of the weights that sum to zero over the copies."""
    copies = [copy.deepcopy(layer) for _ in range(count)]
    for name, parameter in layer.named_parameters():
        drawn = torch.zeros(count, *parameter.shape)
        if parameter.ndim > 1 and count > 1:  # what breaks the symmetry; biases follow
            drawn = torch.randn(drawn.shape, generator=generator)
            drawn = (drawn - drawn.mean(dim=0)) * (perturbation * float(parameter.float().std()))
        for own, noise in zip(copies, drawn.to(parameter), strict=True):
            own.get_parameter(name).copy_(scale * (parameter + noise))
    return copies


@torch.no_grad()
def _new_head(linear: nn.Linear, num_classes: int, generator: torch.Generator | None) -> nn.Linear:
    """Make a head of other classes, with torch's initialisation."""
    head = nn.Linear(linear.in_features, num_classes, bias=linear.bias is not None)
    bound = linear.in_features**-0.5
    for parameter in head.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
    return head.to(linear.weight)


def _check_same(converted: MixMoModel, seen: Seen, entry: str) -> None:
    """Check that the converted network gives what the given one did."""
    modes = {module: module.training for module in converted.modules()}
    core: Any = converted.core
    core.filler = float("nan")  # which would show wherever the image is looked at once more
    try:
        with torch.no_grad():
            found = converted.eval()(seen.image)
    finally:
        core.filler = 0.0
        for module, mode in modes.items():
            module.training = mode
        converted.latest_member_logits = None
    if seen.output.isfinite().all() and not found.isfinite().all():
        raise InputError(
            f"{seen.name} shows the image to more than its first convolution, {entry!r}, so that "
            "encoders would see a part of it only."
        )
    difference = (found - seen.output).abs().max() / seen.output.abs().max().clamp_min(1e-12)
    if not difference <= EXACTNESS:
        raise InputError(
            f"{seen.name} cannot be converted: with its first convolution {entry!r} in parts, its "
            f"logits differ by {float(difference):.1e} of the largest.\n"
            "A convolution that normalises its own weights cannot be taken apart."
        )
