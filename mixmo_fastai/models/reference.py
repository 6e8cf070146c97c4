"""Weights of the published implementation, under this project's names."""

import re
from collections.abc import Mapping

from torch import Tensor

from mixmo_fastai.errors import InputError
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


def rename(name: str) -> str:
    """Turn a published tensor name into this project's; an unknown one stays as it is."""
    for pattern, replacement in _RENAMES:
        if match := re.fullmatch(pattern, name):
            return re.sub(r"(?<=groups\.)\d+", _from_zero, match.expand(replacement))
    return name


def _from_zero(group: re.Match[str]) -> str:
    """Groups are numbered from one in the published names."""
    return str(int(group[0]) - 1)
