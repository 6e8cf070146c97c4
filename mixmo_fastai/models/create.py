"""Architecture names to networks."""

from collections.abc import Callable

import torch
from torch import nn

from mixmo_fastai.errors import InputError, check_count
from mixmo_fastai.models import preact_resnet, wide_resnet
from mixmo_fastai.models.backbones import build_backbone
from mixmo_fastai.models.initialization import initialize
from mixmo_fastai.models.mixmo_model import MixMoModel
from mixmo_fastai.models.surgery import Members, convert_between, find_ends
from mixmo_fastai.names import Architecture, parse_architecture

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
) -> MixMoModel:
    """Build a network by name: with the published initialisation, or its library's.

    Args:
        arch: "wrn<depth>_<width>" as in wrn28_10, "preact_resnet18_<width>", a classifier of
            torchvision as in "resnet50", or of timm as in "timm/convnext_atto".
        num_classes: K; 1 where a number is predicted.
        num_members: M; 1 is the vanilla network on the same code path.
        in_channels: C.
        image_size: height and width, for networks that are built for one size, such as vision
            transformers; their library's where not given.
        generator: of the initial weights.
        pretrained: whether to start from the library's trained weights; see `convert_to_mixmo`.

    Raises:
        InputError: the name or a number is not allowed, or there are no trained weights.
    """
    if not isinstance(arch, str):
        raise InputError(
            f"arch must be the name of a network, such as 'resnet50'; got {arch!r}.\n"
            "A network of your own is converted by convert_to_mixmo(model)."
        )
    parsed = parse_architecture(arch)
    check_count("num_classes", num_classes)
    check_count("num_members", num_members)
    check_count("in_channels", in_channels)
    if parsed.family in ("torchvision", "timm"):
        backbone = build_backbone(
            parsed, num_classes, image_size=image_size, pretrained=pretrained, generator=generator
        )
        names = find_ends(backbone, image_size=image_size)
        apart = not pretrained
        return convert_between(
            backbone,
            names,
            Members(num_members, encoders_apart=apart, heads_apart=apart),
            num_classes=num_classes,
            in_channels=in_channels,
            generator=generator,
        )
    if pretrained:
        raise InputError(
            f"There are no trained weights of {arch}; `mixmo import` reads published ones."
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn again below
        stem, core, width = _published(parsed)
        encoders = [stem(in_channels) for _ in range(num_members)]
        heads = [nn.Linear(width, num_classes) for _ in range(num_members)]
    model = MixMoModel(encoders, core, heads)
    initialize(model, generator)
    if parsed.family == "preact_resnet":
        for head in heads:
            nn.init.normal_(head.weight, std=PREACT_HEAD_STD, generator=generator)
    return model


def _published(arch: Architecture) -> tuple[Callable[[int], nn.Module], nn.Module, int]:
    """Give the function that makes encoders, the core, and the width of what the core gives."""
    if arch.family == "wrn":
        wide = wide_resnet.WideResNetCore(arch.depth, arch.width)
        return wide_resnet.stem, wide, wide.out_features
    preact = preact_resnet.PreActResNetCore(arch.width)
    return preact_resnet.stem, preact, preact.out_features
