"""Load weights of the published MixMo implementation."""

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
    """Load a published state dict, vanilla or multi-member, into a model.

    Args:
        model: from `create_model`, with the same architecture, members and classes.
        state_dict: tensors by their published names.

    Raises:
        InputError: a tensor is missing, unknown or has another shape; the model is unchanged.

    Example:
        >>> layers = torch.nn.Conv2d(3, 8, 4, bias=False), torch.nn.Linear(8, 10)
        >>> model = MixMoModel(layers[:1], torch.nn.Flatten(), layers[1:])
        >>> shapes = {"conv1.weight": (8, 3, 4, 4), "fc.weight": (10, 8), "fc.bias": (10,)}
        >>> published = {name: torch.ones(shape) for name, shape in shapes.items()}
        >>> load_reference_state_dict(model, published)
        >>> model.heads[0].bias.sum().item()
        10.0
    """
    renamed = {rename(name): tensor for name, tensor in state_dict.items()}
    expected = model.state_dict()
    differences = [f"{name} is missing" for name in expected if name not in renamed]
    differences += [f"{name} is unknown" for name in renamed if name not in expected]
    differences += [
        f"{name} has shape {tuple(renamed[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in renamed and renamed[name].shape != expected[name].shape
    ]
    if differences:
        more = len(differences) - MAX_LISTED
        listed = "; ".join(differences[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(
            f"These weights belong to another network: {listed}.\n"
            "Check the architecture, the number of members and the number of classes."
        )
    model.load_state_dict(renamed)


def import_reference(
    state_dict: Mapping[str, Tensor], arch: str, num_classes: int, in_channels: int = 3
) -> MixMoModel:
    """Build a network and load a published state dict into it.

    Args:
        state_dict: tensors by their published names, from which the number of members is inferred.
        arch: name of the architecture, such as "wrn28_10".
        num_classes: K.
        in_channels: C.

    Raises:
        InputError: the state dict has another architecture or number of classes, or its values
            are not finite.

    Example:
        >>> import_reference({"conv1.weight": torch.zeros(16, 3, 3, 3)}, "wrn10_1", num_classes=10)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: These weights belong to another network: ...
    """
    heads = {match[1] for name in state_dict if (match := re.match(r"list_fc\.(\d+)\.", name))}
    model = create_model(arch, num_classes, max(1, len(heads)), in_channels)
    load_reference_state_dict(model, state_dict)
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"Tensor {name!r} of the checkpoint has values that are not finite.")
    return model


def read_reference_checkpoint(path: Path) -> dict[str, Tensor]:
    """Load the network's tensors from a checkpoint of the published implementation.

    Only tensors and plain containers are loaded; pickled code is rejected and never run.

    Raises:
        InputError: the file is missing or damaged, contains other objects, or has no network.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "published.ckpt")
        ...     torch.save({"classifier_state_dict": {"module.fc.bias": torch.zeros(10)}}, path)
        ...     [*read_reference_checkpoint(path)]
        ['fc.bias']
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings are for developers, not for users
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # an unpickler may raise anything on invalid content
        raise InputError(
            f"{path} cannot be loaded safely: it is damaged, or contains code or objects other "
            "than tensors.\n"
            "Pass a checkpoint of the published implementation that contains only tensors."
        ) from error
    tensors = stored.get(_STATE_KEY) if isinstance(stored, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise InputError(
            f"{path} has no tensors under {_STATE_KEY!r}; it is not a published MixMo checkpoint."
        )
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


_STATE_KEY = "classifier_state_dict"


def rename(name: str) -> str:
    """Convert a published tensor name to this project's; return unknown names unchanged.

    Example:
        >>> rename("layer1.0.conv1.weight"), rename("list_fc.1.bias")
        ('core.groups.0.0.conv1.weight', 'heads.1.bias')
    """
    for pattern, replacement in _RENAMES:
        if match := re.fullmatch(pattern, name):
            return re.sub(r"(?<=groups\.)\d+", _zero_based, match.expand(replacement))
    return name


def _zero_based(group: re.Match[str]) -> str:
    """Convert a group number, which starts at one in the published names."""
    return str(int(group[0]) - 1)
