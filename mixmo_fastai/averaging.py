"""Averages of the weights over training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import first_difference, unwrap


class EMACallback(Callback):
    """Keep an exponential moving average of the weights, and evaluate that.

    After step t, counted from 0, average ← d · average + (1 - d) · weights with
    d = min(decay, (1 + t) / (10 + t)), so that the initial weights are soon forgotten; a step that
    was skipped does not count. BatchNorm's running statistics are averaged likewise.

    From each validation until training goes on, the network holds the averages, so that callbacks
    such as `SaveModelCallback` save what was validated; after the fit it holds them for good. A fit
    that is interrupted leaves the network as it was at that moment; a validation then still shows
    the averages, and the next fit starts a new one. A search for a learning rate leaves everything
    alone.

    Args:
        decay: in [0, 1); 0 is no average.

    Raises:
        InputError: the decay is out of range.
    """

    # Before the callbacks that save or restore weights.
    order, run_valid = 45, False

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise InputError(f"decay must be a number, at least 0 and below 1; got {decay!r}.")
        self.decay = decay
        # Validations send the events of a fit as well, some of them within one.
        self.fit_trained: list[bool] = []
        self.skipped = self.restored = False
        self._forget()

    def before_fit(self) -> None:
        """Note that a fit begins, or a validation."""
        self.fit_trained.append(False)

    def before_train(self) -> None:
        """Go on with the weights that are trained; in a new fit, start from them."""
        if self._searching:
            return
        if not self.fit_trained[-1] and not self.restored:
            self._forget()
        self.fit_trained[-1], self.restored = True, False
        self._leave_averages()
        self.tensors = self._tensors()
        if not self.averages:
            self.averages = _copied(self.tensors)
        # A resumed average was read before the network was moved to its device.
        self.averages = {n: a.to(self.tensors[n].device) for n, a in self.averages.items()}
        self.version = self._version()  # a resumed epoch may have no batch left

    def before_batch(self) -> None:
        """Go on with the weights that are trained, after a validation in the middle of an epoch."""
        self._leave_averages()

    def after_cancel_step(self) -> None:
        """Note that the optimizer did not step, such as after an overflow in half precision."""
        self.skipped = True

    def after_step(self) -> None:
        """Move the averages, on the device and without waiting for it."""
        if self.skipped or self._searching or not self.averages:
            self.skipped = False
            return
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        self.num_steps += 1
        averages = list(self.averages.values())
        pairs = zip(self.tensors.values(), averages, strict=True)
        current = [tensor.detach().to(average.dtype) for tensor, average in pairs]
        get_ema_multi_avg_fn(decay)(averages, current, self.num_steps)

    def after_batch(self) -> None:
        """Remember the weights by their version."""
        self.version = self._version()

    def before_validate(self) -> None:
        """Show validation the averages."""
        if not self.averages or self._searching or self.version != self._version():
            return  # nothing was trained, or somebody loaded other weights since
        if not self.trained:  # else they are shown already
            self.trained = _copied(self.tensors)
        _copy_into(self.tensors, self.averages)
        self.version = self._version()

    def after_fit(self) -> None:
        """Leave the averages in the network where this was a fit."""
        if self.fit_trained.pop() and not self._searching:
            self.finish()

    def finish(self) -> None:
        """Make the averages, if there are any, the network's weights."""
        if self.averages:
            _copy_into(self._tensors(), self.averages)
        self._forget()

    @contextmanager
    def weights_in_training(self) -> Iterator[None]:
        """Put the weights that are trained into the network for a moment, to save them."""
        shown = bool(self.trained)
        self._leave_averages()
        yield
        if shown:
            self.before_validate()

    def state_tensors(self) -> dict[str, Tensor]:
        """Give what a resumed fit needs beside the weights that are trained."""
        return {**self.averages, _NUM_STEPS: torch.tensor(self.num_steps)}

    def load_state_tensors(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Go on from `state_tensors` in the next fit.

        Args:
            state: what it gave.
            like: the tensors of the network that goes on.

        Raises:
            InputError: they are of another network.
        """
        own = _copied({name: tensor for name, tensor in like.items() if _has_average(tensor)})
        counted = {_NUM_STEPS: torch.tensor(0)}
        if odd := first_difference(state, own | counted):
            raise InputError(f"The average of the weights is of another network: {odd}.")
        self._forget()
        self.averages = own
        _copy_into(self.averages, state)
        self.num_steps, self.restored = int(state[_NUM_STEPS]), True

    @property
    def _searching(self) -> bool:
        return hasattr(self.learn, "lr_finder")

    def _forget(self) -> None:
        self.num_steps, self.version = 0, -1
        self.averages: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}  # while the network holds the averages
        self.tensors: dict[str, Tensor] = {}  # the network's own, looked up once per epoch

    def _leave_averages(self) -> None:
        if self.trained:
            _copy_into(self.tensors, self.trained)
            self.trained, self.version = {}, self._version()

    def _tensors(self) -> dict[str, Tensor]:
        """Give parameters and buffers that are numbers; a count of batches has no average."""
        state: dict[str, Any] = unwrap(self.learn.model).state_dict()
        return {name: tensor for name, tensor in state.items() if _has_average(tensor)}

    def _version(self) -> int:
        """Count the writes to the parameters, as autograd does."""
        return sum(p._version for p in self.learn.model.parameters())


_NUM_STEPS = "ema.num_steps"


def _has_average(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy; half precision is too coarse to add up small steps."""
    kept = (torch.float32, torch.float64)
    return {
        name: tensor.detach().to(tensor.dtype if tensor.dtype in kept else torch.float32).clone()
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
