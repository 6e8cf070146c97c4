"""Callbacks that write a run down: its history and its state to resume from."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from fastai.callback.core import CancelFitException

from mixmo_fastai.averaging import EMACallback
from mixmo_fastai.checkpoints import Stateful, save_checkpoint
from mixmo_fastai.epochs import TrainedEpochCallback
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.runs import RunFolder


class HistoryCallback(TrainedEpochCallback):
    """Write one row per trained epoch; stop where the loss is not finite.

    The training loss is the mean over the epoch's steps: fastai's smooth one reaches back into the
    epochs before, which a resumed run has not seen. It is divided by the number of members, so that
    it compares with the validation loss, which is one cross-entropy.

    Args:
        run: where the rows go.
        images_per_step: images that the network sees per step, repetitions included.
    """

    order = 55  # after the Recorder

    def __init__(self, run: RunFolder, images_per_step: int) -> None:
        super().__init__()
        self.run_folder, self.images_per_step = run, images_per_step
        self.latest: dict[str, Any] = {}
        self.diverged = False

    def before_train(self) -> None:
        """Start the clock and the sum of losses."""
        self.began, self.loss_sum = time.perf_counter(), torch.tensor(0.0)

    def after_batch(self) -> None:
        """Add up the loss where it is; look at it when the recorder has fetched some anyway."""
        self.loss_sum = self.loss_sum + self.learn.loss.detach().as_subclass(torch.Tensor)
        recorder = self.learn.recorder
        if recorder.losses and not recorder.pending and not recorder.losses[-1].isfinite():
            self.diverged = True
            raise CancelFitException

    def after_train(self) -> None:
        """Stop where the loss is not finite."""
        super().after_train()
        self.train_seconds = time.perf_counter() - self.began
        self.diverged = self.diverged or not math.isfinite(float(self.loss_sum))
        if self.diverged:  # fastai would mangle the message of any other error
            raise CancelFitException

    def after_trained_epoch(self) -> None:
        """Write the row of an epoch that was trained here."""
        _, valid_loss, *metrics = self.learn.final_record
        num_steps = len(self.learn.dls.train)
        loss = float(self.loss_sum) / num_steps
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


class CheckpointCallback(TrainedEpochCallback):
    """Save the state after each epoch.

    Args:
        run: where it goes.
        parts: callbacks that have state of their own.
    """

    order = 65

    def __init__(self, run: RunFolder, parts: Sequence[Stateful] = ()) -> None:
        super().__init__()
        self.run_folder, self.parts = run, tuple(parts)

    def after_trained_epoch(self) -> None:
        """Save the state of an epoch that was trained here."""
        averaging = [part for part in self.parts if isinstance(part, EMACallback)]
        with ExitStack() as stack:
            for part in averaging:
                stack.enter_context(part.weights_in_training())
            save_checkpoint(self.run_folder, self.learn, self.learn.epoch + 1, self.parts)


def _rounded(value: Any) -> float | str:
    return "" if value is None else round(float(value), 6)
