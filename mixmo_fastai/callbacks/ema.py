"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mixmo_fastai.errors import InputError, check_fraction
from mixmo_fastai.models.mixmo_model import find_first_difference, unwrap


class EMACallback(Callback):
    """Keep an exponential moving average of the weights, and use it for validation.

    After step t, counted from 0, average ← d · average + (1 - d) · weights with
    d = min(decay, (1 + t) / (10 + t)), which soon removes the influence of the initial weights;
    skipped steps do not count. BatchNorm's running statistics are averaged in the same way.

    From each validation until training resumes, the network holds the averages, so that callbacks
    such as `SaveModelCallback` save the validated weights; after the fit it keeps them. An
    interrupted fit leaves the network in its current state: a validation then still uses the
    averages, and the next fit starts a new average. Weights that were loaded or trained without
    this callback since then, or loaded after an epoch, are not replaced: a new average starts from
    them. The learning-rate finder changes nothing.

    Args:
        decay: in [0, 1); 0 disables averaging.

    Raises:
        InputError: `decay` is out of range.
    """

    # Runs before the callbacks that save or restore weights.
    order, run_valid = 45, False
    _recorded: tuple[int, Tensor] | None = None  # see `_record`

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        check_fraction("decay", decay, below_one=True)
        self.decay = decay
        # A stack, since `Learner.validate` also triggers before_fit and after_fit, even during a
        # fit.
        self.fit_trained: list[bool] = []
        self.step_skipped = self.restored = False
        self._reset()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore a pickled callback, also one of version 0.1.0 with its attribute names."""
        renamed = {"skipped": "step_skipped", "trained": "training_tensors"}
        self.__dict__.update({renamed.get(name, name): value for name, value in state.items()})

    def before_fit(self) -> None:
        """Record the start of a fit or of a validation."""
        self.fit_trained.append(False)

    def before_train(self) -> None:
        """Restore the training weights; in a new fit, start the average from them."""
        if self._finding_lr:
            return
        is_restored = self._restore_training_weights()
        if not (is_restored and (self.fit_trained[-1] or self.restored)):
            self._reset()
        self.fit_trained[-1], self.restored = True, False
        self.tensors = self._tensors()
        if not self.averages:
            self.averages = _copied(self.tensors)
        # A resumed average was loaded before the network was moved to its device.
        self.averages = {n: a.to(self.tensors[n].device) for n, a in self.averages.items()}
        self._record()  # a resumed epoch may have no batches left

    def before_batch(self) -> None:
        """Restore the training weights after a validation in the middle of an epoch."""
        if not self._restore_training_weights():
            self.averages, self.num_steps = _copied(self.tensors), 0

    def after_cancel_step(self) -> None:
        """Record that the optimizer skipped its step, as after an overflow in half precision."""
        self.step_skipped = True

    def after_step(self) -> None:
        """Update the averages on the device, without synchronisation."""
        if self.step_skipped or self._finding_lr or not self.averages:
            self.step_skipped = False
            return
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        self.num_steps += 1
        averages = list(self.averages.values())
        pairs = zip(self.tensors.values(), averages, strict=True)
        current = [tensor.detach().to(average.dtype) for tensor, average in pairs]
        get_ema_multi_avg_fn(decay)(averages, current, self.num_steps)
        self._record()  # the fit may be interrupted, or validated by a callback

    def after_batch(self) -> None:
        """Record the weights, also if the step was skipped."""
        self._record()

    def after_train(self) -> None:
        """Record the weights again, since later callbacks may have changed them in the batch."""
        self._record()

    def before_validate(self) -> None:
        """Put the averages into the network."""
        if not self.averages or self._finding_lr or not self._is_unchanged():
            return  # nothing was trained, or other weights were loaded since
        if not self.training_tensors:  # otherwise the network holds the averages already
            self.training_tensors = _copied(self.tensors)
        _copy_into(self.tensors, self.averages)
        self._record()

    def after_fit(self) -> None:
        """Keep the averages in the network if this was a fit, not a validation."""
        if self.fit_trained.pop() and not self._finding_lr:
            self.finish()

    def finish(self) -> None:
        """Load the averages, if any, into the network, and reset."""
        if self.averages:
            _copy_into(self._tensors(), self.averages)
        self._reset()

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """Put the training weights into the network for the duration of a with block."""
        holds_averages = bool(self.training_tensors)
        self._restore_training_weights()
        yield
        if holds_averages:
            self.before_validate()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state that a resumed fit needs in addition to the training weights."""
        return {**self.averages, _NUM_STEPS: torch.tensor(self.num_steps)}

    def load_state_tensors(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Load a state for the next fit.

        Args:
            state: the output of `state_tensors`.
            like: tensors of the network that is resumed.

        Raises:
            InputError: the state belongs to another network.
        """
        averages = _copied({name: tensor for name, tensor in like.items() if _has_average(tensor)})
        expected = averages | {_NUM_STEPS: torch.tensor(0)}
        if difference := find_first_difference(state, expected):
            raise InputError(f"The averaged weights belong to another network: {difference}.")
        self._reset()
        self.averages = averages
        _copy_into(self.averages, state)
        self.num_steps, self.restored = int(state[_NUM_STEPS]), True

    @property
    def _finding_lr(self) -> bool:
        return hasattr(self.learn, "lr_finder")

    def _reset(self) -> None:
        self.num_steps, self._recorded = 0, None
        self.averages: dict[str, Tensor] = {}
        # The training weights, while the network holds the averages.
        self.training_tensors: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}  # of the network, looked up once per epoch

    def _restore_training_weights(self) -> bool:
        """Replace the averages by the training weights, unless other weights were loaded since.

        Returns:
            False if other weights were loaded.
        """
        if not self.training_tensors:
            return True  # the network holds them
        if is_unchanged := self._is_unchanged():
            _copy_into(self.tensors, self.training_tensors)
            self._record()
        self.training_tensors = {}
        return is_unchanged

    def _tensors(self) -> dict[str, Tensor]:
        """Return the floating-point parameters and buffers; a batch counter has no average."""
        state: dict[str, Any] = unwrap(self.learn.model).state_dict()
        return {name: tensor for name, tensor in state.items() if _has_average(tensor)}

    def _record(self) -> None:
        """Record the weights, for `_is_unchanged`."""
        self._recorded = self._fingerprint()

    def _is_unchanged(self) -> bool:
        """Whether the network still has the weights that `_record` recorded."""
        if self._recorded is None:
            return False
        (version, values), (version_now, values_now) = self._recorded, self._fingerprint()
        return version == version_now and torch.equal(values.to(values_now.device), values_now)

    def _fingerprint(self) -> tuple[int, Tensor]:
        """Return values that change with the weights, at a small cost.

        The first is the number of in-place writes to the parameters, as counted by autograd. It
        does not count writes to `.data`, as by fastai's optimizers, so the second is a copy of
        parts of the last trained parameters, which every training changes. Buffers are no part of
        them, since forward passes and other processes change these, too.
        """
        parameters = [*unwrap(self.learn.model).parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad][-2:]
        parts = [p.detach().flatten()[:_NUM_COMPARED].to(trained[-1].device) for p in trained]
        values = torch.cat(parts) if parts else torch.empty(0)
        return sum(parameter._version for parameter in parameters), values


_NUM_STEPS = "ema.num_steps"
_NUM_COMPARED = 1024


def _has_average(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, in float32 or better: half precision would lose small updates."""
    precise = (torch.float32, torch.float64)
    return {
        name: tensor.detach().to(tensor.dtype if tensor.dtype in precise else torch.float32).clone()
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
