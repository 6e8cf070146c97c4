"""Callbacks that save checkpoints, at the end of epochs and when a signal asks to stop."""

import time
from collections.abc import Iterable
from contextlib import nullcontext

from fastai.callback.core import Callback

from mixmo_fastai.callbacks.epoch import TrainedEpochCallback
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import writing
from mixmo_fastai.runtime.processes import RequestExchange, process_group
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.run_callbacks import RunCallback
from mixmo_fastai.training.state import NotFiniteError, Position, RunState


class CheckpointCallback(TrainedEpochCallback):
    """Save the state after each epoch, within long epochs, and when asked to stop.

    Saves that take longer than `QUICK_SECONDS` are postponed so that they cost at most
    `MAX_TIME_FRACTION` of the time, except after the last epoch. Within an epoch, saves are at
    least `EVERY_SECONDS` apart. All processes save and stop at the same step.

    Args:
        store: the checkpoint store; None on ranks other than 0, which do not write.
        state: the state to save.
        stop: whether a signal asked to stop.
        run_callbacks: their `before_save` is called before each save.
    """

    order = 65
    MAX_TIME_FRACTION, QUICK_SECONDS, EVERY_SECONDS = 0.035, 1.0, 300.0

    def __init__(
        self,
        store: CheckpointStore | None,
        state: RunState,
        stop: StopRequest,
        run_callbacks: Iterable[RunCallback] = (),
    ) -> None:
        super().__init__()
        self.store, self.state, self.stop = store, state, stop
        self.run_callbacks = run_callbacks
        self.requests = RequestExchange()
        self.saved: Position | None = None
        self.save_seconds = 0.0  # duration of the last save

    def before_fit(self) -> None:
        """Start the clock, and let the first step check the optimizer's state."""
        self.saved_at, self.is_checked = time.perf_counter(), False

    def before_train(self) -> None:
        """Record the position at which the epoch starts or continues."""
        self.position = Position(self.learn.epoch, getattr(self.learn.dl, "first_step", 0))

    def after_batch(self) -> None:
        """Save if a save is due; stop if a signal asked to."""
        if not self.is_checked:  # before more is trained that could not be saved
            self.state.check_storable()
            self.is_checked = True
        self.position = Position(self.learn.epoch, self.learn.iter + 1)
        is_due = self.seconds_since >= max(
            self.EVERY_SECONDS, self.save_seconds / self.MAX_TIME_FRACTION
        )
        requests = self.state.history.is_diverged, self.decides and is_due, self.stop.number or 0
        self.act(*self.requests.exchange(*map(int, requests)))

    def after_trained_epoch(self) -> None:
        """Save the state after an epoch."""
        self.position = Position(self.learn.epoch + 1)
        is_last = self.position.epoch == self.learn.n_epoch
        is_affordable = self.save_seconds <= max(
            self.QUICK_SECONDS, self.MAX_TIME_FRACTION * self.seconds_since
        )
        requests = False, (self.decides and is_affordable) or is_last, self.stop.number or 0
        self.act(*self.requests.exchange_now(*map(int, requests)))

    @property
    def decides(self) -> bool:
        """Whether this process decides when to save: the one that writes and knows the cost."""
        return process_group().is_rank0

    @property
    def seconds_since(self) -> float:
        """Seconds since the last save, or since the start of the fit."""
        return time.perf_counter() - self.saved_at

    def act(self, is_diverged: int, is_due: int, stop: int) -> None:
        """Carry out requests; all processes call this at the same step with the same values."""
        if is_diverged:
            self.state.history.stop_diverged()
        if (is_due or stop) and self.saved != self.position:
            self.save()
        if stop:
            raise InterruptedBySignal(stop)

    def save(self) -> None:
        """Save the state; end the fit if it holds values that are not finite."""
        began = time.perf_counter()
        for callback in self.run_callbacks:
            callback.before_save()
        try:
            with nullcontext() if self.store is None else writing(self.store.folder):
                self.state.save(self.store, self.position)
        except NotFiniteError:
            self.state.history.stop_diverged()
        self.saved, self.saved_at = self.position, time.perf_counter()
        self.save_seconds = self.saved_at - began


class StopInValidation(Callback):
    """Handle stop signals during validation."""

    order = 80

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        super().__init__()
        self.checkpoints = checkpoints

    def after_batch(self) -> None:
        """Save the state and stop if a signal asked to."""
        if not self.learn.training:
            self.checkpoints.act(0, 0, self.checkpoints.stop.number or 0)
