"""Build classifiers of torchvision, timm and one's own by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mixmo_fastai.config.choices import NETWORKS, Architecture, unknown_timm_error
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, summarize_error

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel, of pixels in [0, 1]."""
_FIXED_SIZE_PREFIXES = ("vit_", "maxvit_")


def build_backbone(
    arch: Architecture,
    num_classes: int,
    *,
    image_size: tuple[int, int] | None = None,
    pretrained: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Build a plain classifier.

    Args:
        arch: an architecture of torchvision, timm or `choices.NETWORKS`.
        num_classes: K; ignored if the pretrained weights include a classifier.
        image_size: height and width, for networks with a fixed input size; if None, the library's
            default.
        pretrained: whether to download the library's default pretrained weights.
        generator: for the initial weights; the state of torch's global generator is restored.

    Raises:
        InputError: timm is not installed or does not have the network, the network does not
            support the image size, or its weights cannot be downloaded.

    Example:
        >>> from mixmo_fastai.config.choices import parse_architecture
        >>> arch, generator = parse_architecture("resnet18"), torch.Generator().manual_seed(0)
        >>> network = build_backbone(arch, num_classes=10, generator=generator)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    if arch.family == "registered":
        with _seeded(seed):
            return _build_registered(arch.name, num_classes, pretrained=pretrained)
    with _seeded(seed):
        try:
            if arch.family == "torchvision":
                return _build_torchvision(arch.name, num_classes, image_size, pretrained)
            return _build_timm(arch.name, num_classes, image_size, pretrained)
        except InputError:
            raise
        except OSError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"The weights of {arch.name} cannot be downloaded: {reason}.\n"
                "Put the file in the library's cache folder, or name it: model.weights=FILE.\n"
                "Or train without pretrained weights."
            ) from error
        except (ValueError, AssertionError, RuntimeError) as error:
            size = f" for images of {image_size[0]}x{image_size[1]}" if image_size else ""
            raise InputError(
                f"{arch.name} cannot be built{size}: {summarize_error(error, max_length=200)}."
                + ("\nChoose another network or another image size." if size else "")
            ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed GPUs too
        yield


def pretrained_statistics(arch: Architecture) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels for which pretrained weights were trained.

    Args:
        arch: an architecture of torchvision or timm.

    Returns:
        one value per channel, of pixels in [0, 1]; ImageNet's if the library states none.

    Example:
        >>> from mixmo_fastai.config.choices import parse_architecture
        >>> mean, std = pretrained_statistics(parse_architecture("resnet18"))
        >>> mean, std
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    values: Any = (None, None)
    if arch.family == "timm":
        _check_timm(arch.name)
        import timm

        values = (timm.get_pretrained_cfg_value(arch.name, name) for name in ("mean", "std"))
    else:
        from torchvision.models import get_model_weights

        weights = [*get_model_weights(arch.name)]
        if weights:
            transform = get_model_weights(arch.name)["DEFAULT"].transforms()
            values = getattr(transform, "mean", None), getattr(transform, "std", None)
    mean, std = (
        tuple(map(float, value or default))
        for value, default in zip(values, IMAGENET_STATISTICS, strict=True)
    )
    return mean, std


def _build_registered(name: str, num_classes: int, *, pretrained: bool) -> nn.Module:
    """Build a network of `choices.NETWORKS`."""
    if pretrained:
        raise InputError(
            f"There are no pretrained weights for {name}.\nName a file of weights: "
            "model.weights=FILE, or weights=FILE in Python."
        )
    build = resolve_registered("network", name, NETWORKS[name])
    try:
        network = build(num_classes)
    except Exception as error:
        raise InputError(
            f"The network {name!r} cannot be built: {summarize_error(error, max_length=200)}.\n"
            "Its function is called with the number of classes."
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"The function of the network {name!r} must return a module; it returned "
            f"{type(network).__name__}."
        )
    return network


def _build_torchvision(
    name: str, num_classes: int, image_size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    from torchvision.models import get_model

    if pretrained and name in _WITH_AUXILIARY_HEADS:
        raise InputError(
            f"The pretrained {name} standardises its input inside the network, which MixMo does "
            "not support.\nChoose another network, or train it from scratch."
        )
    settings: dict[str, Any] = {} if pretrained else {"num_classes": num_classes}
    if name in _WITH_AUXILIARY_HEADS:
        # Auxiliary classifiers on intermediate features have no MixMo heads.
        settings |= {"aux_logits": False, "init_weights": True}
    if (
        image_size not in (None, (224, 224))
        and not pretrained
        and name.startswith(_FIXED_SIZE_PREFIXES)
    ):
        settings |= _image_size_settings(name, image_size)
    model: nn.Module = get_model(name, weights="DEFAULT" if pretrained else None, **settings)
    return model


def _image_size_settings(name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return torchvision's keyword argument for the input size of a network."""
    assert image_size is not None
    height, width = image_size
    if name.startswith("maxvit_"):
        return {"input_size": image_size}
    if height != width:
        raise InputError(
            f"{name} needs square images; got {height}x{width}.\n"
            "Set data.image_size in a recipe, or resize in the data loaders' transforms."
        )
    return {"image_size": height}


def _check_timm(name: str) -> None:
    if find_spec("timm") is None:
        raise InputError(
            f"timm/{name} requires timm.\nInstall it: pip install 'mixmo-fastai[timm]'"
        )


def _build_timm(
    name: str, num_classes: int, image_size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    _check_timm(name)
    import timm

    if name.partition(".")[0] not in (known := timm.list_models()):
        raise unknown_timm_error(name, known)
    has_classes = pretrained and timm.get_pretrained_cfg_value(name, "num_classes") != 0
    settings: dict[str, Any] = {} if has_classes else {"num_classes": num_classes}
    settings |= {"pretrained": pretrained}
    if image_size is not None and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        settings |= {"img_size": image_size}
    model: nn.Module = timm.create_model(name, **settings)
    return model
