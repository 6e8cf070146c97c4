"""Weights of the published implementation, under this project's names."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.create import create_model
from mixmo_fastai.models.mixmo_model import MixMoModel

_RENAMES = (
    (r"conv1\.(weight)", r"encoders.0.\1"),
    (r"list_conv1\.(\d+)\.(weight)", r"encoders.\1.\2"),
    (r"layer(\d+)\.(\d+)\.shortcut\.0\.weight", r"core.groups.\1.\2.shortcut.weight"),
    (r"layer(\d+)\.(\d+)\.(.+)", r"core.groups.\1.\2.\3"),
    (r"bn1\.(.+)", r"core.bn.\1"),
    (r"fc\.(weight|bias)", r"heads.0.\1"),
    (r"list_fc\.(\d+)\.(weight|bias)", r"heads.\1.\2"),
)
MAX_LISTED = 3


def load_reference_state_dict(model: MixMoModel, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a published network, vanilla or of several members, into a model.

    Args:
        model: of the same architecture, members and classes, from `create_model`.
        state_dict: published names to tensors.

    Raises:
        InputError: a tensor is missing, unknown or of another shape; the model is then unchanged.
    """
    renamed = {rename(name): tensor for name, tensor in state_dict.items()}
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in renamed]
    differences += [f"{name} is unknown" for name in renamed if name not in own]
    differences += [
        f"{name} is {tuple(renamed[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in renamed and renamed[name].shape != own[name].shape
    ]
    if differences:
        more = len(differences) - MAX_LISTED
        listed = "; ".join(differences[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(
            f"These weights are of another network: {listed}.\n"
            "Check the architecture, the number of members and the number of classes."
        )
    model.load_state_dict(renamed)


def import_reference(
    state_dict: Mapping[str, Tensor], arch: str, num_classes: int, in_channels: int = 3
) -> MixMoModel:
    """Build the network that a published state dict is of, with its weights.

    Args:
        state_dict: published names to tensors; it tells the number of members.
        arch: as in "wrn28_10".
        num_classes: K.
        in_channels: C.

    Raises:
        InputError: the tensors are of another architecture or number of classes.
    """
    heads = {match[1] for name in state_dict if (match := re.match(r"list_fc\.(\d+)\.", name))}
    model = create_model(arch, num_classes, max(1, len(heads)), in_channels)
    load_reference_state_dict(model, state_dict)
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"The checkpoint's tensor {name!r} holds values that are not finite.")
    return model


def read_reference_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the network's tensors from a checkpoint of the published implementation.

    Only tensors and plain containers are read; code that a pickle may hold is refused, never run.

    Raises:
        InputError: the file is missing, damaged, holds anything else, or has no network in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to developers
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # an unpickler may raise anything on other content
        raise InputError(
            f"{path} is not a checkpoint that can be read safely: it is damaged, or holds code or "
            "other things than tensors.\n"
            "Give a checkpoint of the published implementation, with tensors only."
        ) from error
    tensors = stored.get(_STATE_KEY) if isinstance(stored, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise InputError(
            f"{path} has no tensors under {_STATE_KEY!r}; it is no published checkpoint of MixMo."
        )
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


_STATE_KEY = "classifier_state_dict"


def rename(name: str) -> str:
    """Turn a published tensor name into this project's; an unknown one stays as it is."""
    for pattern, replacement in _RENAMES:
        if match := re.fullmatch(pattern, name):
            return re.sub(r"(?<=groups\.)\d+", _from_zero, match.expand(replacement))
    return name


def _from_zero(group: re.Match[str]) -> str:
    """Groups are numbered from one in the published names."""
    return str(int(group[0]) - 1)
