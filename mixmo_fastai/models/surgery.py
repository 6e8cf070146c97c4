"""MixMo around any backbone with a first convolution and a last linear layer.

The first convolution becomes M encoders, the last linear layer M heads, and what lies between them
the core. A network that is converted gives what it gave before, so that a pretrained one can be
trained on.

Shapes: B batch, M members, C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError, check_count, first_line
from mixmo_fastai.models.anatomy import (
    OTHER_SIZES,
    Call,
    Seen,
    Size,
    check_elsewhere,
    check_model,
    first_convolution,
    first_tensor,
    last_linear,
    look,
    output_layer,
    sizes_of,
)
from mixmo_fastai.models.backbone_core import BackboneCore, as_linear, take_out, undrawn
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
    independent: bool = False,
    num_classes: int | None = None,
    in_channels: int | None = None,
    generator: torch.Generator | None = None,
) -> MixMoModel:
    """Turn a network into a MixMo network of several members; the network itself is left alone.

    Encoders start as the first convolution divided by M, heads as copies of the last linear layer,
    each with a small perturbation of its own. Over the members these sum to zero, so that symmetry
    is broken and yet the converted network gives the outputs of the given one. That is checked on a
    copy, in float32 or better on the CPU; hooks of the network run there too.

    Encoders and heads can be trained; other parameters that were frozen stay frozen.

    A layer without parameters that turns each logit into a prediction by itself, such as the
    `SigmoidRange` of fastai's `y_range`, may follow the last layer. In training each member's
    logits go through it; the ensemble's prediction is made of the mean of the members' logits.

    Args:
        model: (B, C, H, W) -> (B, K): from torchvision, timm, fastai, or your own.
        num_members: M.
        encoder: name of the first convolution, as in `model.named_modules()`; found by running the
            model where not given.
        head: name of the last layer, linear or a convolution 1x1; found likewise.
        image_size: the only one at which the model is tried; its own or what works, and some
            others, where not given.
        perturbation: deviation of the perturbations, as a share of that of the weights.
        independent: for a model that is not trained yet: encoders and heads start apart, each with
            the numbers of the given layer in an order of its own.
        num_classes: K of new heads, drawn at random; the given one's where not given.
        in_channels: C; other channels than the model's get their share of its weights, see
            `with_channels`.
        generator: of the perturbations, orders and new heads.

    Raises:
        InputError: the model cannot be converted; the message says which part is missing.
    """
    members = Members(num_members, perturbation, independent, independent)
    _check_numbers(num_classes, in_channels)
    names = find_ends(
        model,
        encoder=encoder,
        head=head,
        image_size=image_size,
        elsewhere=image_size is None,
        in_channels=in_channels,
    )
    return convert_between(
        model,
        names,
        members,
        num_classes=num_classes,
        in_channels=in_channels,
        generator=generator,
    )


@dataclass(frozen=True)
class Members:
    """How the members of a converted network start.

    Attributes:
        count: M.
        perturbation: see `convert_to_mixmo`.
        encoders_apart, heads_apart: whether these start independently.
    """

    count: int = 2
    perturbation: float = 0.1
    encoders_apart: bool = False
    heads_apart: bool = False

    def __post_init__(self) -> None:
        check_count("num_members", self.count)
        if not isinstance(self.perturbation, Real) or not 0 <= self.perturbation < 1:
            raise InputError(
                f"perturbation must be at least 0 and below 1; got {self.perturbation!r}."
            )

    def encoders_of(self, layer: nn.Module, generator: torch.Generator | None) -> list[nn.Module]:
        """Make M encoders of a convolution."""
        if self.encoders_apart:
            return _reordered(layer, self.count, generator)
        return _perturbed(layer, self.count, 1 / self.count, self.perturbation, generator)

    def heads_of(self, layer: nn.Module, generator: torch.Generator | None) -> list[nn.Module]:
        """Make M heads of a linear layer."""
        if self.heads_apart:
            return _reordered(layer, self.count, generator)
        return _perturbed(layer, self.count, 1.0, self.perturbation, generator)


class Ends(NamedTuple):
    """Names of the layers at which a network is cut.

    Attributes:
        first: its first convolution.
        last: its last linear layer, or the convolution 1x1 in its place.
        output: the layer after it that turns logits into predictions; None without one.
    """

    first: str
    last: str
    output: str | None = None


def find_ends(
    model: nn.Module,
    *,
    encoder: str | None = None,
    head: str | None = None,
    image_size: Size | None = None,
    elsewhere: bool = True,
    in_channels: int | None = None,
) -> Ends:
    """Find the names of a network's first convolution and last layer, and try to cut them out.

    Args:
        model: see `convert_to_mixmo`, as for all that is not said here.
        encoder: name of the convolution, where it is known.
        head: name of the last layer, where it is known.
        image_size: at which it is tried first.
        elsewhere: whether it is tried at other sizes as well, if it takes them.
        in_channels: C, where it is known.

    Raises:
        InputError: the model cannot be converted; the message says which part is missing.
    """
    check_model(model)
    trial = _copied(model).cpu()
    trial.to(torch.promote_types(first_tensor(trial).dtype, torch.float32)).eval()
    with _undisturbed():
        sizes = sizes_of(trial, image_size)
        seen = look(trial, sizes, encoder, in_channels)
        if output := output_layer(trial, seen):
            take_out(trial, output)
            seen = look(trial, sizes, encoder, in_channels)
        first = first_convolution(trial, seen, encoder)
        check_elsewhere(trial, seen, first.name, OTHER_SIZES if elsewhere else ())
        last = last_linear(trial, seen, head)
        convolution, linear = trial.get_submodule(first.name), trial.get_submodule(last.name)
        core = BackboneCore(trial, first.name, last.name)
        _check_core(core, seen, first, last)
        _check_sum(_perturbed(convolution, 2, 0.5, 0.0, None), first, seen.name, torch.sum)
        _check_sum(_perturbed(as_linear(linear), 2, 1.0, 0.0, None), last, seen.name, torch.mean)
    return Ends(first.name, last.name, output)


def convert_between(
    model: nn.Module,
    names: Ends,
    members: Members,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    thaw: bool = True,
    generator: torch.Generator | None = None,
) -> MixMoModel:
    """Convert a network whose ends are known; see `convert_to_mixmo`.

    Args:
        model: that `find_ends` has found convertible.
        names: of the layers at which it is cut.
        members: how they start.
        num_classes: K of new heads.
        in_channels: C.
        thaw: whether encoders and heads train even when the layers that they are made of are
            frozen.
        generator: of all that is drawn.
    """
    _check_numbers(num_classes, in_channels)
    network = _copied(model)
    convolution, linear = (network.get_submodule(name) for name in names[:2])
    output = network.get_submodule(names.output) if names.output else None
    core = BackboneCore(network, *names)
    last = as_linear(linear)
    encoders = members.encoders_of(convolution, generator)
    heads = members.heads_of(last, generator)
    if num_classes is not None and num_classes != last.out_features:
        heads = [_new_head(last, num_classes, generator) for _ in range(members.count)]
    converted = MixMoModel(encoders, core, heads, output)
    converted.training = model.training
    for layers in (converted.encoders, converted.heads):
        layers.train(model.training)
        if thaw:
            layers.requires_grad_()
    return converted if in_channels is None else with_channels(converted, in_channels)


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
        trains = layer.weight.requires_grad
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=trains)
        layer.in_channels = in_channels
    return model


def _check_numbers(num_classes: int | None, in_channels: int | None) -> None:
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None:
            check_count(name, value)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever somebody's modules hold
        raise InputError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}.\n"
            "Something in it keeps tensors of a forward pass, as activations, pruned weights or "
            "old-style weight_norm do; take that off first."
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute as written, whatever precision the caller trains in, and leave no trace of it."""
    with torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        yield


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
        if parameter.ndim > 1 and count > 1 and perturbation:  # what breaks the symmetry
            drawn = torch.randn(drawn.shape, generator=generator).to(parameter)
            deviation = float(parameter.float().std(correction=0))
            drawn = (drawn - drawn.mean(dim=0)) * (perturbation * deviation)
        for own, noise in zip(copies, drawn, strict=True):
            own.get_parameter(name).copy_(scale * (parameter + noise))
    return copies


@torch.no_grad()
def _reordered(layer: nn.Module, count: int, generator: torch.Generator | None) -> list[nn.Module]:
    """Copy a layer, the numbers of each copy in an order of its own: draws of one distribution."""
    copies = [copy.deepcopy(layer) for _ in range(count)]
    for own in copies:
        for parameter in own.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copies


@torch.no_grad()
def _new_head(last: nn.Linear, num_classes: int, generator: torch.Generator | None) -> nn.Module:
    """Make a head of other classes, with torch's initialisation."""
    made, bound = undrawn(last.in_features, num_classes, like=last), last.in_features**-0.5
    for parameter in made.parameters():
        drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(drawn)
    return made


def _check_core(core: BackboneCore, seen: Seen, first: Call, last: Call) -> None:
    """Check that the core makes of the features what the network did, without the image.

    The image is not a number anywhere, which shows wherever it is looked at once more.
    """
    blind = torch.full_like(seen.image[:1, :1, :1, :1], float("nan")).expand_as(seen.image)
    expected = last.input.flatten(1)
    found = _run(core, first.output, blind, seen.name)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        raise InputError(f"{seen.name} does not hand its features on from layer to layer alone.")
    finite = bool(expected.isfinite().all())
    if finite and not found.isfinite().all():
        raise _shows_the_image(seen.name, first.name)
    if finite and _difference(found, expected) > EXACTNESS:
        raise InputError(
            f"{seen.name} needs more than the features of {first.name!r}, such as that "
            "convolution itself; it cannot be converted."
        )
    trained = _run(copy.deepcopy(core).train(), first.output, blind, seen.name, " in training")
    if not isinstance(trained, Tensor) or trained.shape != expected.shape:
        raise InputError(
            f"{seen.name} gives {type(trained).__name__} in training, not logits alone.\n"
            "Build it without auxiliary outputs, as with aux_logits=False."
        )
    if finite and not trained.isfinite().all():
        raise _shows_the_image(seen.name, first.name, " in training")


def _run(core: BackboneCore, features: Tensor, image: Tensor, model: str, when: str = "") -> object:
    try:
        with torch.no_grad():
            return core.run(features.clone(), image)
    except Exception as error:  # anything may happen in somebody's forward pass
        raise InputError(
            f"{model} cannot be run{when} without its first convolution and last layer: "
            f"{first_line(error)}."
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
