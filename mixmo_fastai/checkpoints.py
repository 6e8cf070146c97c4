"""Saving and restoring the state of a run: tensors and text only, nothing that runs code.

Every random draw is a function of seed, epoch and step, and schedules are functions of progress, so
weights, optimizer state, the number of epochs and what callbacks keep are all the state there is.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from fastai.learner import Learner
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runs import RunFolder

FORMAT = 1


class Stateful(Protocol):
    """A callback whose state a resumed fit needs; `name` names its file."""

    name: str

    def state_tensors(self) -> dict[str, Tensor]:
        """Give the state."""

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take the state over."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a network's tensors, replacing the file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in unwrap(model).state_dict().items()
    }
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # as the other files of a run
    temporary.replace(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a network's tensors.

    Raises:
        InputError: the file is missing, damaged or of another network.
    """
    _put_tensors(model, _read_tensors(path), path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: the run is not finished. Continue it first."
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        unwrap(model).load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{path} holds another network than the recipe says: {first}") from error


def load_network(run: RunFolder) -> MixMoModel:
    """Build the network of a run of one network, from its files alone, on the CPU.

    Raises:
        InputError: the weights are missing, damaged or of another network than the recipe says.
    """
    run.check_trained()
    recipe, tensors = run.recipe(), _read_tensors(run.weights)
    head, encoder = (tensors.get(f"{part}.0.weight") for part in ("heads", "encoders"))
    if head is None or encoder is None or head.ndim != 2 or encoder.ndim != 4:
        raise InputError(f"{run.weights} holds another network than the recipe says.")
    model = create_model(
        recipe.model.arch, head.shape[0], recipe.model.num_members, encoder.shape[1]
    )
    _put_tensors(model, tensors, run.weights)
    return model.eval()


def save_checkpoint(
    run: RunFolder, learn: Learner, num_epochs: int, parts: Sequence[Stateful] = ()
) -> None:
    """Save the state after an epoch; the one before is there until this one is complete."""
    fresh = run.path / ".checkpoint.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    save_weights(learn.model, fresh / "model.safetensors")
    buffers = _momentum_buffers(learn)
    save_file(buffers, fresh / "optimizer.safetensors")
    for part in parts:
        state = {name: t.detach().cpu().contiguous() for name, t in part.state_tensors().items()}
        save_file(state, fresh / f"{part.name}.safetensors")
    summary = {"format": FORMAT, "num_epochs": num_epochs}
    (fresh / "state.json").write_text(json.dumps(summary))
    old = run.path / ".checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if run.checkpoint.exists():
        run.checkpoint.rename(old)
    fresh.rename(run.checkpoint)
    shutil.rmtree(old, ignore_errors=True)


def epochs_done(run: RunFolder) -> int:
    """Tell how many epochs a run has finished, 0 where there is no checkpoint yet.

    Raises:
        InputError: the checkpoint is damaged.
    """
    folder = run.saved_state
    if not folder.is_dir():
        return 0
    try:
        return _read_state(folder / "state.json")["num_epochs"]
    except (OSError, ValueError) as error:
        raise InputError(f"The checkpoint in {folder} is damaged: {error}.") from error


def load_checkpoint(run: RunFolder, learn: Learner, parts: Sequence[Stateful] = ()) -> int:
    """Restore the state of a run into a Learner that was built from its recipe, and its parts.

    Returns:
        the number of epochs that are done; 0, and nothing restored, before the first checkpoint.

    Raises:
        InputError: the checkpoint is damaged or of another run.
    """
    folder = run.saved_state
    if not folder.is_dir():
        return 0
    try:
        state = _read_state(folder / "state.json")
        buffers = load_file(folder / "optimizer.safetensors")
        states = [load_file(folder / f"{part.name}.safetensors") for part in parts]
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"The checkpoint in {folder} is damaged: {error}.") from error
    load_weights(learn.model, folder / "model.safetensors")
    if learn.opt is None:
        learn.create_opt()
    _restore_momentum(learn, buffers, folder)
    for part, part_state in zip(parts, states, strict=True):
        part.load_state_tensors(part_state)
    learn.mix_mo.epochs_trained = state["num_epochs"]
    return state["num_epochs"]


def _read_state(path: Path) -> dict[str, int]:
    state = json.loads(path.read_text())
    if not isinstance(state, dict) or type(state.get("num_epochs")) is not int:
        raise ValueError(f"{path.name} does not say how many epochs are done")
    if state.get("format") != FORMAT:
        raise ValueError(f"it has format {state.get('format')!r}; this version reads {FORMAT}")
    return state


def _momentum_buffers(learn: Learner) -> dict[str, Tensor]:
    state = learn.opt.opt.state
    return {
        name: state[parameter]["momentum_buffer"].detach().cpu().contiguous()
        for name, parameter in unwrap(learn.model).named_parameters()
        if state.get(parameter, {}).get("momentum_buffer") is not None
    }


def _restore_momentum(learn: Learner, buffers: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(unwrap(learn.model).named_parameters())
    if buffers.keys() - parameters.keys():
        raise InputError(f"The optimizer's state in {folder} is of another network.")
    for name, buffer in buffers.items():
        parameter = parameters[name]
        if buffer.shape != parameter.shape:
            raise InputError(f"The optimizer's state in {folder} is of another network: {name}.")
        # In the parameter's own layout: a fused optimizer takes no other.
        own = torch.empty_like(parameter, requires_grad=False).copy_(buffer)
        learn.opt.opt.state[parameter]["momentum_buffer"] = own
