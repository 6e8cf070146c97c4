"""Save the state of a run's Learner in a checkpoint, and restore it.

    state.json              position in training, schedule, recipe, fingerprint of the data
    model.safetensors       weights and running statistics
    optimizer.safetensors   state of the optimizer, such as momentum
    <callback>.safetensors  state of a callback: averaged weights, weights of the best epoch
    history.json            rows of the completed epochs, sums of the current epoch

Every random draw is a function of seed, epoch and step, so no RNG state is saved; bfloat16 needs no
gradient scaler. Exactly these files must be present and match the run, otherwise it is not resumed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from fastai.learner import Learner
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.callbacks.freeze import FreezeCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runs.checkpoints import CheckpointStore, Saved
from mixmo_fastai.runs.weights import load_tensors, to_bytes
from mixmo_fastai.runtime.processes import process_group
from mixmo_fastai.training.identity import check_identity
from mixmo_fastai.training.optimizer_state import (
    check_complete,
    optimizer_tensors,
    restore_optimizer,
)

HYPERS = ("lr", "mom")


@dataclass(frozen=True)
class Position:
    """Progress of training.

    Attributes:
        epoch: number of completed epochs, including their validation.
        step: number of completed steps of the next epoch; all of them if only validation is left.
    """

    epoch: int = 0
    step: int = 0


class Stateful(Protocol):
    """A callback whose tensors a resumed fit needs; `name` is the name of its file."""

    name: str

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state."""

    def load_state_tensors(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Load the state.

        Args:
            state: the output of `state_tensors`.
            like: tensors of the network, to compare names and shapes.
        """


class History(Protocol):
    """The callback that records the metrics of a run."""

    is_diverged: bool

    def state(self) -> dict[str, Any]:
        """Return a state that JSON can represent; all processes call this together."""

    def load_state(self, state: Mapping[str, Any], *, within_epoch: bool) -> None:
        """Load the state."""

    def stop_diverged(self) -> None:
        """End the fit because its values are not finite."""


class NotFiniteError(RuntimeError):
    """A state holds values that are not finite; the message names the first such tensor."""


@dataclass(frozen=True)
class RunState:
    """The complete state of a run, as saved in checkpoints.

    Attributes:
        learn: the Learner with network, optimizer and recorder.
        history: the callback that records metrics.
        parts: callbacks with their own tensors.
        identity: settings that must be equal when the run is resumed: recipe and data, nested
            dictionaries as in JSON.
        freezing: the callback that freezes parameters; None if all are trained from the start.
    """

    learn: Learner
    history: History
    parts: Sequence[Stateful]
    identity: Mapping[str, Any]
    freezing: FreezeCallback | None = None

    def save(self, store: CheckpointStore | None, position: Position) -> None:
        """Save the state; all processes call this at the same position.

        Args:
            store: the checkpoint store; None on ranks other than 0, which do not write.
            position: the position in training.

        Raises:
            NotFiniteError: a value of the network, an average or the optimizer is not finite;
                nothing was written.
            OSError: the checkpoint cannot be written; existing checkpoints are kept.
        """
        with ExitStack() as stack:
            for part in self.parts:
                if isinstance(part, EMACallback):
                    stack.enter_context(part.training_weights())
            tensors, history = self._tensors(), self.history.state()
            _check_finite(tensors)
            if store is not None:
                store.save(self._files(tensors, history, position))

    def check_storable(self) -> None:
        """Raise an InputError if a checkpoint cannot hold the optimizer's state, after a step."""
        optimizer_tensors(self.learn.opt, self._parameters())

    def restore(self, saved: Saved) -> "Restored":
        """Load the state of a checkpoint into the Learner.

        Raises:
            InputError: something is missing, unknown or different from this run; the message names
                it.
        """
        expected = {*self._tensor_files(), "state.json", "history.json"}
        if different := sorted(expected ^ set(saved.files)):
            problem = "lacks" if different[0] in expected else "has the unexpected file"
            raise InputError(f"The checkpoint {saved.path} {problem} {different[0]}.\n{_NEW_RUN}")
        try:
            state, history = (
                json.loads((saved.path / name).read_bytes())
                for name in ("state.json", "history.json")
            )
            tensors = {
                name: load_file(saved.path / f"{name}.safetensors")
                for name in ("model", "optimizer", *(part.name for part in self.parts))
            }
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise InputError(f"The checkpoint {saved.path} cannot be read: {error}.") from error
        restored = Restored.from_mapping(state, saved.path)
        check_identity(self.identity, state, saved.path)
        self._check_position(restored, saved.path)
        load_tensors(self.learn.model, tensors["model"], saved.path / "model.safetensors")
        self._restore_optimizer(tensors["optimizer"], restored, saved.path)
        for part in self.parts:
            part.load_state_tensors(tensors[part.name], unwrap(self.learn.model).state_dict())
        self.history.load_state(history, within_epoch=restored.position.step > 0)
        self.learn.mix_mo.epochs_trained = restored.position.epoch
        return restored

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(unwrap(self.learn.model).named_parameters())

    def _tensor_files(self) -> list[str]:
        names = ("model", "optimizer", *(part.name for part in self.parts))
        return [f"{name}.safetensors" for name in names]

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": unwrap(self.learn.model).state_dict(),
            "optimizer": optimizer_tensors(self.learn.opt, self._parameters()),
            **{part.name: part.state_tensors() for part in self.parts},
        }

    def _files(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        history: Mapping[str, Any],
        position: Position,
    ) -> Iterator[tuple[str, bytes]]:
        recorder = self.learn.recorder.smooth_loss  # per member; checkpoints hold the sum
        num_members = unwrap(self.learn.model).num_members
        state = {
            **asdict(position),
            "steps_per_epoch": len(self.learn.dls.train),
            "pct_train": self.learn.pct_train,
            "hypers": _hypers(self.learn),
            "smooth_loss": float(recorder.val) * num_members,
            "smooth_count": recorder.count,
            "torch": torch.__version__,
            "num_processes": process_group().count,
            "num_threads": torch.get_num_threads(),
            **self.identity,
        }
        yield "state.json", _as_json(state)
        yield "history.json", _as_json(history)
        for name, part in tensors.items():
            yield f"{name}.safetensors", to_bytes(part)

    def _check_position(self, restored: "Restored", path: Path) -> None:
        steps, position = len(self.learn.dls.train), restored.position
        epochs = self.identity["recipe"]["train"]["epochs"]
        is_within = position.epoch < epochs or (position.epoch == epochs and position.step == 0)
        if restored.steps_per_epoch != steps or position.step > steps or not is_within:
            raise InputError(
                f"The checkpoint {path} is at step {position.step} of "
                f"{restored.steps_per_epoch} of epoch {position.epoch + 1}; this run has {epochs} "
                f"epochs of {steps} steps.\n"
                f"{_NEW_RUN}"
            )

    def _restore_optimizer(
        self, tensors: Mapping[str, Tensor], restored: "Restored", path: Path
    ) -> None:
        learn = self.learn
        if learn.opt is None:
            learn.create_opt()
        if len(restored.hypers) != len(learn.opt.hypers):
            raise InputError(
                f"The optimizer state in {path} has {len(restored.hypers)} parameter groups; "
                f"this run has {len(learn.opt.hypers)}.\n{_NEW_RUN}"
            )
        parameters = self._parameters()
        frozen: set[int] = set()
        if self.freezing is not None:
            self.freezing.learn = learn
            position = restored.position
            self.freezing.freeze_before(position.epoch * restored.steps_per_epoch + position.step)
            frozen = {id(parameter) for parameter in self.freezing.frozen}
        trained = {name for name, parameter in parameters.items() if id(parameter) not in frozen}
        hypers = () if restored.position == Position() else restored.hypers
        try:
            check_complete(learn.opt, trained, tensors, hypers)
            restore_optimizer(learn.opt, parameters, tensors)
        except ValueError as error:
            raise InputError(
                f"The optimizer state in {path} belongs to another network: {error}.\n{_NEW_RUN}"
            ) from error


@dataclass(frozen=True)
class Restored:
    """The state from which a fit continues.

    Attributes:
        position: completed epochs and steps.
        steps_per_epoch: steps per epoch of the saved run.
        pct_train: completed fraction of training, as accumulated by fastai.
        hypers: learning rate and momentum of each parameter group.
        smooth_loss, smooth_count: state of fastai's recorder; the loss is a sum over members.
        torch: version of torch that trained so far.
        num_processes: number of processes that trained so far.
        num_threads: threads of each of them; None in checkpoints of version 0.1.0.
    """

    position: Position
    steps_per_epoch: int
    pct_train: float
    hypers: tuple[dict[str, float], ...]
    smooth_loss: float
    smooth_count: int
    torch: str
    num_processes: int
    num_threads: int | None = None

    @classmethod
    def from_mapping(cls, values: Any, path: Path) -> "Restored":
        """Build from the content of state.json.

        Raises:
            InputError: a value is missing or has the wrong type.
        """
        try:
            epoch, step, steps, count, processes = (
                _check_count(values[name])
                for name in ("epoch", "step", "steps_per_epoch", "smooth_count", "num_processes")
            )
            pct_train, smooth_loss = float(values["pct_train"]), float(values["smooth_loss"])
            hypers = tuple(
                {name: float(group[name]) for name in HYPERS if name == "lr" or name in group}
                for group in values["hypers"]
            )
            version, threads = str(values["torch"]), values.get("num_threads")
            threads = None if threads is None else _check_count(threads)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(
                f"state.json of the checkpoint {path} is not valid ({problem}).\n{_NEW_RUN}"
            ) from error
        position = Position(epoch, step)
        return cls(
            position, steps, pct_train, hypers, smooth_loss, count, version, processes, threads
        )


_NEW_RUN = (
    "Nothing was changed. Resume with the files the run was started with, or start a new run."
)


def _hypers(learn: Learner) -> list[dict[str, float]]:
    groups = learn.opt.hypers  # some optimizers have no momentum
    return [{name: group[name] for name in HYPERS if name in group} for group in groups]


def _check_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that all values are finite, with one synchronisation per device."""
    names = [
        (part, name)
        for part, named in tensors.items()
        for name, tensor in named.items()
        if tensor.is_floating_point()
    ]
    finite = [tensors[part][name].isfinite().all() for part, name in names]
    devices = {flag.device for flag in finite}
    if all(torch.stack([f for f in finite if f.device == d]).all() for d in devices):
        return
    part, name = next(key for key, flag in zip(names, finite, strict=True) if not flag)
    raise NotFiniteError(f"{name} of the {part}")


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
