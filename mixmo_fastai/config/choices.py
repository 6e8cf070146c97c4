"""Names that users may type: mask kinds, data sets, architectures, options. Standard library only.

The command line and recipes check names here, before torch or fastai is imported.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixmo_fastai.config.library_names import fastai_networks, timm_networks
from mixmo_fastai.errors import InputError, nearest, unknown_name_error

_REGIONS = "mixmo_fastai.mixing.regions"
MASK_REGIONS = {
    "sum": None,
    "linear": None,
    "cutmix": f"{_REGIONS}:box",
    "horizontal": f"{_REGIONS}:horizontal",
    "vertical": f"{_REGIONS}:vertical",
    "patchup": f"{_REGIONS}:blocks",
    "patchup-soft": f"{_REGIONS}:soft_blocks",
    "cow": f"{_REGIONS}:cow",
    "channel": f"{_REGIONS}:channels",
    "channel-stack": f"{_REGIONS}:first_channels",
    "noise": f"{_REGIONS}:noise",
}
"""Mask kinds by name: module and function that draws the region of role 0; None if the mask has the
same value at all positions."""
MASK_KINDS = tuple(MASK_REGIONS)
"""Kinds of feature mixing; masks are drawn by `mixmo_fastai.mixing.draw_masks`."""

COW_DEFAULTS = {"sigma_min": 4.0, "sigma_max": 16.0, "area_min": 0.2, "area_max": 0.8}
"""CowMask: bounds of the blur's standard deviation, in positions of the feature map, and of the
area, as a fraction."""
_BLOCK_OPTIONS = ("block_size",)
MASK_OPTIONS = {
    "patchup": _BLOCK_OPTIONS,
    "patchup-soft": _BLOCK_OPTIONS,
    "cow": tuple(COW_DEFAULTS),
}
"""Options of mask kinds, documented in `mixing/regions.py`; kinds without options are omitted."""

MSDA_KINDS = ("cutmix", "mixup")
"""Kinds of mixed-sample data augmentation inside each member; drawn by `mixing.msda`."""

EARLY_SHAPES = ("step", "linear", "cosine")
"""How the fraction of positions at which all members see the same image changes after the start of
training; computed by `mixing.pairing.scheduled_repetition`."""

READOUTS: dict[str, str | None] = {
    "core": None,
}
"""Readouts by name: how the heads read the core's maps. Each value is a module and a class; None
means the core's own pooling."""


@dataclass(frozen=True)
class TransformInfo:
    """Properties of a transform of training images, known before it is imported.

    Attributes:
        target: module and function that builds it; None if only crop and flip are applied.
        label: display name, added to the name of the method; "" for none.
        crops: whether the padded random crop of `data.crop_padding` is also applied.
        flips: whether the flips of `data.flip` are also applied.
        is_per_image: whether it processes single images, which requires the streaming loader.
    """

    target: str | None
    label: str = ""
    crops: bool = True
    flips: bool = True
    is_per_image: bool = False


_TORCHVISION_TRANSFORMS = "mixmo_fastai.data.torchvision_transforms"
TRANSFORMS = {
    "none": TransformInfo(None, crops=False, flips=False),
    "standard": TransformInfo(None),
    "randaugment": TransformInfo(
        f"{_TORCHVISION_TRANSFORMS}:rand_augment", "RandAugment", is_per_image=True
    ),
    "trivialaugment": TransformInfo(
        f"{_TORCHVISION_TRANSFORMS}:trivial_augment", "TrivialAugment", is_per_image=True
    ),
    "augmix": TransformInfo(f"{_TORCHVISION_TRANSFORMS}:augmix", "AugMix", is_per_image=True),
    "random-resized-crop": TransformInfo(
        "mixmo_fastai.data.resized_crop:random_resized_crop", "RandomResizedCrop", crops=False
    ),
    "aug-transforms": TransformInfo(
        "mixmo_fastai.data.fastai_transforms:aug_transforms", "aug_transforms", crops=False
    ),
}
"""Transforms of training images by name."""
CROPPING_TRANSFORM = "random-resized-crop"
"""The transform to which `data.crop_from` applies."""

OPTIMIZERS = {
    "sgd": "mixmo_fastai.learner.optimizers:sgd",
    "adamw": "mixmo_fastai.learner.optimizers:adamw",
    "muon": "mixmo_fastai.learner.optimizers:muon",
}
"""Optimizers by name. Each value is a module and a function that builds the optimizer."""

LOSSES = {
    "cross-entropy": "mixmo_fastai.learner.losses:cross_entropy",
    "focal": "mixmo_fastai.learner.losses:focal",
}
"""Losses of one class per image by name. Each value is a module and a function that builds it."""
CLASS_WEIGHTS = ("none", "balanced")

SELECTIONS = ("last", "best")
SCHEDULES = ("one-cycle", "flat-cosine", "published", "fine-tune")
CROP_SOURCES = ("auto", "original", "resized")
LOADERS = ("auto", "resident", "streaming")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16")
MEMORY_FORMATS = ("auto", "channels-last", "contiguous")
COMPILE = ("auto", "on", "off")
HUB_PREFIX = "hf:"
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
EXPORT_SUFFIXES = (".safetensors", ".onnx", ".pt2")


@dataclass(frozen=True)
class DatasetInfo:
    """Properties of a named data set, known before it is loaded.

    Attributes:
        num_classes: number of classes K.
        image_shape: (C, H, W) of one image.
        num_images: number of images in the training set and in the test set.
        mean, std: per channel, of pixels in [0, 1]; the published values if there are any.
        crop_padding: pixels of zero padding before the random crop.
        flip: whether a horizontal flip preserves the label.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    num_images: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 4
    flip: bool = True


_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4467), (0.2023, 0.1994, 0.2010)

DATASETS = {
    "digits": DatasetInfo(
        10, (1, 8, 8), (1442, 355), mean=(0.305,), std=(0.376,), crop_padding=1, flip=False
    ),
    "cifar10": DatasetInfo(10, (3, 32, 32), (50_000, 10_000), _CIFAR_MEAN, _CIFAR_STD),
    "cifar100": DatasetInfo(100, (3, 32, 32), (50_000, 10_000), _CIFAR_MEAN, _CIFAR_STD),
    "tinyimagenet": DatasetInfo(
        200, (3, 64, 64), (100_000, 10_000), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
}

ARCHITECTURE_FAMILIES = {
    "wrn<depth>_<width>": "WideResNet, depth 6n+4 (wrn28_10)",
    "preact_resnet18_<width>": "PreActResNet-18, width 1 is 64 to 512 channels (preact_resnet18_3)",
    "<name>": "a classifier of torchvision (resnet50)",
    "timm/<name>": "a classifier of timm (timm/convnext_atto)",
}
_TORCHVISION = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161
    densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
    efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l
    efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75
    mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf
    regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
    regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf
    regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d
    resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13
    vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32
    wide_resnet101_2 wide_resnet50_2
"""
TORCHVISION_NETWORKS = tuple(_TORCHVISION.split())
"""Classifiers of torchvision that can be converted to MixMo: all but SqueezeNet."""
NETWORKS: dict[str, str] = {}
"""Networks of one's own by name. Each value is a module and a function, of the number of classes,
that builds a plain classifier, which is converted."""


@dataclass(frozen=True)
class Architecture:
    """A parsed architecture name.

    Attributes:
        family: family of the architecture.
        depth, width: for the published families.
        name: name in torchvision, timm or `NETWORKS`.
    """

    family: Literal["wrn", "preact_resnet", "torchvision", "timm", "registered"]
    depth: int = 0
    width: int = 0
    name: str = ""


def is_table(dataset: str | Path) -> bool:
    """Check whether the name of a data set is that of a table."""
    return str(dataset).lower().endswith(TABLE_SUFFIXES)


def parse_optimizer(name: str) -> tuple[str, str]:
    """Split the name of an optimizer into its library and its name there.

    Names of optimizers in a library are not checked, since that requires importing it.

    Returns:
        "torch" or "fastai" and the name there; "" and the name for one of `OPTIMIZERS`.

    Raises:
        InputError: the name is unknown.
    """
    if name in OPTIMIZERS:
        return "", name
    if match := re.fullmatch(r"(torch|fastai)/(.+)", name):
        return match[1], match[2]
    error = unknown_name_error("optimizer", name, [*OPTIMIZERS, "torch/NAME", "fastai/NAME"])
    is_misspelt = "/" in name or nearest(name, OPTIMIZERS, cutoff=0.9) is not None
    hint = "" if is_misspelt else f"\nIf a library has it: torch/{name} or fastai/{name}."
    raise InputError(f"{error}{hint}")


def parse_architecture(name: str) -> Architecture:
    """Parse an architecture name such as "wrn28_10", "resnet50" or "timm/convnext_atto".

    Names of timm networks are not checked, since that requires importing timm.

    Raises:
        InputError: the name does not match any family, or its depth or width is invalid.
    """
    if name in NETWORKS:
        return Architecture("registered", name=name)
    if match := re.fullmatch(r"wrn(\d{1,4})_(\d{1,3})", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or (depth - 4) % 6:
            lower = max(10, depth - (depth - 4) % 6)
            raise InputError(
                f"Architecture {name!r}: the depth of a WideResNet is 6n+4 with n ≥ 1.\n"
                f"Nearest: wrn{lower}_{width} or wrn{lower + 6}_{width}."
            )
        if width < 1:
            raise InputError(f"Architecture {name!r}: the width must be 1 or more.")
        return Architecture("wrn", depth, width)
    if match := re.fullmatch(r"preact_resnet(\d{1,4})_(\d{1,3})", name):
        depth, width = int(match[1]), int(match[2])
        if depth != 18 or width < 1:
            raise InputError(
                f"Architecture {name!r}: PreActResNet has depth 18 and width 1 or more, "
                "such as preact_resnet18_3."
            )
        return Architecture("preact_resnet", depth, width)
    if name in TORCHVISION_NETWORKS:
        return Architecture("torchvision", name=name)
    if match := re.fullmatch(r"timm/([\w.-]+)", name):
        return Architecture("timm", name=match[1])
    if name in _WITHOUT_LINEAR_LAYER:
        raise InputError(
            f"{name} does not end with a linear layer: its last layer is a convolution before "
            "pooling, so MixMo cannot create member heads.\n"
            "Use another torchvision network, such as mobilenet_v2."
        )
    raise _unknown_architecture(name)


def unknown_timm_error(name: str, known: Iterable[str]) -> InputError:
    """Build the error for a network that timm does not have.

    Args:
        name: name without "timm/".
        known: names of timm's networks.
    """
    try:
        parse_architecture(name)
    except InputError:
        guess = None if name in fastai_networks() else nearest(name, known, cutoff=0.8)
    else:
        return InputError(f"timm has no network {name!r}.\nWrite it without timm/: {name!r}.")
    hint = f" Did you mean 'timm/{guess}'?" if guess else ""
    return InputError(
        f"timm has no network {name!r}.{hint}\ntimm.list_models() lists its networks."
    )


def _unknown_architecture(name: str) -> InputError:
    if name.partition(".")[0] in timm_networks():
        return InputError(
            f"{name!r} is a timm network. Write 'timm/{name}'.\n"
            "Names without timm/ are WideResNets, PreActResNets and torchvision classifiers."
        )
    if name in fastai_networks():
        return InputError(
            f"{name!r} is a fastai function, not an architecture name. Pass the function in "
            f"Python:\nfrom fastai.vision.models.xresnet import {name}; "
            f"mixmo_learner(dls, {name})"
        )
    guess = _correct_spelling(name)
    hint = f" Did you mean {guess!r}?" if guess else _timm_variants_hint(name)
    install = "" if timm_networks() else "\nFor timm networks: pip install 'mixmo-fastai[timm]'."
    return InputError(
        f"Unknown architecture {name!r}.{hint}\n"
        f"Examples: {', '.join(_EXAMPLE_ARCHITECTURES)}, resnet50 and other torchvision networks, "
        f"timm/NAME.{install}"
    )


def _correct_spelling(name: str) -> str | None:
    """Return the most probable architecture for a misspelt name, or None.

    Only small misspellings are corrected. A larger difference may indicate another network, for
    example of a library that is not installed.
    """
    if match := re.fullmatch(_WIDE_RESNET_PATTERN, name, re.IGNORECASE):
        return f"wrn{match[1]}_{match[2]}"
    architectures = {network: f"timm/{network}" for network in timm_networks()}
    architectures |= {name: name for name in (*_EXAMPLE_ARCHITECTURES, *TORCHVISION_NETWORKS)}
    guess = nearest(name, architectures, cutoff=0.8)
    return architectures[guess] if guess is not None and _is_misspelling(name, guess) else None


def _timm_variants_hint(name: str) -> str:
    """Suggest a timm network whose name starts with `name`; return "" if there is none."""
    variants = sorted(n for n in timm_networks() if n.startswith(f"{name.lower()}_"))
    if not variants:
        return ""
    shortest, count = min(variants, key=len), len(variants)
    networks = f"{count} networks that start" if count > 1 else "one network that starts"
    return f" timm has {networks} with this name, such as 'timm/{shortest}'."


def _is_misspelling(name: str, network: str) -> bool:
    """Check whether a name misspells a network (resnt50) and is not a variant of it (resnet50d)."""
    if network in _EXAMPLE_ARCHITECTURES:  # timm has no networks of these families
        return True
    typed, correct = (re.sub(r"[\W_]", "", text.lower()) for text in (name, network))
    if re.findall(r"\d+", typed) != re.findall(r"\d+", correct):
        return typed == correct
    one_letter_missing = {correct[:i] + correct[i + 1 :] for i in range(len(correct))}
    return sorted(typed) == sorted(correct) or typed in one_letter_missing


_WIDE_RESNET_PATTERN = r"(?:wrn|wide[-_ ]?resnet)[-_ ]?(\d{1,4})[-_ x](\d{1,3})"
_WITHOUT_LINEAR_LAYER = ("squeezenet1_0", "squeezenet1_1")
_EXAMPLE_ARCHITECTURES = (
    "wrn28_10",
    "wrn16_4",
    "wrn10_2",
    "preact_resnet18_1",
    "preact_resnet18_2",
    "preact_resnet18_3",
)
