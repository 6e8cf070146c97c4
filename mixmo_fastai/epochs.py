"""What is done once per epoch that was trained."""

from fastai.callback.core import Callback


class TrainedEpochCallback(Callback):
    """Call `after_trained_epoch` at the end of each epoch that trained and was not cut short.

    A validation sends `before_epoch` and `after_epoch` as well, also within an epoch; epochs that a
    resumed fit skips do too.
    """

    run_valid = False

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[bool] = []  # whether each epoch that is under way has trained

    def before_epoch(self) -> None:
        """Note that an epoch begins, or a validation."""
        self.epochs.append(False)

    def after_train(self) -> None:
        """Note that there was training."""
        if self.epochs:
            self.epochs[-1] = True

    def after_epoch(self) -> None:
        """Act where there was training."""
        if self.epochs and self.epochs.pop():
            self.after_trained_epoch()

    def after_trained_epoch(self) -> None:
        """Do what there is to do."""
        raise NotImplementedError
