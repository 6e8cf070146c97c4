"""fastai's bookkeeping without waiting for the device at every step.

fastai's Recorder copies the loss to the host at every step, and its progress bar reads it once
more; each makes a GPU stand still that could run ahead. These do the same with losses that stay
where they are, and fetch many at a time.
"""

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgSmoothLoss, Learner, Recorder
from torch import Tensor

STEPS_PER_FETCH = 20
"""Steps between two looks at the losses of a device; those of a CPU are looked at as they come."""


class DeferredRecorder(Recorder):
    """fastai's Recorder; losses are brought to the host several at a time, or when asked for.

    Args:
        every: steps between two looks; where not given, `STEPS_PER_FETCH` of a device's losses, and
            each of a CPU's, for which nobody waits.
        kwargs: of fastai's Recorder.
    """

    name = "recorder"

    def __init__(self, *, every: int | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.every = every
        self.pending: list[Tensor] = []  # smoothed losses, where the loss is
        self.fetched: list[Tensor] = []  # those on the host
        self.smooth_loss = _SmoothLossInPlace(self.smooth_loss.beta)

    @property
    def losses(self) -> list[Tensor]:
        """All smoothed losses of the fit so far, on the host; a look waits for the device."""
        self.fetch()
        return self.fetched

    @losses.setter
    def losses(self, values: list[Tensor]) -> None:
        self.fetched, self.pending = values, []

    def before_fit(self) -> None:
        """Begin anew; a plain bar, such as `no_bar` leaves behind it, must not wait either."""
        super().before_fit()
        for callback in self.learn.cbs:
            if type(callback) is ProgressCallback:
                # Replaced by another, it would miss this event. fastai's own setter would warn.
                object.__setattr__(callback, "__class__", DeferredProgressCallback)

    def after_batch(self) -> None:
        """Update the metrics, and note rate and loss of a step in training."""
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
        """Fetch the rest, and log the epoch's loss."""
        self.fetch()
        super().after_train()

    def fetch(self) -> None:
        """Bring the pending losses to the host, in one copy."""
        if self.pending:
            self.fetched += torch.stack(self.pending).cpu().unbind()
            self.pending = []


class DeferredProgressCallback(ProgressCallback):
    """fastai's progress bar, which shows the newest loss that the recorder has fetched."""

    name = "progress"

    def after_batch(self) -> None:
        """Move the bar."""
        self.pbar.update(self.learn.iter + 1)
        recorder = getattr(self.learn, "recorder", None)  # not while fastai gathers predictions
        if recorder is not None and recorder.fetched:
            self.pbar.comment = f"{recorder.fetched[-1].item():.4f}"


class _SmoothLossInPlace(AvgSmoothLoss):
    """fastai's smoothed loss, kept where the loss is."""

    def accumulate(self, learn: Learner) -> None:
        self.count += 1
        loss: Tensor = learn.loss.detach().mean().as_subclass(Tensor)
        self.val = torch.lerp(loss, self.val.to(loss), self.beta)


def defer_readbacks(learn: Learner) -> Learner:
    """Give a Learner a recorder and a progress bar that do not wait for the device at every step.

    `mixmo_learner` does so by itself. Figures are those of fastai's own.

    Args:
        learn: any Learner; what it lacks of the two it goes on lacking.
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
