"""Create networks from architecture names."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mixmo_fastai.config.choices import Architecture, parse_architecture
from mixmo_fastai.config.recipe import Model
from mixmo_fastai.errors import InputError, check_count, check_fraction
from mixmo_fastai.models import preact_resnet, wide_resnet
from mixmo_fastai.models.convert import convert_at_layers, find_end_layers
from mixmo_fastai.models.initialization import initialize
from mixmo_fastai.models.library import build_backbone
from mixmo_fastai.models.member_init import PERTURBATION, MemberInit
from mixmo_fastai.models.mixmo_model import MixMoModel
from mixmo_fastai.models.pretrained import SavedWeights

PREACT_HEAD_STD = 0.01


def create_model(
    arch: str,
    num_classes: int,
    num_members: int = 2,
    in_channels: int = 3,
    *,
    image_size: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    pretrained: bool = False,
    weights: Path | str | None = None,
    perturbation: float = PERTURBATION,
    readout: str | nn.Module | None = None,
) -> MixMoModel:
    """Create a network by name, with the published initialisation or that of its library.

    Args:
        arch: "wrn<depth>_<width>" such as "wrn28_10", "preact_resnet18_<width>", a torchvision
            classifier such as "resnet50", a timm one such as "timm/convnext_atto", or one of
            `choices.NETWORKS`.
        num_classes: K; 1 to regress one value.
        num_members: M; 1 is the vanilla network on the same code path.
        in_channels: C.
        image_size: height and width, for networks with a fixed input size, such as vision
            transformers; if None, the library's default.
        generator: for the initial weights.
        pretrained: whether to load the library's pretrained weights; see `convert_to_mixmo`.
        weights: file of pretrained weights to load instead: of the plain network, or the
            model.safetensors of a run with the same arch or its export; see `pretrained`.
        perturbation: how much members differ that start from such weights; see `convert_to_mixmo`.
        readout: how the heads read the core's maps; see `MixMoModel`.

    Raises:
        InputError: the name or a number is invalid, there are no pretrained weights, they belong to
            another network, or the core does not return the maps that the readout needs.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> model = create_model("wrn10_1", num_classes=10, num_members=2, generator=generator)
        >>> model(torch.zeros(4, 3, 32, 32)).shape  # ensemble logits
        torch.Size([4, 10])
        >>> model.member_logits(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 2, 10])
    """
    if not isinstance(arch, str):
        raise InputError(
            f"arch must be the name of a network, such as 'resnet50'; got {arch!r}.\n"
            "To convert a custom network, use convert_to_mixmo(model)."
        )
    parsed = parse_architecture(arch)
    check_count("num_classes", num_classes)
    check_count("num_members", num_members)
    check_count("in_channels", in_channels)
    check_fraction("perturbation", perturbation)
    saved = None if weights is None else SavedWeights.read(Path(weights))
    if parsed.family in ("torchvision", "timm", "registered"):
        model = _create_from_library(
            parsed,
            num_classes,
            num_members,
            in_channels,
            image_size=image_size,
            generator=generator,
            pretrained=pretrained and saved is None,
            saved=saved,
            perturbation=perturbation,
        )
        model.set_readout(readout)
    else:
        if saved is not None:
            saved.check_mixmo(arch)
        elif pretrained:
            raise InputError(
                f"There are no pretrained weights for {arch}.\n"
                "Omit pretrained, or pass the model.safetensors of a run that trained this network."
            )
        model = _create_published(
            parsed, num_classes, num_members, in_channels, generator=generator, readout=readout
        )
    if saved is not None and saved.is_mixmo:
        saved.load_mixmo(model, generator, perturbation)
    return model


def _create_from_library(
    arch: Architecture,
    num_classes: int,
    num_members: int,
    in_channels: int,
    *,
    image_size: tuple[int, int] | None,
    generator: torch.Generator | None,
    pretrained: bool,
    saved: SavedWeights | None,
    perturbation: float,
) -> MixMoModel:
    """Convert a classifier of torchvision or timm, with saved weights if those are of a plain one.

    Members are independent in layers without pretrained weights.
    """
    backbone = build_backbone(
        arch, num_classes, image_size=image_size, pretrained=pretrained, generator=generator
    )
    names = find_end_layers(backbone, image_size=image_size)
    has_body = has_head = pretrained
    if saved is not None and not saved.is_mixmo:
        has_body, has_head = True, saved.load_backbone(backbone, names.last)
    init = MemberInit(
        num_members,
        perturbation,
        independent_encoders=not has_body,
        independent_heads=not has_head,
        new_heads=saved is not None and not has_head,
    )
    return convert_at_layers(
        backbone,
        names,
        init,
        num_classes=num_classes,
        in_channels=in_channels,
        generator=generator,
    )


def _create_published(
    arch: Architecture,
    num_classes: int,
    num_members: int,
    in_channels: int,
    *,
    generator: torch.Generator | None,
    readout: str | nn.Module | None,
) -> MixMoModel:
    """Create a network of the paper with its published initialisation."""
    with torch.random.fork_rng(devices=[]):  # `initialize` draws all weights again
        stem, core, width = _build_published(arch)
        encoders = [stem(in_channels) for _ in range(num_members)]
        heads = [nn.Linear(width, num_classes) for _ in range(num_members)]
    model = MixMoModel(encoders, core, heads, readout=readout)
    initialize(model, generator)
    if arch.family == "preact_resnet":
        for head in heads:
            nn.init.normal_(head.weight, std=PREACT_HEAD_STD, generator=generator)
    return model


def build_model(
    settings: Model,
    num_classes: int,
    in_channels: int,
    *,
    image_size: tuple[int, int] | None = None,
) -> MixMoModel:
    """Create the network of a recipe, to load the weights of a run into it.

    Args:
        settings: the section `[model]` of the recipe.
        num_classes: K.
        in_channels: C.
        image_size: height and width of the images; see `create_model`.

    Example:
        >>> settings = Model(arch="wrn10_1", num_members=3)
        >>> model = build_model(settings, num_classes=10, in_channels=1)
        >>> model.member_logits(torch.zeros(4, 1, 32, 32)).shape
        torch.Size([4, 3, 10])
    """
    assert settings.arch is not None
    return create_model(
        settings.arch,
        num_classes,
        settings.num_members,
        in_channels,
        image_size=image_size,
        readout=settings.readout,
    )


def _build_published(arch: Architecture) -> tuple[Callable[[int], nn.Module], nn.Module, int]:
    """Return the function that builds an encoder, the core, and the core's output width."""
    if arch.family == "wrn":
        wide = wide_resnet.WideResNetCore(arch.depth, arch.width)
        return wide_resnet.stem, wide, wide.out_features
    preact = preact_resnet.PreActResNetCore(arch.width)
    return preact_resnet.stem, preact, preact.out_features
