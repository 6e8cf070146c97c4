"""MixMo around any backbone with a first convolution and a last linear layer.

The first convolution becomes M encoders, the last linear layer M heads, and what lies between them
the core. A network that is converted gives what it gave before, so that a pretrained one can be
trained on.

Shapes: B batch, M members, C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.anatomy import (
    Call,
    Seen,
    Size,
    check_model,
    first_convolution,
    first_tensor,
    last_linear,
    look,
    sizes_of,
)
from mixmo_fastai.models.backbone_core import BackboneCore, GivenFeatures
from mixmo_fastai.models.mixmo_model import MixMoModel

EXACTNESS = 1e-4
"""Largest difference that rounding may make, as a share of the largest value."""


def convert_to_mixmo(
    model: nn.Module,
    num_members: int = 2,
    *,
    encoder: str | None = None,
    head: str | None = None,
    image_size: Size | None = None,
    perturbation: float = 0.1,
    num_classes: int | None = None,
    in_channels: int | None = None,
    generator: torch.Generator | None = None,
) -> MixMoModel:
    """Turn a network into a MixMo network of several members; the network itself is left alone.

    Encoders start as the first convolution divided by M, heads as copies of the last linear layer,
    each with a small perturbation of its own. Over the members these sum to zero, so that symmetry
    is broken and yet the converted network gives the outputs of the given one. That is checked on a
    copy on the CPU, in float32 or better.

    Encoders and heads can be trained; other parameters that were frozen stay frozen.

    Args:
        model: (B, C, H, W) -> (B, K): from torchvision, timm, fastai, or your own.
        num_members: M.
        encoder: name of the first convolution, as in `model.named_modules()`; found by running the
            model where not given.
        head: name of the last layer, linear or a convolution 1x1; found likewise.
        image_size: at which the model is tried; its own, or what works, where not given.
        perturbation: deviation of the perturbations, as a share of that of the weights.
        num_classes: K of new heads, drawn at random; the given one's where not given.
        in_channels: C; other channels than the model's get their share of its weights, see
            `with_channels`.
        generator: of the perturbations and of new heads.

    Raises:
        InputError: the model cannot be converted; the message says which part is missing.
    """
    _check_numbers(num_members, perturbation, num_classes)
    check_model(model)
    body = copy.deepcopy(model)
    modes = {module: module.training for module in body.modules()}
    placed = first_tensor(model)
    with _exact_arithmetic():
        body.cpu().to(torch.promote_types(placed.dtype, torch.float32)).eval()
        seen = look(body, sizes_of(body, image_size), encoder, in_channels)
        first = first_convolution(body, seen, encoder)
        last = last_linear(body, seen, head)
        convolution, linear = body.get_submodule(first.name), body.get_submodule(last.name)
        assert isinstance(convolution, nn.Conv2d)
        _replace(body, convolution, GivenFeatures())
        _replace(body, linear, nn.Identity())
        core = BackboneCore(body, first.name, last.name, convolution)
        _check_core(core, seen, first, last)
        encoders = _perturbed(convolution, num_members, 1 / num_members, perturbation, generator)
        heads = _perturbed(_as_linear(linear), num_members, 1.0, perturbation, generator)
        _check_sum(encoders, first, seen.name, torch.sum)
        _check_sum(heads, last, seen.name, torch.mean)
    if num_classes is not None and num_classes != last.output.shape[1]:
        heads = [_new_head(heads[0], num_classes, generator) for _ in range(num_members)]
    converted = MixMoModel(encoders, core, heads)
    for module in converted.modules():
        module.training = modes.get(module, model.training)
    for layers in (converted.encoders, converted.heads):
        layers.requires_grad_()
    if in_channels is not None:
        with_channels(converted, in_channels)
    converted.to(placed.device, placed.dtype)
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
def with_channels(model: MixMoModel, in_channels: int) -> MixMoModel:
    """Let a converted network take images of another number of channels, in place.

    Each new channel gets a share of the old ones' weights, as many times as it takes: one channel
    their sum, six channels each of three twice at half the weight. So an image whose channels are
    all alike gives what it gave.

    Args:
        model: from `convert_to_mixmo`.
        in_channels: C.

    Returns:
        the model.

    Raises:
        InputError: the first convolution takes its channels in groups.
    """
    if in_channels < 1:
        raise InputError(f"in_channels must be 1 or more; got {in_channels}.")
    for layer in model.encoders:
        assert isinstance(layer, nn.Conv2d)
        own = layer.in_channels
        if own == in_channels:
            continue
        if layer.groups != 1:
            raise InputError(
                f"The first convolution takes {own} channels in {layer.groups} groups; it cannot "
                f"take {in_channels} channels."
            )
        channels = torch.arange(max(own, in_channels))
        spread = torch.zeros(in_channels, own).index_put_(
            (channels % in_channels, channels % own), torch.ones(len(channels))
        )
        spread = spread / spread.sum(dim=0)  # what each old channel gives to each new one
        weight = torch.einsum("dchw,nc->dnhw", layer.weight, spread.to(layer.weight))
        layer.weight, layer.in_channels = nn.Parameter(weight.contiguous()), in_channels
    return model


def _check_numbers(num_members: int, perturbation: float, num_classes: int | None) -> None:
    if not isinstance(num_members, int) or num_members < 1:
        raise InputError(f"num_members must be a whole number, 1 or more; got {num_members!r}.")
    if not 0 <= perturbation < 1:
        raise InputError(f"perturbation must be at least 0 and below 1; got {perturbation}.")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise InputError(f"num_classes must be a whole number, 1 or more; got {num_classes!r}.")


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Compute as written, whatever precision the caller trains in."""
    with torch.autocast("cpu", enabled=False):
        yield


def _replace(body: nn.Module, layer: nn.Module, module: nn.Module) -> None:
    """Put a module where a layer is, under all of its names."""
    for parent in [*body.modules()]:
        for name, own in parent._modules.items():
            if own is layer:
                parent._modules[name] = module


def _as_linear(layer: nn.Module) -> nn.Linear:
    """Give a linear layer, or a convolution 1x1 of a map of one place as the linear one it is."""
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1:
        raise InputError("The last layer is a convolution in groups: heads cannot be made of it.")
    linear = _undrawn(layer.in_channels, layer.out_channels, bias=layer.bias is not None)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            parameter.copy_(layer.get_parameter(name).view_as(parameter))
    return linear


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
        drawn = parameter.new_zeros(count, *parameter.shape)
        if parameter.ndim > 1 and count > 1:  # what breaks the symmetry; biases follow
            drawn = torch.randn(drawn.shape, generator=generator).to(parameter)
            deviation = float(parameter.std(correction=0))
            drawn = (drawn - drawn.mean(dim=0)) * (perturbation * deviation)
        for own, noise in zip(copies, drawn, strict=True):
            own.get_parameter(name).copy_(scale * (parameter + noise))
    return copies


@torch.no_grad()
def _new_head(head: nn.Module, num_classes: int, generator: torch.Generator | None) -> nn.Module:
    """Make a head of other classes, with torch's initialisation."""
    assert isinstance(head, nn.Linear)
    made = _undrawn(head.in_features, num_classes, bias=head.bias is not None)
    bound = head.in_features**-0.5
    for parameter in made.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
    return made


def _undrawn(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """Make a linear layer without drawing from torch's global generator."""
    return nn.Linear(in_features, out_features, bias, device="meta").to_empty(device="cpu")


def _check_core(core: BackboneCore, seen: Seen, first: Call, last: Call) -> None:
    """Check that the core makes of the features what the network did, without the image.

    The image is not a number anywhere, which shows wherever it is looked at once more.
    """
    expected = last.input.flatten(1)
    found = _run(core, first.output, seen.name)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        raise InputError(f"{seen.name} does not hand its features on from layer to layer alone.")
    finite = bool(expected.isfinite().all())
    if finite and not found.isfinite().all():
        raise _shows_the_image(seen.name, first.name)
    if finite and _difference(found, expected) > EXACTNESS:
        raise InputError(
            f"{seen.name} looks at more of its image than the features of {first.name!r}, such as "
            "at its exact size; it cannot be converted."
        )
    trained = _run(copy.deepcopy(core).train(), first.output, seen.name, " in training")
    if not isinstance(trained, Tensor):
        raise InputError(
            f"{seen.name} gives {type(trained).__name__} in training, not logits alone.\n"
            "Build it without auxiliary outputs, as with aux_logits=False."
        )
    if finite and not trained.isfinite().all():
        raise _shows_the_image(seen.name, first.name, " in training")


def _run(core: BackboneCore, features: Tensor, model: str, when: str = "") -> object:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return core.run(features.clone(), float("nan"))
    except Exception as error:  # anything may happen in somebody's forward pass
        said = str(error).partition("\n")[0][:120].rstrip(".")
        raise InputError(
            f"{model} cannot be run{when} without its first convolution and last layer: "
            f"{type(error).__name__}: {said}."
        ) from error


def _shows_the_image(model: str, convolution: str, when: str = "") -> InputError:
    return InputError(
        f"{model} shows the image{when} to more than its first convolution, {convolution!r}, so "
        "that encoders would see a part of it only."
    )


@torch.no_grad()
def _check_sum(
    layers: list[nn.Module], call: Call, model: str, reduce: Callable[..., Tensor]
) -> None:
    """Check that the members' layers together give what the one layer gave."""
    given = call.input if isinstance(layers[0], nn.Conv2d) else call.input.flatten(1)
    found = reduce(torch.stack([layer(given) for layer in layers]), dim=0)
    expected = call.output.reshape(found.shape)
    if expected.isfinite().all() and _difference(found, expected) > EXACTNESS:
        raise InputError(
            f"{model} cannot be converted: its layer {call.name!r} ({type(layers[0]).__name__}) is "
            "not linear in its weights, such as one that normalises them."
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
