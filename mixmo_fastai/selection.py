"""Which epoch's weights are kept: picked on the validation split, never on the test set."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixmo_fastai.epochs import TrainedEpochCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import first_difference, unwrap

_STANDING = "selection.standing"


class BestEpochCallback(TrainedEpochCallback):
    """Keep the weights of the epoch that is best on the validation split.

    The best epoch has the highest accuracy of the ensemble; of several, the one with the lowest
    validation loss, and of these the first. The caller decides when to `restore` them.
    """

    order = 57  # after the Recorder

    def __init__(self) -> None:
        super().__init__()
        self.standing: tuple[float, float, int] | None = None  # accuracy, -loss, epoch from 1
        self.weights: dict[str, Tensor] = {}

    @property
    def number(self) -> int | None:
        """The best epoch so far, counted from 1."""
        return None if self.standing is None else self.standing[2]

    def after_trained_epoch(self) -> None:
        """Keep the weights where they are the best so far."""
        _, loss, accuracy, *_ = self.learn.final_record
        standing = (float(accuracy), -float(loss), self.learn.epoch + 1)
        if self.standing is None or standing[:2] > self.standing[:2]:
            self.standing = standing
            state = unwrap(self.learn.model).state_dict()
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def restore(self, model: nn.Module) -> None:
        """Put the best weights into a network.

        Raises:
            InputError: no epoch was validated.
        """
        if not self.weights:
            raise InputError("No epoch was validated, so that none is the best.")
        unwrap(model).load_state_dict(self.weights)

    def state_tensors(self) -> dict[str, Tensor]:
        """Give what a resumed fit needs; nothing before the first epoch is done."""
        if self.standing is None:
            return {}
        return {**self.weights, _STANDING: torch.tensor(self.standing, dtype=torch.float64)}

    def load_state_tensors(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Go on from `state_tensors`.

        Args:
            state: what it gave.
            like: the tensors of the network that goes on.

        Raises:
            InputError: they are no such state.
        """
        if not state:
            return
        standing = torch.zeros(3, dtype=torch.float64)
        if odd := first_difference(state, {**like, _STANDING: standing}):
            raise InputError(f"The state of the best epoch is of another network: {odd}.")
        accuracy, negative_loss, epoch = state[_STANDING].tolist()
        self.standing = (accuracy, negative_loss, int(epoch))
        self.weights = {name: tensor for name, tensor in state.items() if name != _STANDING}
