"""Callbacks that record a run: history, checkpoints, and events beyond the fit."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import StatisticsError, mean
from typing import Any

import torch
from fastai.callback.core import Callback, CancelFitException

from mixmo_fastai.callbacks.epoch import TrainedEpochCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import RunFolder, writing
from mixmo_fastai.runtime.processes import RequestExchange, all_gather, process_group
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.state import NotFiniteError, Position, RunState


class HistoryCallback(TrainedEpochCallback):
    """Write one history row per trained epoch, and stop if the loss is not finite.

    The training loss is the mean over the steps of the epoch: fastai's smoothed loss also depends
    on earlier epochs, which a resumed run has not seen. The loss is per member, to be comparable
    with the validation loss, a single cross-entropy. The sums within an epoch, as stored in
    checkpoints, are over members.

    Args:
        run: the run whose history is written.
        images_per_step: images that the network sees per step, including repetitions.
    """

    order = 55  # after the Recorder

    def __init__(self, run: RunFolder, images_per_step: int) -> None:
        super().__init__()
        self.run_folder, self.images_per_step = run, images_per_step
        self.latest: dict[str, Any] = {}
        self.diverged_at: tuple[int, int] | None = None  # epoch and step, counted from 1
        self.is_diverged = False  # as observed in this process
        self.resumed_sums = 0.0, 0.0  # loss and seconds of the completed steps of a resumed epoch

    def before_train(self) -> None:
        """Start the clock and the sum of losses; continue both in a resumed epoch."""
        loss_sum, seconds = self.resumed_sums
        self.resumed_sums = 0.0, 0.0
        self.began, self.loss_sum = time.perf_counter() - seconds, torch.tensor(loss_sum)

    def after_batch(self) -> None:
        """Add the loss on its device, and check for divergence without synchronization.

        On a CPU the check happens at every step; on a GPU, when the recorder has just copied
        losses.
        """
        loss = self.learn.loss.detach().as_subclass(torch.Tensor)  # per member
        self.loss_sum = self.loss_sum + loss * unwrap(self.learn.model).num_members
        recorder = self.learn.recorder
        if recorder.fetched and not recorder.pending:
            loss = recorder.fetched[-1]
        self.is_diverged = loss.device.type == "cpu" and not loss.isfinite()

    def after_train(self) -> None:
        """Average the sums over processes; stop if the result is not finite."""
        super().after_train()
        self.train_seconds = time.perf_counter() - self.began
        self.mean_loss_sum = mean(all_gather(float(self.loss_sum)))
        if not math.isfinite(self.mean_loss_sum):
            self.stop_diverged()

    def stop_diverged(self) -> None:
        """End the fit, and record the first step whose loss was not finite.

        fastai would change the message of any other exception.
        """
        losses = self.learn.recorder.losses
        num_bad = sum(not loss.isfinite() for loss in losses)  # a smoothed loss stays non-finite
        self.diverged_at = self.learn.epoch + 1, self.learn.iter + 1 - max(0, num_bad - 1)
        raise CancelFitException

    def state(self) -> dict[str, Any]:
        """Return the rows so far and the sums of the current epoch."""
        seconds = time.perf_counter() - self.began
        return {
            "rows": self.run_folder.history(),
            "loss_sums": all_gather(float(self.loss_sum)),
            "seconds": round(seconds, 3),
        }

    def load_state(self, state: Mapping[str, Any], *, within_epoch: bool) -> None:
        """Load a state: replace the rows of the run, and continue the sums if within an epoch.

        Raises:
            InputError: the state is invalid.
        """
        try:
            rows = [{str(k): str(v) for k, v in row.items()} for row in state["rows"]]
            sums = [float(value) for value in state["loss_sums"]]
            group = process_group()
            loss_sum = sums[group.rank] if len(sums) == group.count else mean(sums)
            resumed_sums = loss_sum, float(state["seconds"])
            if any("epoch" not in row or row.keys() != rows[0].keys() for row in rows):
                raise ValueError("rows must have the same columns, including epoch")
        except (LookupError, TypeError, ValueError, AttributeError, StatisticsError) as error:
            raise InputError(
                f"history.json of the checkpoint is not valid: {error!r}.\nStart a new run."
            ) from error
        self.run_folder.write_history(rows)
        self.resumed_sums = resumed_sums if within_epoch else (0.0, 0.0)

    def after_trained_epoch(self) -> None:
        """Write the row of the epoch."""
        _, valid_loss, *metrics = self.learn.final_record
        num_steps = len(self.learn.dls.train)
        loss = self.mean_loss_sum / num_steps
        names = ("accuracy", "member_accuracy")
        images = num_steps * self.images_per_step
        epoch = self.learn.epoch + 1
        self.latest = {
            "epoch": epoch,
            "train_loss": _rounded(loss / unwrap(self.learn.model).num_members),
            "valid_loss": _rounded(valid_loss),
            **{name: _rounded(value) for name, value in zip(names, metrics, strict=True)},
            "lr": f"{self.learn.opt.hypers[-1]['lr']:.6g}",
            "images_seen": epoch * images,
            "seconds": round(time.perf_counter() - self.began, 2),
            "images_per_second": round(images / self.train_seconds, 1),
        }
        self.run_folder.append_history(self.latest)
        self._clear_steps()

    def _clear_steps(self) -> None:
        """Clear the values that fastai keeps for every step: a long run has millions."""
        scheduler, recorder = getattr(self.learn, "param_scheduler", None), self.learn.recorder
        hypers = scheduler.hps.values() if scheduler else ()
        for values in (recorder.lrs, recorder.losses, *hypers):
            values.clear()


class RunCallback(TrainedEpochCallback):
    """A callback with events for the whole run, from before the fit until after the evaluation.

    fastai's events end with the fit, and none reports an error or a signal.
    """

    @contextmanager
    def run_context(self, training: Any, run: RunFolder, done: Position) -> Iterator[None]:
        """Wrap the run in a with block; its exceptions are raised at the yield.

        Args:
            training: from `prepare.prepare`. For a deep ensemble, first that of each network,
                then, after all are trained, that of the ensemble.
            run: the run folder.
            done: the position at which training starts.
        """
        yield

    def before_save(self) -> None:
        """Act before a checkpoint is saved."""

    def after_evaluation(self, metrics: Mapping[str, Any], test: LabelledLogits) -> None:
        """Receive the final metrics, and the member logits and labels they were computed from.

        These belong to the test set, or to the validation images if no test image is labelled.
        """


@contextmanager
def entered_run_callbacks(
    cbs: Iterable[Callback], training: Any, run: RunFolder, done: Position
) -> Iterator[list[RunCallback]]:
    """Enter the context of every RunCallback for the duration of a with block, and return them."""
    run_callbacks = [callback for callback in cbs if isinstance(callback, RunCallback)]
    with ExitStack() as stack:
        for callback in run_callbacks:
            stack.enter_context(callback.run_context(training, run, done))
        yield run_callbacks


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
        """Start the clock."""
        self.saved_at = time.perf_counter()

    def before_train(self) -> None:
        """Record the position at which the epoch starts or continues."""
        self.position = Position(self.learn.epoch, getattr(self.learn.dl, "first_step", 0))

    def after_batch(self) -> None:
        """Save if a save is due; stop if a signal asked to."""
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


def _rounded(value: Any) -> float | str:
    return "" if value is None else round(float(value), 6)
