"""Tensors of a network in one safetensors file."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models import MixMoModel, build_model
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runs.folder import RunFolder


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize tensors in the safetensors format."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt"})


def save_weights(model: nn.Module, run: RunFolder) -> None:
    """Write the tensors of a network into its run folder."""
    run.write_weights(to_bytes(unwrap(model).state_dict()))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the tensors of a file into a network.

    Raises:
        InputError: the file is missing, damaged or belongs to another network.
    """
    load_tensors(model, _read_tensors(path), path)


def load_network(run: RunFolder) -> MixMoModel:
    """Build the network of a run with a single network from its files, on the CPU.

    Raises:
        InputError: the weights are missing, damaged or do not match the recipe.
    """
    run.check_trained()
    recipe, tensors = run.recipe(), _read_tensors(run.weights)
    head, encoder = (tensors.get(f"{part}.0.weight") for part in ("heads", "encoders"))
    if head is None or encoder is None or head.ndim != 2 or encoder.ndim != 4:
        raise InputError(
            f"{run.weights} does not match the recipe: it needs the weights of heads and encoders."
        )
    facts = run.data_facts()
    model = build_model(
        recipe.model,
        head.shape[0],
        encoder.shape[1],
        image_size=None if facts is None else (facts.image_shape[1], facts.image_shape[2]),
    )
    load_tensors(model, tensors, run.weights)
    return model.eval()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a network.

    Args:
        model: the network.
        tensors: its tensors by name.
        path: the file they come from, for messages.

    Raises:
        InputError: the tensors belong to another network.
    """
    expected = unwrap(model).state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.dtype != expected[name].dtype:
            raise InputError(f"{path} holds {name} as {tensor.dtype}, not {expected[name].dtype}.")
    try:
        unwrap(model).load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{path} does not match the recipe: {first}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: the run is not finished. Continue it first."
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
