"""Callbacks that write a run down: its history, its state to resume from, whatever follows it."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import StatisticsError, mean
from typing import Any

import torch
from fastai.callback.core import Callback, CancelFitException

from mixmo_fastai.checkpoints.state import NotFiniteError, Position, RunState
from mixmo_fastai.checkpoints.store import CheckpointStore
from mixmo_fastai.epochs import TrainedEpochCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation import LabelledLogits
from mixmo_fastai.interruption import InterruptedBySignal, StopRequest
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.processes import Agreement, gathered, group
from mixmo_fastai.runs import RunFolder, writing


class HistoryCallback(TrainedEpochCallback):
    """Write one row per trained epoch; stop where the loss is not finite.

    The training loss is the mean over the epoch's steps: fastai's smooth one reaches back into the
    epochs before, which a resumed run has not seen. It is per member, so that it compares with the
    validation loss, which is one cross-entropy. The sums within an epoch, which checkpoints hold,
    are over members.

    Args:
        run: where the rows go.
        images_per_step: images that the network sees per step, repetitions included.
    """

    order = 55  # after the Recorder

    def __init__(self, run: RunFolder, images_per_step: int) -> None:
        super().__init__()
        self.run_folder, self.images_per_step = run, images_per_step
        self.latest: dict[str, Any] = {}
        self.diverged_at: tuple[int, int] | None = None  # epoch and step, counted from 1
        self.is_diverged = False  # as far as this process has seen
        self.carried = 0.0, 0.0  # loss and seconds of an epoch that a fit goes on within

    def before_train(self) -> None:
        """Start the clock and the sum of losses; within an epoch, go on with them."""
        loss_sum, seconds = self.carried
        self.carried = 0.0, 0.0
        self.began, self.loss_sum = time.perf_counter() - seconds, torch.tensor(loss_sum)

    def after_batch(self) -> None:
        """Add up the loss where it is; look at it where that costs nothing.

        That is at every step on a CPU; on a GPU, when the recorder has fetched some losses anyway.
        """
        loss = self.learn.loss.detach().as_subclass(torch.Tensor)  # per member
        self.loss_sum = self.loss_sum + loss * unwrap(self.learn.model).num_members
        recorder = self.learn.recorder
        if recorder.fetched and not recorder.pending:
            loss = recorder.fetched[-1]
        self.is_diverged = loss.device.type == "cpu" and not loss.isfinite()

    def after_train(self) -> None:
        """Bring the sums of all processes together; stop where they are not finite."""
        super().after_train()
        self.train_seconds = time.perf_counter() - self.began
        self.mean_loss_sum = mean(gathered(float(self.loss_sum)))
        if not math.isfinite(self.mean_loss_sum):
            self.stop_diverged()

    def stop_diverged(self) -> None:
        """End the fit, and note the first step whose loss was not finite.

        fastai would mangle the message of any error but this one.
        """
        losses = self.learn.recorder.losses
        since = sum(not loss.isfinite() for loss in losses)  # an average stays what it became
        self.diverged_at = self.learn.epoch + 1, self.learn.iter + 1 - max(0, since - 1)
        raise CancelFitException

    def state(self) -> dict[str, Any]:
        """Give the rows so far, and what the epoch under way has added up."""
        seconds = time.perf_counter() - self.began
        return {
            "rows": self.run_folder.history(),
            "loss_sums": gathered(float(self.loss_sum)),
            "seconds": round(seconds, 3),
        }

    def load_state(self, state: Mapping[str, Any], *, within_epoch: bool) -> None:
        """Go on from `state`: replace the run's rows, and add up what follows.

        Raises:
            InputError: it is no such state.
        """
        try:
            rows = [{str(k): str(v) for k, v in row.items()} for row in state["rows"]]
            sums = [float(value) for value in state["loss_sums"]]
            own = sums[group().rank] if len(sums) == group().count else mean(sums)
            carried = own, float(state["seconds"])
            if any("epoch" not in row or row.keys() != rows[0].keys() for row in rows):
                raise ValueError("its rows are not of the same columns")
        except (LookupError, TypeError, ValueError, AttributeError, StatisticsError) as error:
            raise InputError(f"The checkpoint's history.json is of no run: {error!r}.") from error
        self.run_folder.write_history(rows)
        self.carried = carried if within_epoch else (0.0, 0.0)

    def after_trained_epoch(self) -> None:
        """Write the row of an epoch that was trained here."""
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
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Drop what fastai keeps of every step: a long run has millions."""
        scheduler, recorder = getattr(self.learn, "param_scheduler", None), self.learn.recorder
        hypers = scheduler.hps.values() if scheduler else ()
        for values in (recorder.lrs, recorder.losses, *hypers):
            values.clear()


class FollowingCallback(TrainedEpochCallback):
    """A callback that follows a training from before its fit until after its evaluation.

    fastai's events end with the fit, and none tells of an error or of a signal.
    """

    @contextmanager
    def following(self, training: Any, run: RunFolder, done: Position) -> Iterator[None]:
        """Enclose a training; what ends it is raised in here.

        Args:
            training: of `training.prepare`; of a deep ensemble, each network's and then, when all
                are trained, its own.
            run: the folder.
            done: how far training had come before.
        """
        yield

    def before_save(self) -> None:
        """Be told that a checkpoint is about to be saved."""

    def after_evaluation(self, figures: Mapping[str, Any], test: LabelledLogits) -> None:
        """Receive the final figures, and the member logits and labels that they are of.

        These are of the test set, or of the validation images if no test images are labelled.
        """


@contextmanager
def followed(
    cbs: Iterable[Callback], training: Any, run: RunFolder, done: Position
) -> Iterator[list[FollowingCallback]]:
    """Let those of some callbacks follow a training that can; give them."""
    followers = [callback for callback in cbs if isinstance(callback, FollowingCallback)]
    with ExitStack() as stack:
        for follower in followers:
            stack.enter_context(follower.following(training, run, done))
        yield followers


class CheckpointCallback(TrainedEpochCallback):
    """Save the state after each epoch, every so many minutes, and where somebody asks to stop.

    Saving costs at most `SHARE` of the time: a save that takes longer than `QUICK_SECONDS` is put
    off until it does not, but for that of the last epoch. Between epochs, there is one every
    `EVERY_SECONDS` or more. Processes that train together save and stop at the same step.

    Args:
        store: where to; None in a process that leaves writing to the first.
        state: what.
        stop: whether somebody asked to stop.
        followers: told before each save.
    """

    order = 65
    SHARE, QUICK_SECONDS, EVERY_SECONDS = 0.035, 1.0, 300.0

    def __init__(
        self,
        store: CheckpointStore | None,
        state: RunState,
        stop: StopRequest,
        followers: Iterable[FollowingCallback] = (),
    ) -> None:
        super().__init__()
        self.store, self.state, self.stop, self.followers = store, state, stop, followers
        self.agreement = Agreement()
        self.saved: Position | None = None
        self.cost = 0.0  # seconds of the last save

    def before_fit(self) -> None:
        """Start the clock."""
        self.saved_at = time.perf_counter()

    def before_train(self) -> None:
        """Note where the epoch begins, or goes on."""
        self.position = Position(self.learn.epoch, getattr(self.learn.dl, "first_step", 0))

    def after_batch(self) -> None:
        """Save between epochs where it is due; stop where that was asked for."""
        self.position = Position(self.learn.epoch, self.learn.iter + 1)
        is_due = self.seconds_since >= max(self.EVERY_SECONDS, self.cost / self.SHARE)
        wanted = self.state.history.is_diverged, self.decides and is_due, self.stop.number or 0
        self.act(*self.agreement.on(*map(int, wanted)))

    def after_trained_epoch(self) -> None:
        """Save the state of an epoch that was trained here."""
        self.position = Position(self.learn.epoch + 1)
        is_last = self.position.epoch == self.learn.n_epoch
        is_affordable = self.cost <= max(self.QUICK_SECONDS, self.SHARE * self.seconds_since)
        wanted = False, (self.decides and is_affordable) or is_last, self.stop.number or 0
        self.act(*self.agreement.now(*map(int, wanted)))

    @property
    def decides(self) -> bool:
        """Whether this process knows what a save costs: the one that writes it."""
        return group().is_first

    @property
    def seconds_since(self) -> float:
        """Seconds since the last save, or since the fit began."""
        return time.perf_counter() - self.saved_at

    def act(self, is_diverged: int, is_due: int, stop: int) -> None:
        """Do what is wanted, here and in all processes that train along."""
        if is_diverged:
            self.state.history.stop_diverged()
        if (is_due or stop) and self.saved != self.position:
            self.save()
        if stop:
            raise InterruptedBySignal(stop)

    def save(self) -> None:
        """Save the state; end the fit where it is not worth keeping."""
        began = time.perf_counter()
        for follower in self.followers:
            follower.before_save()
        try:
            with nullcontext() if self.store is None else writing(self.store.folder):
                self.state.save(self.store, self.position)
        except NotFiniteError:
            self.state.history.stop_diverged()
        self.saved, self.saved_at = self.position, time.perf_counter()
        self.cost = self.saved_at - began


class StopInValidation(Callback):
    """Stop within a validation as well."""

    order = 80

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        super().__init__()
        self.checkpoints = checkpoints

    def after_batch(self) -> None:
        """Save what was trained, and leave."""
        if not self.learn.training:
            self.checkpoints.act(0, 0, self.checkpoints.stop.number or 0)


def _rounded(value: Any) -> float | str:
    return "" if value is None else round(float(value), 6)
