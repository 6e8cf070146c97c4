"""Convert any network with a first convolution and a last linear layer into a MixMo network.

The first convolution is replaced by M encoders and the last linear layer by M heads; the layers
between them become the core. The converted network has the same outputs as the original, so a
pretrained network can be fine-tuned.

Shapes: B batch, M members, C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from mixmo_fastai.errors import InputError, check_count, summarize_error
from mixmo_fastai.models.backbone_core import (
    BackboneCore,
    as_linear,
    empty_linear,
    replace_with_identity,
)
from mixmo_fastai.models.conversion_checks import check_combined_output, check_core
from mixmo_fastai.models.forward_record import (
    Size,
    candidate_sizes,
    check_model,
    example_parameter,
    record_forward,
)
from mixmo_fastai.models.member_init import PERTURBATION, MemberInit, perturbed_copies
from mixmo_fastai.models.mixmo_model import MixMoModel
from mixmo_fastai.models.probe import (
    OTHER_SIZES,
    check_image_unchanged,
    find_first_convolution,
    find_last_linear,
    find_output_layer,
)


def convert_to_mixmo(
    model: nn.Module,
    num_members: int = 2,
    *,
    encoder: str | None = None,
    head: str | None = None,
    image_size: Size | None = None,
    perturbation: float = PERTURBATION,
    independent: bool = False,
    num_classes: int | None = None,
    in_channels: int | None = None,
    generator: torch.Generator | None = None,
) -> MixMoModel:
    """Convert a copy of a network into a MixMo network; the original is not modified.

    Encoders are initialised as the first convolution divided by M, heads as copies of the last
    linear layer, both with small random perturbations that break the symmetry between members. The
    perturbations sum to zero over the members, so the converted network has the same outputs as
    the original. This is checked with a copy on the CPU, in float32 or better, including the
    network's hooks.

    Encoders and heads are trainable; other frozen parameters remain frozen.

    An elementwise layer without parameters that turns logits into predictions, such as the
    `SigmoidRange` of fastai's `y_range`, may follow the last linear layer. In training it is
    applied to each member's logits, in evaluation to the mean of the members' logits.

    Args:
        model: (B, C, H, W) -> (B, K): from torchvision, timm, fastai, or your own.
        num_members: M.
        encoder: name of the first convolution, as in `model.named_modules()`; if None, it is found
            by running the model.
        head: name of the last layer, linear or a 1x1 convolution; if None, it is found in the same
            way.
        image_size: the only image size at which to run the model; if None, the size that the model
            declares or the first that works, and a few others.
        perturbation: standard deviation of the random numbers added to encoders, as a fraction of
            that of the weights, from 0 to 1, before their mean over the members is subtracted,
            which reduces it by a factor of sqrt(1 - 1 / M); heads have the same, but at most 0.1.
            Members that differ more diverge sooner in training, and are less accurate at first.
        independent: whether to initialise encoders and heads independently, each as a random
            permutation of the original layer's weights; for untrained models.
        num_classes: K; if it differs from the model's, heads are initialised randomly.
        in_channels: C; if it differs from the model's, weights are redistributed; see
            `set_in_channels`.
        generator: for perturbations, permutations and new heads.

    Raises:
        InputError: the model cannot be converted; the message names the missing part.

    Example:
        >>> from torchvision.models import resnet18
        >>> network, images = resnet18(num_classes=10).eval(), torch.ones(4, 3, 32, 32)
        >>> model = convert_to_mixmo(network, num_members=2, image_size=32)
        >>> torch.allclose(model(images), network(images), atol=1e-4)
        True
        >>> model.member_logits(images).shape
        torch.Size([4, 2, 10])
    """
    init = MemberInit(num_members, perturbation, independent, independent)
    _check_counts(num_classes, in_channels)
    names = find_end_layers(
        model,
        encoder=encoder,
        head=head,
        image_size=image_size,
        try_other_sizes=image_size is None,
        in_channels=in_channels,
    )
    return convert_at_layers(
        model,
        names,
        init,
        num_classes=num_classes,
        in_channels=in_channels,
        generator=generator,
    )


class EndLayers(NamedTuple):
    """Names of the layers that the conversion replaces.

    Attributes:
        first: the first convolution.
        last: the last linear layer, or a 1x1 convolution in its place.
        output: the layer after `last` that turns logits into predictions, if any.
    """

    first: str
    last: str
    output: str | None = None


def find_end_layers(
    model: nn.Module,
    *,
    encoder: str | None = None,
    head: str | None = None,
    image_size: Size | None = None,
    try_other_sizes: bool = True,
    in_channels: int | None = None,
) -> EndLayers:
    """Find a network's first convolution and last layer, and check that both can be replaced.

    Args:
        model: see `convert_to_mixmo`.
        encoder: name of the first convolution, if known.
        head: name of the last layer, if known.
        image_size: image size at which to run the model.
        try_other_sizes: whether to check other image sizes that the model accepts too.
        in_channels: C, if known.

    Raises:
        InputError: the model cannot be converted; the message names the missing part.

    Example:
        >>> layers = nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 1), nn.Sigmoid()
        >>> find_end_layers(nn.Sequential(*layers), image_size=4)
        EndLayers(first='0', last='2', output='3')
    """
    check_model(model)
    network = _copy_model(model).cpu()
    network.to(torch.promote_types(example_parameter(network).dtype, torch.float32)).eval()
    with _isolated_from_caller():
        sizes = candidate_sizes(network, image_size)
        record = record_forward(network, sizes, encoder, in_channels)
        if output := find_output_layer(network, record):
            replace_with_identity(network, output)
            record = record_forward(network, sizes, encoder, in_channels)
        first = find_first_convolution(network, record, encoder)
        check_image_unchanged(network, record, first.name, OTHER_SIZES if try_other_sizes else ())
        last = find_last_linear(network, record, head)
        convolution, linear = network.get_submodule(first.name), network.get_submodule(last.name)
        core = BackboneCore(network, first.name, last.name)
        check_core(core, record, first, last)
        encoders = perturbed_copies(convolution, 2, 0.5, 0.0, None)
        check_combined_output(encoders, first, record.name, torch.sum)
        heads = perturbed_copies(as_linear(linear), 2, 1.0, 0.0, None)
        check_combined_output(heads, last, record.name, torch.mean)
    return EndLayers(first.name, last.name, output)


def convert_at_layers(
    model: nn.Module,
    names: EndLayers,
    init: MemberInit,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    unfreeze: bool = True,
    generator: torch.Generator | None = None,
) -> MixMoModel:
    """Convert a network at known layers; see `convert_to_mixmo`.

    Args:
        model: a model that `find_end_layers` accepts.
        names: the layers to replace, from `find_end_layers`.
        init: how to initialise encoders and heads.
        num_classes: K of new heads.
        in_channels: C.
        unfreeze: whether encoders and heads are trainable even if the original layers are frozen.
        generator: for perturbations, permutations and new heads.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
        >>> names, init = EndLayers(first="0", last="2"), MemberInit(num_members=3)
        >>> model = convert_at_layers(network, names, init, num_classes=5)
        >>> model.member_logits(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 5])
    """
    _check_counts(num_classes, in_channels)
    network = _copy_model(model)
    convolution, linear = (network.get_submodule(name) for name in names[:2])
    output = network.get_submodule(names.output) if names.output else None
    core = BackboneCore(network, *names)
    last = as_linear(linear)
    encoders = init.make_encoders(convolution, generator)
    heads = init.make_heads(last, generator)
    num_classes = last.out_features if num_classes is None else num_classes
    if init.new_heads or num_classes != last.out_features:
        heads = [_new_head(last, num_classes, generator) for _ in range(init.num_members)]
    converted = MixMoModel(encoders, core, heads, output)
    converted.training = model.training
    for layers in (converted.encoders, converted.heads):
        layers.train(model.training)
        if unfreeze:
            layers.requires_grad_()
    return converted if in_channels is None else set_in_channels(converted, in_channels)


@torch.no_grad()
def set_in_channels(model: MixMoModel, in_channels: int) -> MixMoModel:
    """Change the number of image channels of a converted network, in place.

    The weights of the original channels are redistributed over the new channels: a single channel
    gets their sum; with six channels instead of three, each original channel is used twice at half
    its weight. Outputs for images whose channels are all equal do not change.

    Args:
        model: from `convert_to_mixmo`.
        in_channels: C.

    Returns:
        The model.

    Raises:
        InputError: the first convolution is grouped.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
        >>> model = convert_to_mixmo(network, image_size=4)
        >>> set_in_channels(model, 1)(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 10])
    """
    for layer in model.encoders:
        assert isinstance(layer, nn.Conv2d)
        current = layer.in_channels
        if current == in_channels:
            continue
        if layer.groups != 1:
            raise InputError(
                f"The first convolution has {layer.groups} groups of channels; cannot change "
                f"in_channels from {current} to {in_channels}."
            )
        channels = torch.arange(max(current, in_channels))
        mapping = torch.zeros(in_channels, current).index_put_(
            (channels % in_channels, channels % current), torch.ones(len(channels))
        )
        mapping = mapping / mapping.sum(dim=0)  # (new, old): fraction of each old channel's weight
        weight = torch.einsum("dchw,nc->dnhw", layer.weight, mapping.to(layer.weight))
        trainable = layer.weight.requires_grad
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=trainable)
        layer.in_channels = in_channels
    return model


def _check_counts(num_classes: int | None, in_channels: int | None) -> None:
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None:
            check_count(name, value)


def _copy_model(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # user modules may raise anything
        raise InputError(
            f"{type(model).__name__} cannot be copied: {summarize_error(error)}.\n"
            "One of its modules stores tensors of a forward pass, such as activations, pruned "
            "weights or old-style weight_norm; remove these first."
        ) from error


@contextmanager
def _isolated_from_caller() -> Iterator[None]:
    """Disable the caller's autocast, and restore the global RNG state afterwards."""
    with torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
def _new_head(last: nn.Linear, num_classes: int, generator: torch.Generator | None) -> nn.Module:
    """Create a head for other classes, with torch's default initialisation.

    That of some libraries depends on the number of classes instead of the features: with it,
    timm's EfficientNets begin with a loss of 6 for ten classes.
    """
    head, bound = empty_linear(last.in_features, num_classes, like=last), last.in_features**-0.5
    for parameter in head.parameters():
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(values)
    return head
