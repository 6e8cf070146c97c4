"""fastai's Recorder and progress bar without a device synchronisation at every step.

fastai's Recorder copies the loss to the host at every step, and its progress bar reads it again;
each read stalls a GPU that could run ahead. The classes here keep losses on the device and copy
many at a time.
"""

from functools import partial

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgSmoothLoss, Learner, Recorder
from torch import Tensor

STEPS_PER_FETCH = 20
"""Steps between two copies of losses from a GPU; losses on a CPU are read at every step."""


class DeferredRecorder(Recorder):
    """fastai's Recorder, which copies losses to the host several at a time, or on access.

    Args:
        every: steps between two copies; None for `STEPS_PER_FETCH` on a GPU and 1 on a CPU, where
            reading does not wait.
        kwargs: arguments of fastai's Recorder.
    """

    name = "recorder"

    def __init__(self, *, every: int | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.every = every
        self.pending: list[Tensor] = []  # smoothed losses on the device
        self.fetched: list[Tensor] = []  # smoothed losses on the host
        self.smooth_loss = _SmoothLossOnDevice(self.smooth_loss.beta)

    @property
    def losses(self) -> list[Tensor]:
        """All smoothed losses of the fit so far, on the host; access waits for the device."""
        self.fetch()
        return self.fetched

    @losses.setter
    def losses(self, values: list[Tensor]) -> None:
        self.fetched, self.pending = values, []

    def before_fit(self) -> None:
        """Reset, and defer the reads of a plain progress bar, such as one restored by `no_bar`."""
        super().before_fit()
        for callback in self.learn.cbs:
            if type(callback) is ProgressCallback:
                # A replacement callback would miss this event. fastai's setter would warn.
                vars(callback)["after_batch"] = partial(_advance_bar, callback)

    def after_batch(self) -> None:
        """Update the metrics; in training, record learning rate and loss."""
        if len(self.learn.yb) == 0:
            return
        for metric in self._train_mets if self.learn.training else self._valid_mets:
            metric.accumulate(self.learn)
        if not self.learn.training:
            return
        self.lrs.append(self.learn.opt.hypers[-1]["lr"])
        self.pending.append(self.smooth_loss.value)
        self.learn.smooth_loss = self.pending[-1]
        on_cpu = self.pending[-1].device.type == "cpu"
        if len(self.pending) >= (self.every or (1 if on_cpu else STEPS_PER_FETCH)):
            self.fetch()

    def after_train(self) -> None:
        """Copy the remaining losses, and log the loss of the epoch."""
        self.fetch()
        super().after_train()

    def fetch(self) -> None:
        """Copy all pending losses to the host at once."""
        if self.pending:
            self.fetched += torch.stack(self.pending).cpu().unbind()
            self.pending = []


class DeferredProgressCallback(ProgressCallback):
    """fastai's progress bar, which shows the latest loss that is already on the host."""

    name = "progress"

    def after_batch(self) -> None:
        """Advance the bar."""
        _advance_bar(self)


def _advance_bar(callback: ProgressCallback) -> None:
    """Advance a progress bar, with the latest loss that is on the host."""
    callback.pbar.update(callback.learn.iter + 1)
    recorder = getattr(callback.learn, "recorder", None)  # None while fastai gathers predictions
    if recorder is not None and recorder.fetched:
        callback.pbar.comment = f"{recorder.fetched[-1].item():.4f}"


class _SmoothLossOnDevice(AvgSmoothLoss):
    """fastai's smoothed loss, kept on the device of the loss."""

    def accumulate(self, learn: Learner) -> None:
        self.count += 1
        loss: Tensor = learn.loss.detach().mean().as_subclass(Tensor)
        self.val = torch.lerp(loss, self.val.to(loss), self.beta)


def defer_readbacks(learn: Learner) -> Learner:
    """Replace a Learner's Recorder and progress bar by versions that do not wait for the device.

    `mixmo_learner` does this already. Recorded values equal those of fastai's classes.

    Args:
        learn: any Learner; a missing Recorder or progress bar is not added.
    """
    for callback in [cb for cb in learn.cbs if type(cb) in (Recorder, ProgressCallback)]:
        learn.remove_cb(callback)
        if isinstance(callback, Recorder):
            settings = {name: getattr(callback, name) for name in _RECORDER_SETTINGS}
            learn.add_cb(DeferredRecorder(beta=callback.smooth_loss.beta, **settings))
        else:
            learn.add_cb(DeferredProgressCallback())
    return learn


_RECORDER_SETTINGS = ("add_time", "train_metrics", "valid_metrics")


_SmoothLossInPlace = _SmoothLossOnDevice  # its name in Learners exported by version 0.1.0
