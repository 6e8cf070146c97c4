"""Resuming within an epoch: a fit that was saved after any step continues with the next step."""

from typing import Any

from fastai.callback.core import Callback
from fastai.learner import SkipToEpoch

from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.training.state import HYPERS, Restored


class ResumeCallback(Callback):
    """Continue the saved epoch after its completed steps.

    Args:
        restored: the state to continue from, from `RunState.restore`.
    """

    order, run_valid = 60, False  # after MixMoCallback has set its loader and the Recorder is reset

    def __init__(self, restored: Restored) -> None:
        super().__init__()
        self.restored, self.steps = restored, StepOffset()

    def before_fit(self) -> None:
        """Number the steps from the saved position."""
        self.learn.add_cb(self.steps)

    def before_train(self) -> None:
        """Skip the completed steps, and restore everything that accumulates over steps."""
        position = self.restored.position
        if self.learn.epoch != position.epoch:
            return
        smooth = self.learn.recorder.smooth_loss
        smooth.count = self.restored.smooth_count
        per_member = self.restored.smooth_loss / unwrap(self.learn.model).num_members
        smooth.val = smooth.val.new_tensor(per_member)
        self.learn.train_iter = position.epoch * len(self.learn.dl) + position.step
        for name in HYPERS:  # a fit starts with its own hyperparameters
            if values := [group[name] for group in self.restored.hypers if name in group]:
                self.learn.opt.set_hyper(name, values)
        if position.step:
            self.learn.dl = self.learn.dl.starting_at(position.step)
            self.learn.pct_train = self.restored.pct_train
            self.steps.first = position.step

    def after_train(self) -> None:
        """Number the next epoch from its first step."""
        self.steps.first = 0

    def after_fit(self) -> None:
        """Remove the offset."""
        self.learn.remove_cb(self.steps)


class StepOffset(Callback):
    """Offset the batch number of fastai by the completed steps, before other callbacks read it."""

    order, run_valid = -20, False

    def __init__(self) -> None:
        super().__init__()
        self.first = 0

    def before_batch(self) -> None:
        """Add the offset."""
        self.learn.iter += self.first


def resume_callbacks(restored: Restored | None) -> list[Any]:
    """Return the callbacks with which a fit continues from a checkpoint; none for a new run."""
    if restored is None:
        return []
    skip = [SkipToEpoch(restored.position.epoch)] if restored.position.epoch else []
    return [ResumeCallback(restored), *skip]
