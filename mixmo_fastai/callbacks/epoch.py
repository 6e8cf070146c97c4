"""Base class of callbacks that act once per trained epoch."""

from fastai.callback.core import Callback


class TrainedEpochCallback(Callback):
    """Call `after_trained_epoch` at the end of each epoch that was trained completely.

    fastai also triggers `before_epoch` and `after_epoch` for validations, even within an epoch, and
    for epochs that a resumed fit skips.
    """

    run_valid = False

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[bool] = []  # for each open epoch, whether it has trained

    def before_epoch(self) -> None:
        """Record the start of an epoch or of a validation."""
        self.epochs.append(False)

    def after_train(self) -> None:
        """Record that the epoch has trained."""
        if self.epochs:
            self.epochs[-1] = True

    def after_epoch(self) -> None:
        """Call `after_trained_epoch` if the epoch has trained."""
        if self.epochs and self.epochs.pop():
            self.after_trained_epoch()

    def after_trained_epoch(self) -> None:
        """Act at the end of a trained epoch; to be overridden."""
        raise NotImplementedError
