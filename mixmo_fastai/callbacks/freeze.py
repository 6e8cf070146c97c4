"""Train the heads alone at first, as fastai's `fine_tune` does."""

from fastai.callback.core import Callback
from torch import nn

from mixmo_fastai.runtime.processes import process_group


class FreezeCallback(Callback):
    """Freeze all parameter groups but the last for the first steps of training.

    BatchNorm layers of frozen groups keep training, as in `Learner.freeze`. When the groups are
    unfrozen, the state of the optimizer, such as its momentum, is reset, as by `Learner.unfreeze`.

    Args:
        num_steps: number of steps with frozen groups.
    """

    order = 55  # before the schedule sets the rates

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.is_frozen: bool | None = None
        # A stack, since `Learner.validate` also triggers before_fit and after_fit, even during a
        # fit.
        self.fit_trained: list[bool] = []
        self.frozen: list[nn.Parameter] = []

    def freeze_before(self, step: int) -> None:
        """Freeze or unfreeze as for the step before the given one, to load the optimizer's state.

        Args:
            step: number of completed steps.
        """
        self._set(0 < step <= self.num_steps)

    def before_fit(self) -> None:
        """Record the start of a fit or of a validation."""
        self.fit_trained.append(False)

    def before_train(self) -> None:
        """Let the first step of a fit freeze or unfreeze."""
        if not self.fit_trained[-1]:
            self.fit_trained[-1], self.is_frozen = True, None

    def before_batch(self) -> None:
        """Freeze or unfreeze before a step."""
        if not self.training:
            return
        # fastai accumulates progress in floating point, so the step is recovered by rounding.
        num_steps = self.learn.n_epoch * len(self.learn.dls.train)
        step = round(self.learn.pct_train * num_steps)
        if self.is_frozen is None or step == self.num_steps:
            self._set(step < self.num_steps)
            if step == self.num_steps:
                self.learn.opt.clear_state()

    def before_step(self) -> None:
        """Drop the gradients of frozen parameters that several processes had to compute."""
        if process_group().count > 1:
            for parameter in self.frozen:
                parameter.grad = None

    def after_fit(self) -> None:
        """Leave all parameters trainable if this was a fit, not a validation."""
        if self.fit_trained.pop():
            self._set(False)

    def _set(self, is_frozen: bool) -> None:
        self.is_frozen = is_frozen
        optimizer = self.learn.opt
        optimizer.freeze_to(len(optimizer.param_lists) - 1 if is_frozen else 0)
        self.frozen = [p for p, *_ in optimizer.all_params() if not p.requires_grad]
        if process_group().count > 1:
            # DistributedDataParallel expects gradients of the parameters that it was built with.
            for parameter in self.frozen:
                parameter.requires_grad_()


def frozen_steps(share: float, num_steps: int) -> int:
    """Return the number of steps that train the heads alone.

    Args:
        share: fraction of training.
        num_steps: steps of the whole training; at least one trains all layers.

    Example:
        >>> frozen_steps(0.25, 100), frozen_steps(0.99, 10)
        (25, 9)
    """
    return min(round(share * num_steps), num_steps - 1)
