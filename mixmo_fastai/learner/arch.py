"""Build a `MixMoModel` from the name of a network, a function that builds one, or a module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from fastai.learner import Learner
from torch import nn

from mixmo_fastai.config.choices import TORCHVISION_NETWORKS
from mixmo_fastai.errors import InputError, check_count
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.convert import convert_at_layers, find_end_layers
from mixmo_fastai.models.member_init import PERTURBATION, MemberInit


@dataclass(frozen=True)
class NetworkSpec:
    """Specification of the network to build.

    Attributes:
        image_shape: (C, H, W) of the data.
        num_classes: K; None to keep that of a module.
        num_members: M; None for the default.
        pretrained, weights, independent, perturbation: see `mixmo_learner`.
        unfreeze: unfreeze all parameters of a converted network.
        readout: readout of a new or converted network; None for the default.

    Raises:
        InputError: a number is not allowed.
    """

    image_shape: tuple[int, int, int]
    num_classes: int | None = None
    num_members: int | None = None
    pretrained: bool = False
    weights: Path | None = None
    independent: bool | None = None
    perturbation: float = PERTURBATION
    unfreeze: bool = True
    readout: str | nn.Module | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_members"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image_shape[1], self.image_shape[2]

    def num_members_for(self, arch: Any) -> int:
        """Return M: as specified, otherwise that of a `MixMoModel`, otherwise 2."""
        if self.num_members is not None:
            return self.num_members
        return arch.num_members if isinstance(arch, MixMoModel) else 2


def build_mixmo_model(
    arch: str | nn.Module | Callable[..., nn.Module], spec: NetworkSpec, generator: torch.Generator
) -> tuple[MixMoModel, bool]:
    """Build a `MixMoModel` from the name of a network, a function that builds one, or a module.

    Args:
        arch: see `mixmo_learner`.
        spec: the specification; `num_classes` is required unless arch is a module.
        generator: generator for all random initial weights.

    Returns:
        The network, and whether its members start alike, from weights that are usually trained.

    Raises:
        InputError: the network cannot be built, or does not fit the data.
    """
    if (name := network_name(arch)) is not None:
        assert spec.num_classes is not None
        model = create_model(
            name,
            spec.num_classes,
            spec.num_members_for(arch),
            spec.image_shape[0],
            image_size=spec.image_size,
            generator=generator,
            pretrained=spec.pretrained,
            weights=spec.weights,
            perturbation=spec.perturbation,
            readout=spec.readout,
        )
        return model.requires_grad_(), spec.pretrained or spec.weights is not None
    if isinstance(arch, Learner) or not callable(arch):
        raise InputError(
            "arch must be a name, a function that builds a network, or a network; got "
            f"{type(arch).__name__}.\nFor a Learner, pass learn.model."
        )
    if spec.pretrained or spec.weights is not None:
        given = "a network" if isinstance(arch, nn.Module) else "a function"
        argument = "pretrained=True" if spec.weights is None else "weights"
        raise InputError(
            f"{argument} needs arch to be a name; got {given}, which has its own weights.\n"
            f"Omit {argument.partition('=')[0]}."
        )
    second = None
    if not isinstance(arch, nn.Module):
        assert spec.num_classes is not None
        arch, second = _call_twice(arch, spec.num_classes, generator)
    if isinstance(arch, MixMoModel):
        _check_fits(arch, spec)
        if spec.readout is not None:
            arch.set_readout(spec.readout)
        return arch, False
    names = find_end_layers(arch, image_size=spec.image_size, in_channels=spec.image_shape[0])
    independent = [_weights_differ(arch, second, name) for name in (names.first, names.last)]
    if spec.independent is not None:
        independent = [spec.independent] * 2
    converted = convert_at_layers(
        arch,
        names,
        MemberInit(
            spec.num_members_for(arch),
            spec.perturbation,
            independent_encoders=independent[0],
            independent_heads=independent[1],
        ),
        num_classes=spec.num_classes,
        in_channels=spec.image_shape[0],
        unfreeze=spec.unfreeze,
        generator=generator,
    )
    converted.set_readout(spec.readout)
    return converted.requires_grad_() if spec.unfreeze else converted, not independent[0]


def network_name(arch: Any) -> str | None:
    """Return the name of a network, given by name or as torchvision's function; otherwise None."""
    if isinstance(arch, str):
        return arch
    name = getattr(arch, "__name__", None)
    is_torchvision = str(getattr(arch, "__module__", "")).startswith("torchvision.models.")
    return name if is_torchvision and name in TORCHVISION_NETWORKS else None


def count_outputs(model: MixMoModel) -> int:
    """Return the number of outputs of each head; 0 for heads that are no linear layer."""
    head = model.heads[0]
    return head.out_features if isinstance(head, nn.Linear) else 0


def _call_twice(
    function: Callable[..., nn.Module], num_classes: int, generator: torch.Generator
) -> list[nn.Module]:
    """Call a function that builds networks twice, with different random seeds.

    Pretrained weights are the same in both networks; randomly initialised weights differ.
    """
    args, kwargs = _class_arguments(function, num_classes)
    networks = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            torch.default_generator.manual_seed(seed)  # CPU only; GPU generators are not changed
            networks.append(function(*args, **kwargs))
        if not isinstance(networks[0], nn.Module):
            name = getattr(function, "__name__", type(function).__name__)
            raise InputError(
                f"{name!r} must return a network (nn.Module); it returned "
                f"{type(networks[0]).__name__}."
            )
    return networks


def _class_arguments(
    function: Callable[..., nn.Module], num_classes: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the arguments that pass the number of classes to a function, if it needs them."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = signature(function).parameters
    except ValueError as error:  # some functions not written in Python
        raise InputError(
            f"{name!r} has no signature that can be inspected; wrap it in a Python function."
        ) from error
    inner = function.func if isinstance(function, partial) else function
    bound = function.keywords if isinstance(function, partial) else {}
    # Pretrained weights need their own last layer, which the new heads replace.
    pretrained = bound.get("weights") is not None or bound.get("pretrained")
    own = signature(inner).parameters  # a bound parameter has a default in `parameters`
    if pretrained or any(name in bound and _is_number(own, name) for name in _CLASS_PARAMETERS):
        return (), {}
    parameter = next((name for name in _CLASS_PARAMETERS if _is_number(parameters, name)), None)
    if parameter is None and any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        is_fastai = str(getattr(inner, "__module__", "")).startswith("fastai.")
        parameter = "n_out" if is_fastai else "num_classes"
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    required = [
        p.name
        for p in parameters.values()
        if p.default is Parameter.empty and p.kind not in variadic and p.name != parameter
    ]
    if required:
        raise InputError(
            f"{name!r} requires {', '.join(required)}; only the number of classes can be passed to "
            f"it, as {parameter or _CLASS_PARAMETERS[0]}.\n"
            f"Bind the rest: functools.partial(…, {required[0]}=…)."
        )
    return (), {} if parameter is None else {parameter: num_classes}


_CLASS_PARAMETERS = ("num_classes", "n_out", "n_classes", "classes", "num_labels", "c", "k", "n")


def _is_number(parameters: Mapping[str, Parameter], name: str) -> bool:
    """Whether a parameter of this name is the number of classes.

    A single letter with a default, such as k=4, is likelier a width or a depth.
    """
    if name not in parameters:
        return False
    return len(name) > 1 or parameters[name].default is Parameter.empty


def _weights_differ(first: nn.Module, second: nn.Module | None, layer: str) -> bool:
    """Check whether the weights of a layer differ between two networks; False without a second."""
    if second is None:
        return False
    one, other = (model.get_submodule(layer).get_parameter("weight") for model in (first, second))
    return not torch.equal(one, other)


def _check_fits(model: MixMoModel, spec: NetworkSpec) -> None:
    """Check that an existing `MixMoModel` fits the data and the arguments."""
    num_outputs = count_outputs(model)
    if spec.num_classes is not None and num_outputs not in (0, spec.num_classes):
        raise InputError(
            f"The network has {num_outputs} classes, the data {spec.num_classes}.\n"
            "Build the network for the data, or pass num_classes."
        )
    if spec.num_members not in (None, model.num_members):
        raise InputError(
            f"num_members must be {model.num_members}, as in the network; got {spec.num_members}.\n"
            "Omit num_members."
        )
    encoder = model.encoders[0]
    if isinstance(encoder, nn.Conv2d) and encoder.in_channels != spec.image_shape[0]:
        raise InputError(
            f"The network expects images of {encoder.in_channels} channels; the data has "
            f"{spec.image_shape[0]}."
        )
