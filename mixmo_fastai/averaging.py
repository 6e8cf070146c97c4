"""Averages of the weights over training."""

from collections.abc import Mapping
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import unwrap


class EMACallback(Callback):
    """Keep an exponential moving average of the weights, and evaluate that.

    After step t, counted from 0, average ← d · average + (1 - d) · weights with
    d = min(decay, (1 + t) / (10 + t)), so that the initial weights are soon forgotten. BatchNorm's
    running statistics are averaged likewise. Validation within a fit sees the averages; after the
    fit they are the network's weights. A search for a learning rate leaves them alone.

    Args:
        decay: in [0, 1); 0 is no average.

    Raises:
        InputError: the decay is out of range.
    """

    # After a history of the epoch was written, before its state is saved.
    order, run_valid = 60, False

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError(f"decay must be at least 0 and below 1; got {decay}.")
        self.decay, self.num_steps = decay, 0
        self.averages: dict[str, Tensor] | None = None
        self.weights_in_training: dict[str, Tensor] | None = None
        # Validations send the events of a fit as well, some of them within one.
        self.fit_trained: list[bool] = []

    def before_fit(self) -> None:
        """Note that a fit begins, or a validation."""
        self.fit_trained.append(False)

    def before_train(self) -> None:
        """Start from the weights as they are; take back what a broken validation left."""
        self.fit_trained[-1] = True
        self._leave_averages()
        if self.averages is None and not self._searching:
            self.averages, self.num_steps = _copied(self._tensors()), 0

    def after_step(self) -> None:
        """Move the averages, on the device and without waiting for it."""
        if self.averages is None or self._searching:
            return
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        self.num_steps += 1
        current = self._tensors()
        update = get_ema_multi_avg_fn(decay)
        update(
            list(self.averages.values()), [current[name] for name in self.averages], self.num_steps
        )

    def before_validate(self) -> None:
        """Show validation the averages."""
        if self.averages is None or self._searching:
            return
        if self.weights_in_training is None:  # else a validation within a validation's epoch
            self.weights_in_training = _copied(self._tensors())
        _copy_into(self._tensors(), self.averages)

    def after_epoch(self) -> None:
        """Go on with the weights that are trained."""
        self._leave_averages()

    def after_fit(self) -> None:
        """Leave the averages in the network where this was a fit."""
        if self.fit_trained.pop() and not self._searching:
            self.finish()

    def finish(self) -> None:
        """Make the averages, if there are any, the network's weights."""
        if self.averages is not None:
            _copy_into(self._tensors(), self.averages)
            self.averages = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Give what a resumed fit needs."""
        assert self.averages is not None
        return {**self.averages, _NUM_STEPS: torch.tensor(self.num_steps)}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_tensors`.

        Raises:
            InputError: they are of another network.
        """
        own = self._tensors()
        if state.keys() != own.keys() | {_NUM_STEPS} or any(
            state[name].shape != tensor.shape for name, tensor in own.items()
        ):
            raise InputError("The average of the weights is of another network.")
        self.averages = _copied(own)
        _copy_into(self.averages, state)
        self.num_steps = int(state[_NUM_STEPS])

    @property
    def _searching(self) -> bool:
        return hasattr(self.learn, "lr_finder")

    def _leave_averages(self) -> None:
        if self.weights_in_training is not None:
            _copy_into(self._tensors(), self.weights_in_training)
            self.weights_in_training = None

    def _tensors(self) -> dict[str, Tensor]:
        """Give parameters and buffers that are numbers; a count of batches has no average."""
        state: dict[str, Any] = unwrap(self.learn.model).state_dict()
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


_NUM_STEPS = "ema.num_steps"


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
