"""What a user has, as a MixMo network: a name, a function that makes networks, a network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from fastai.learner import Learner
from torch import nn

from mixmo_fastai.errors import InputError, check_count
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.surgery import MemberInit, convert_at_layers, find_end_layers
from mixmo_fastai.names import TORCHVISION_NETWORKS


@dataclass(frozen=True)
class Wanted:
    """What the network is to be like.

    Attributes:
        image_shape: (C, H, W) of the data.
        num_classes: K; None where that of a network stays.
        num_members: M; None where it is not said.
        pretrained, independent: see `mixmo_learner`.
        thaw: whether all of a network that is converted trains, whatever of it is frozen.

    Raises:
        InputError: a number is not allowed.
    """

    image_shape: tuple[int, int, int]
    num_classes: int | None = None
    num_members: int | None = None
    pretrained: bool = False
    independent: bool | None = None
    thaw: bool = True

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_members"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image_shape[1], self.image_shape[2]

    def members_of(self, arch: Any) -> int:
        """Tell M: what is said, or what a network has, or 2."""
        if self.num_members is not None:
            return self.num_members
        return arch.num_members if isinstance(arch, MixMoModel) else 2


def as_mixmo(
    arch: str | nn.Module | Callable[..., nn.Module], wanted: Wanted, generator: torch.Generator
) -> MixMoModel:
    """Make a MixMo network of what a user has: a name, a function, or a network.

    Args:
        arch: see `mixmo_learner`.
        wanted: what it is to be like; its classes must be known, but where arch is a network.
        generator: of all that is drawn.

    Raises:
        InputError: it cannot be made, or does not suit the data.
    """
    if (name := _name_of(arch)) is not None:
        assert wanted.num_classes is not None
        return create_model(
            name,
            wanted.num_classes,
            wanted.members_of(arch),
            wanted.image_shape[0],
            image_size=wanted.image_size,
            generator=generator,
            pretrained=wanted.pretrained,
        ).requires_grad_()
    if isinstance(arch, Learner) or not callable(arch):
        raise InputError(
            "arch must be a name, a function that makes a network, or a network; got "
            f"{type(arch).__name__}.\nOf a Learner it is learn.model."
        )
    if wanted.pretrained:
        what = "a network" if isinstance(arch, nn.Module) else "a function"
        raise InputError(
            f"pretrained=True goes with names; {what} brings its own weights.\nLeave it out."
        )
    twin = None
    if not isinstance(arch, nn.Module):
        assert wanted.num_classes is not None
        arch, twin = _called_twice(arch, wanted.num_classes, generator)
    if isinstance(arch, MixMoModel):
        _check_fits(arch, wanted)
        return arch
    names = find_end_layers(arch, image_size=wanted.image_size, in_channels=wanted.image_shape[0])
    apart = [_differ(arch, twin, name) for name in (names.first, names.last)]
    if wanted.independent is not None:
        apart = [wanted.independent] * 2
    converted = convert_at_layers(
        arch,
        names,
        MemberInit(
            wanted.members_of(arch), independent_encoders=apart[0], independent_heads=apart[1]
        ),
        num_classes=wanted.num_classes,
        in_channels=wanted.image_shape[0],
        unfreeze=wanted.thaw,
        generator=generator,
    )
    return converted.requires_grad_() if wanted.thaw else converted


def _name_of(arch: Any) -> str | None:
    """Give the name of a network, or of torchvision's function that makes it."""
    if isinstance(arch, str):
        return arch
    name = getattr(arch, "__name__", None)
    of_torchvision = str(getattr(arch, "__module__", "")).startswith("torchvision.models.")
    return name if of_torchvision and name in TORCHVISION_NETWORKS else None


def _called_twice(
    make: Callable[..., nn.Module], num_classes: int, generator: torch.Generator
) -> list[nn.Module]:
    """Call a function that makes networks twice; it names their classes in its own way.

    Where it brings trained weights, these are the same both times; what it draws differs.
    """
    unnamed, settings = _classes_for(make, num_classes)
    made = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            torch.default_generator.manual_seed(seed)  # not that of any GPU
            made.append(make(*unnamed, **settings))
        if not isinstance(made[0], nn.Module):
            name = getattr(make, "__name__", type(make).__name__)
            raise InputError(f"{name!r} makes {type(made[0]).__name__}, not a network.")
    return made


def _classes_for(
    make: Callable[..., nn.Module], num_classes: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Say the number of classes to a function in its own words, if it is to be told."""
    name = getattr(make, "__name__", type(make).__name__)
    try:
        known = signature(make).parameters
    except ValueError as error:  # of some that are not written in Python
        raise InputError(f"{name!r} does not say what it takes; wrap it in a function.") from error
    inner = make.func if isinstance(make, partial) else make
    bound = make.keywords if isinstance(make, partial) else {}
    # Trained weights bring their own last layer, of which new heads are made.
    trained = bound.get("weights") is not None or bound.get("pretrained")
    if trained or any(name in bound for name in _FOR_CLASSES):
        return (), {}
    named = next((name for name in _FOR_CLASSES if name in known), None)
    if named is None and any(p.kind is Parameter.VAR_KEYWORD for p in known.values()):
        of_fastai = str(getattr(inner, "__module__", "")).startswith("fastai.")
        named = "n_out" if of_fastai else "num_classes"
    if named is not None:
        return (), {named: num_classes}
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    needed = [
        p.name for p in known.values() if p.default is Parameter.empty and p.kind not in variable
    ]
    if needed:
        raise InputError(
            f"{name!r} needs {', '.join(needed)}; only the number of classes can be given to it, "
            f"as {_FOR_CLASSES[0]}.\nBind the rest: functools.partial(…, {needed[0]}=…)."
        )
    return (), {}


_FOR_CLASSES = ("num_classes", "n_out", "n_classes", "classes", "num_labels", "c", "k", "n")


def _differ(one: nn.Module, other: nn.Module | None, layer: str) -> bool:
    """Tell whether a layer has other weights in the other network; there may be none."""
    if other is None:
        return False
    ours, theirs = (model.get_submodule(layer).get_parameter("weight") for model in (one, other))
    return not torch.equal(ours, theirs)


def _check_fits(model: MixMoModel, wanted: Wanted) -> None:
    """Check that a network that is taken as it is suits the data, and what was said."""
    own = {head.out_features for head in model.heads if isinstance(head, nn.Linear)}
    if wanted.num_classes is not None and own - {wanted.num_classes}:
        raise InputError(
            f"The network has {', '.join(map(str, own))} classes, the data {wanted.num_classes}.\n"
            "Build it for the data, or say num_classes."
        )
    if wanted.num_members not in (None, model.num_members):
        raise InputError(
            f"The network has {model.num_members} members, not {wanted.num_members}.\n"
            "Leave num_members out."
        )
    stem = model.encoders[0]
    if isinstance(stem, nn.Conv2d) and stem.in_channels != wanted.image_shape[0]:
        raise InputError(
            f"The network takes images of {stem.in_channels} channels; the data has "
            f"{wanted.image_shape[0]}."
        )
