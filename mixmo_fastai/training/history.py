"""The callback that records the history of a run, epoch by epoch."""

import math
import time
from collections.abc import Mapping
from statistics import StatisticsError, mean
from typing import Any

import torch
from fastai.callback.core import CancelFitException

from mixmo_fastai.callbacks.epoch import TrainedEpochCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runtime.processes import all_gather, process_group


class HistoryCallback(TrainedEpochCallback):
    """Write one history row per trained epoch, and stop if the loss is not finite.

    The training loss is the mean over the steps of the epoch: fastai's smoothed loss also depends
    on earlier epochs, which a resumed run has not seen. The loss is per member, to be comparable
    with the validation loss, a single cross-entropy. The sums within an epoch are over members,
    since checkpoints of version 0.1.0 store them so.

    Args:
        run: the run whose history is written.
        images_per_step: B, the inputs that the network sees per step, including repetitions; a
            mixture of M images counts as one.
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
        """Add the loss on its device, and check for divergence without synchronisation.

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


def _rounded(value: Any) -> float | str:
    return "" if value is None else round(float(value), 6)
