"""Classifiers of torchvision and timm, by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mixmo_fastai.errors import InputError, nearest
from mixmo_fastai.names import Architecture

_WITH_AUXILIARY = ("googlenet", "inception_v3")


def build_backbone(
    arch: Architecture,
    num_classes: int,
    *,
    pretrained: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Build a plain classifier.

    Args:
        arch: of torchvision or timm.
        num_classes: K; not of a pretrained one, which has those that it was trained on.
        pretrained: whether weights are downloaded, the library's best.
        generator: of the initial weights; torch's global one is left as it was.

    Raises:
        InputError: timm is not installed or has no such network, or weights cannot be had.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with _seeded(seed):
        try:
            if arch.family == "torchvision":
                return _torchvision(arch.name, num_classes, pretrained)
            return _timm(arch.name, num_classes, pretrained)
        except OSError as error:
            raise InputError(
                f"The weights of {arch.name} cannot be downloaded: {error}.\n"
                "Train without them, or put them where the library looks for them."
            ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    settings: dict[str, Any] = {} if pretrained else {"num_classes": num_classes}
    if name in _WITH_AUXILIARY:
        # What looks at features in between would need heads of its own; pixels are standardised
        # by the loader.
        settings |= {} if pretrained else {"aux_logits": False, "init_weights": True}
    model: nn.Module = get_model(name, weights="DEFAULT" if pretrained else None, **settings)
    if name in _WITH_AUXILIARY and pretrained:
        vars(model).update(aux_logits=False, transform_input=False)
    return model


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    if find_spec("timm") is None:
        raise InputError(
            f"The network timm/{name} needs timm.\nInstall: pip install 'mixmo-fastai[timm]'"
        )
    import timm

    if name.partition(".")[0] not in (known := timm.list_models()):
        guess = nearest(name, known)
        hint = f" Did you mean 'timm/{guess}'?" if guess else ""
        raise InputError(f"timm has no network {name!r}.{hint}")
    settings: dict[str, Any] = {} if pretrained else {"num_classes": num_classes}
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
    return model
