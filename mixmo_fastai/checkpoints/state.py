"""The state of a run's Learner: what a checkpoint holds of it, and putting it back.

    state.json              place in training, schedule, recipe, fingerprint of the data
    model.safetensors       weights and running statistics
    optimizer.safetensors   state of the optimizer, such as momentum
    <callback>.safetensors  what a callback keeps: averages of the weights, the best epoch
    history.json            rows of the epochs that are done, sums of the one under way

Every random draw is a function of seed, epoch and step, so no random state is among it; nothing is
scaled, since bfloat16 needs no gradient scaler. All of it must be there, and nothing else, and fit
the run: otherwise nothing is resumed.
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

from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.checkpoints.optimizer_state import (
    keeps_state,
    optimizer_tensors,
    restore_optimizer,
)
from mixmo_fastai.checkpoints.store import CheckpointStore, Saved
from mixmo_fastai.checkpoints.weights import load_tensors, to_bytes
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.processes import process_group

HYPERS = ("lr", "mom")


@dataclass(frozen=True)
class Position:
    """How far training has come.

    Attributes:
        epoch: epochs that are done, their validation included.
        step: steps of the next one that are done; all of them where only its validation is left.
    """

    epoch: int = 0
    step: int = 0


class Stateful(Protocol):
    """A callback whose tensors a resumed fit needs; `name` names its file."""

    name: str

    def state_tensors(self) -> dict[str, Tensor]:
        """Give the state."""

    def load_state_tensors(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Take the state over.

        Args:
            state: as `state_tensors` gave it.
            like: the network's own tensors, to compare with.
        """


class History(Protocol):
    """The callback that keeps a run's figures."""

    is_diverged: bool

    def state(self) -> dict[str, Any]:
        """Give what JSON can hold; all processes are asked for it together."""

    def load_state(self, state: Mapping[str, Any], *, within_epoch: bool) -> None:
        """Take the state over."""

    def stop_diverged(self) -> None:
        """End the fit, since its numbers are not finite."""


class NotFiniteError(RuntimeError):
    """A state is not worth keeping; the message names the first number that is not one."""


@dataclass(frozen=True)
class RunState:
    """Everything that a run's checkpoint is made of.

    Attributes:
        learn: with its network, optimizer and recorder.
        history: its figures.
        parts: callbacks with tensors of their own.
        identity: what must be the same when the run goes on, by name: recipe and data, nested as
            JSON has it.
    """

    learn: Learner
    history: History
    parts: Sequence[Stateful]
    identity: Mapping[str, Any]

    def save(self, store: CheckpointStore | None, position: Position) -> None:
        """Save the state at a place in training; all processes that train together at the same.

        Args:
            store: where to; None in a process that leaves writing to the first.
            position: the place.

        Raises:
            NotFiniteError: a weight, an average or momentum is not finite; nothing was written.
            OSError: it could not be written; the checkpoints before are there still.
        """
        with ExitStack() as stack:
            for part in self.parts:
                if isinstance(part, EMACallback):
                    stack.enter_context(part.training_weights())
            tensors, history = self._tensors(), self.history.state()
            _check_finite(tensors)
            if store is not None:
                store.save(self._files(tensors, history, position))

    def restore(self, saved: Saved) -> "Restored":
        """Put a checkpoint's state into the Learner.

        Raises:
            InputError: something is missing, unknown or different; the message says which.
        """
        expected = {*self._tensors_names(), "state.json", "history.json"}
        if odd := sorted(expected ^ set(saved.files)):
            problem = "lacks" if odd[0] in expected else "has what the recipe does not call for:"
            raise InputError(f"The checkpoint {saved.path} {problem} {odd[0]}.\n{_START_ANEW}")
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
        self._check_identity(state, saved.path)
        self._check_position(restored, saved.path)
        load_tensors(self.learn.model, tensors["model"], saved.path / "model.safetensors")
        self._put_optimizer(tensors["optimizer"], restored, saved.path)
        for part in self.parts:
            part.load_state_tensors(tensors[part.name], unwrap(self.learn.model).state_dict())
        self.history.load_state(history, within_epoch=restored.position.step > 0)
        self.learn.mix_mo.epochs_trained = restored.position.epoch
        return restored

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(unwrap(self.learn.model).named_parameters())

    def _tensors_names(self) -> list[str]:
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
            **self.identity,
        }
        yield "state.json", _as_json(state)
        yield "history.json", _as_json(history)
        for name, part in tensors.items():
            yield f"{name}.safetensors", to_bytes(part)

    def _check_identity(self, state: Mapping[str, Any], path: Path) -> None:
        own, theirs = (
            dict(_flattened({name: values.get(name) for name in self.identity}))
            for values in map(_with_defaults, (self.identity, state))
        )
        differing = [key for key in own | theirs if own.get(key, _NONE) != theirs.get(key, _NONE)]
        if differing:
            key = differing[0]
            raise InputError(
                f"{key} is {_shown(own, key)} now and {_shown(theirs, key)} in the checkpoint "
                f"{path}.\nPut back what has changed, or start a new run."
            )

    def _check_position(self, restored: "Restored", path: Path) -> None:
        steps, position = len(self.learn.dls.train), restored.position
        epochs = self.identity["recipe"]["train"]["epochs"]
        inside = position.epoch < epochs or (position.epoch == epochs and position.step == 0)
        if restored.steps_per_epoch != steps or position.step > steps or not inside:
            raise InputError(
                f"The checkpoint {path} is at step {position.step} of "
                f"{restored.steps_per_epoch} of epoch {position.epoch + 1}; this run has {epochs} "
                f"epochs of {steps} steps.\n"
                f"{_START_ANEW}"
            )

    def _put_optimizer(
        self, tensors: Mapping[str, Tensor], restored: "Restored", path: Path
    ) -> None:
        learn = self.learn
        if learn.opt is None:
            learn.create_opt()
        if len(restored.hypers) != len(learn.opt.hypers):
            raise InputError(f"The optimizer's state in {path} has other groups.\n{_START_ANEW}")
        parameters = self._parameters()
        missing = set(parameters) - {name.rpartition("/")[0] or name for name in tensors}
        has_state = restored.position != Position() and keeps_state(learn.opt, restored.hypers)
        try:
            if has_state and missing:
                raise ValueError(min(missing))
            if tensors and not has_state:
                raise ValueError(next(iter(tensors)))
            restore_optimizer(learn.opt, parameters, tensors)
        except ValueError as error:
            raise InputError(
                f"The optimizer's state in {path} is of another network: {error}.\n{_START_ANEW}"
            ) from error


@dataclass(frozen=True)
class Restored:
    """Where a fit goes on.

    Attributes:
        position: what is done.
        steps_per_epoch: of the run that was saved.
        pct_train: share of training done, as fastai adds it up step by step.
        hypers: learning rate and momentum of each group of parameters.
        smooth_loss, smooth_count: of fastai's recorder; the loss is a sum over members.
        torch: the version that trained so far.
        num_processes: that did.
    """

    position: Position
    steps_per_epoch: int
    pct_train: float
    hypers: tuple[dict[str, float], ...]
    smooth_loss: float
    smooth_count: int
    torch: str
    num_processes: int

    @classmethod
    def from_mapping(cls, values: Any, path: Path) -> "Restored":
        """Read what was saved as JSON.

        Raises:
            InputError: something is missing or of another kind.
        """
        try:
            epoch, step, steps, count, processes = (
                _natural(values[name])
                for name in ("epoch", "step", "steps_per_epoch", "smooth_count", "num_processes")
            )
            pct_train, smooth_loss = float(values["pct_train"]), float(values["smooth_loss"])
            hypers = tuple(
                {name: float(group[name]) for name in HYPERS if name == "lr" or name in group}
                for group in values["hypers"]
            )
            version = str(values["torch"])
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(
                f"The checkpoint {path} does not say where training stands ({problem}).\n"
                f"{_START_ANEW}"
            ) from error
        place = Position(epoch, step)
        return cls(place, steps, pct_train, hypers, smooth_loss, count, version, processes)


_NONE = object()
_START_ANEW = (
    "Nothing was changed. Resume with the files that it was made with, or start a new run."
)


def _hypers(learn: Learner) -> list[dict[str, float]]:
    groups = learn.opt.hypers  # some optimizers have no momentum
    return [{name: group[name] for name in HYPERS if name in group} for group in groups]


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check everything in one look per device, not one per tensor."""
    names = [
        (part, name)
        for part, own in tensors.items()
        for name, tensor in own.items()
        if tensor.is_floating_point()
    ]
    finite = [tensors[part][name].isfinite().all() for part, name in names]
    devices = {flag.device for flag in finite}
    if all(torch.stack([f for f in finite if f.device == d]).all() for d in devices):
        return
    part, name = next(place for place, flag in zip(names, finite, strict=True) if not flag)
    raise NotFiniteError(f"{name} of the {part}")


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _with_defaults(values: Mapping[str, Any]) -> Any:
    """Fill in the settings that came after a recipe was saved: they are at their defaults."""
    plain = json.loads(json.dumps(dict(values)))
    recipe = plain.get("recipe")
    for section, name, default in _ADDED:
        if isinstance(recipe, dict) and isinstance(part := recipe.get(section), dict):
            part.setdefault(name, default)
    return plain


_ADDED = (
    ("model", "pretrained", False),
    ("data", "skip_damaged", False),
    ("model", "readout", "core"),
    ("optimizer", "name", "sgd"),
)
"""Settings that recipes of older checkpoints lack, with what they are there."""


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give settings by the names that a person types: optimizer.lr."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, "" if name == "recipe" else f"{name}.")
        else:
            yield name, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "missing"
