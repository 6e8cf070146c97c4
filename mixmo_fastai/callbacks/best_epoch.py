"""Selection of the best epoch on the validation split, never on the test set."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixmo_fastai.callbacks.epoch import TrainedEpochCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import find_first_difference, unwrap

_BEST = "selection.standing"  # name of the tensor in checkpoints


class BestEpochCallback(TrainedEpochCallback):
    """Keep the weights of the epoch that is best on the validation split.

    The best epoch has the highest ensemble accuracy; ties are broken by the lowest validation loss,
    then by the earliest epoch. The caller decides when to `restore` the weights.

    Args:
        by_loss: the best epoch has the lowest validation loss; ties are broken by the accuracy. For
            several labels per image, most of which are absent whatever is predicted.
    """

    order = 57  # after the Recorder

    def __init__(self, *, by_loss: bool = False) -> None:
        super().__init__()
        self.by_loss = by_loss
        # Accuracy and -loss, by_loss in reverse, and epoch (from 1).
        self.best: tuple[float, float, int] | None = None
        self.weights: dict[str, Tensor] = {}

    @property
    def number(self) -> int | None:
        """The best epoch so far, counted from 1."""
        return None if self.best is None else self.best[2]

    def after_trained_epoch(self) -> None:
        """Keep the weights if they are the best so far."""
        _, loss, accuracy, *_ = self.learn.final_record
        first, second = float(accuracy), -float(loss)
        if self.by_loss:
            first, second = second, first
        # Nothing is greater than NaN, so that a first epoch with it would remain the best.
        first, second = (value if math.isfinite(value) else -math.inf for value in (first, second))
        score = (first, second, self.learn.epoch + 1)
        if self.best is None or score[:2] > self.best[:2]:
            self.best = score
            state = unwrap(self.learn.model).state_dict()
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def restore(self, model: nn.Module) -> None:
        """Load the best weights into a network.

        Raises:
            InputError: no epoch was validated.
        """
        if not self.weights:
            raise InputError("No epoch was validated, so there is no best epoch to restore.")
        unwrap(model).load_state_dict(self.weights)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state that a resumed fit needs; empty before the end of the first epoch."""
        if self.best is None:
            return {}
        return {**self.weights, _BEST: torch.tensor(self.best, dtype=torch.float64)}

    def load_state_tensors(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Load a state.

        Args:
            state: the output of `state_tensors`.
            like: tensors of the network that is resumed.

        Raises:
            InputError: the state belongs to another network.
        """
        if not state:
            return
        expected = {**like, _BEST: torch.zeros(3, dtype=torch.float64)}
        if difference := find_first_difference(state, expected):
            raise InputError(
                f"The weights of the best epoch belong to another network: {difference}."
            )
        first, second, epoch = state[_BEST].tolist()
        self.best = (first, second, int(epoch))
        self.weights = {name: tensor for name, tensor in state.items() if name != _BEST}
