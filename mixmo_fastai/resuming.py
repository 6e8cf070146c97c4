"""Going on within an epoch: a fit that was saved at any step continues with the next."""

from typing import Any

from fastai.callback.core import Callback
from fastai.learner import SkipToEpoch

from mixmo_fastai.checkpoints.state import HYPERS, Restored
from mixmo_fastai.models.mixmo_model import unwrap


class ResumeCallback(Callback):
    """Start the first epoch that trains after the steps that were saved.

    Args:
        restored: where to go on, from `RunState.restore`.
    """

    order, run_valid = 60, False  # after MixMoCallback has put its loader and the Recorder began

    def __init__(self, restored: Restored) -> None:
        super().__init__()
        self.restored, self.steps = restored, CountFrom()

    def before_fit(self) -> None:
        """Count steps from where the epoch goes on."""
        self.learn.add_cb(self.steps)

    def before_train(self) -> None:
        """Leave out the steps that are done, and put back what is added up step by step."""
        position = self.restored.position
        if self.learn.epoch != position.epoch:
            return
        smooth = self.learn.recorder.smooth_loss
        smooth.count = self.restored.smooth_count
        per_member = self.restored.smooth_loss / unwrap(self.learn.model).num_members
        smooth.val = smooth.val.new_tensor(per_member)
        self.learn.train_iter = position.epoch * len(self.learn.dl) + position.step
        for name in HYPERS:  # a fit begins with rates of its own
            self.learn.opt.set_hyper(name, [group[name] for group in self.restored.hypers])
        if position.step:
            self.learn.dl = self.learn.dl.starting_at(position.step)
            self.learn.pct_train = self.restored.pct_train
            self.steps.first = position.step

    def after_train(self) -> None:
        """Count the next epoch from its beginning."""
        self.steps.first = 0

    def after_fit(self) -> None:
        """Count as usual again."""
        self.learn.remove_cb(self.steps)


class CountFrom(Callback):
    """Number the batches of an epoch from its first step on, before anything reads the number."""

    order, run_valid = -20, False

    def __init__(self) -> None:
        super().__init__()
        self.first = 0

    def before_batch(self) -> None:
        """Put the number right."""
        self.learn.iter += self.first


def resuming(restored: Restored | None) -> list[Any]:
    """Give the callbacks with which a fit goes on."""
    if restored is None:
        return []
    skip = [SkipToEpoch(restored.position.epoch)] if restored.position.epoch else []
    return [ResumeCallback(restored), *skip]
