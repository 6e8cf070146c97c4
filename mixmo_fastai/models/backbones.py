"""Classifiers of torchvision and timm, by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mixmo_fastai.errors import InputError, first_line
from mixmo_fastai.names import Architecture, unknown_in_timm

_WITH_AUXILIARY = ("googlenet", "inception_v3")
_OF_FIXED_SIZE = ("vit_", "maxvit_")


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
        arch: of torchvision or timm.
        num_classes: K; not of a pretrained one, which has those that it was trained on.
        image_size: height and width, for networks that are built for one size; the library's where
            not given.
        pretrained: whether weights are downloaded, the library's best.
        generator: of the initial weights; torch's global one is left as it was.

    Raises:
        InputError: timm is not installed or has no such network, it cannot be built for that size,
            or weights cannot be had.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with _seeded(seed):
        try:
            if arch.family == "torchvision":
                return _torchvision(arch.name, num_classes, image_size, pretrained)
            return _timm(arch.name, num_classes, image_size, pretrained)
        except InputError:
            raise
        except OSError as error:
            raise InputError(
                f"The weights of {arch.name} cannot be downloaded: {error}.\n"
                "Train without them, or put them where the library looks for them."
            ) from error
        except (ValueError, AssertionError, RuntimeError) as error:
            size = f" for images of {image_size[0]}x{image_size[1]}" if image_size else ""
            raise InputError(
                f"{arch.name} cannot be built{size}: {first_line(error, most=200)}."
                + ("\nTake another network, or images of another size." if size else "")
            ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not that of any GPU
        yield


def _torchvision(
    name: str, num_classes: int, image_size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    from torchvision.models import get_model

    if pretrained and name in _WITH_AUXILIARY:
        raise InputError(
            f"The trained weights of {name} want pixels standardised in a way of their own, within "
            "the network.\nTake another network, or train it from the start."
        )
    settings: dict[str, Any] = {} if pretrained else {"num_classes": num_classes}
    if name in _WITH_AUXILIARY:
        # What looks at features in between would need heads of its own.
        settings |= {"aux_logits": False, "init_weights": True}
    if image_size not in (None, (224, 224)) and not pretrained and name.startswith(_OF_FIXED_SIZE):
        settings |= _built_for(name, image_size)
    model: nn.Module = get_model(name, weights="DEFAULT" if pretrained else None, **settings)
    return model


def _built_for(name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Say to torchvision which size of images a network is to be built for."""
    assert image_size is not None
    height, width = image_size
    if name.startswith("maxvit_"):
        return {"input_size": image_size}
    if height != width:
        raise InputError(
            f"{name} takes square images; these are {height}x{width}.\n"
            "Scale them: data.image_size of a recipe, or your loaders' transforms."
        )
    return {"image_size": height}


def _timm(
    name: str, num_classes: int, image_size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    if find_spec("timm") is None:
        raise InputError(
            f"The network timm/{name} needs timm.\nInstall: pip install 'mixmo-fastai[timm]'"
        )
    import timm

    if name.partition(".")[0] not in (known := timm.list_models()):
        raise unknown_in_timm(name, known)
    has_classes = pretrained and timm.get_pretrained_cfg_value(name, "num_classes") != 0
    settings: dict[str, Any] = {} if has_classes else {"num_classes": num_classes}
    settings |= {"pretrained": pretrained}
    if image_size is not None and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        settings |= {"img_size": image_size}
    model: nn.Module = timm.create_model(name, **settings)
    return model
