"""fastai metrics of a network with several members."""

from typing import Any

from fastai.learner import Metric
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import unwrap


class MemberAccuracy(Metric):
    """Mean accuracy of the members on their own, from the forward pass of the ensemble.

    Of several labels per image, (B, K), it is fastai's `accuracy_multi`: the share of right
    decisions at a probability of 0.5. Ensemble figures are those of fastai's ordinary metrics.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new pass."""
        self.num_right: float | Tensor = 0.0
        self.num_seen = 0

    def accumulate(self, learn: Any) -> None:
        """Add the batch that the network has just seen."""
        network = unwrap(learn.model)
        if learn.training:  # each member's images have been put one after the other
            pred = learn.pred[:, None]
        else:
            pred = network.predictions(network.latest_member_logits)  # (B, M, K)
        is_probability = getattr(network, "output", None) is not None
        right = (
            _right(pred, learn.y, 0.5 if is_probability else 0.0).float().flatten(1).mean(dim=1)
        )  # (B,)
        right = learn.to_detach(right, cpu=False)  # of all processes, where fastai shares images
        # Summed up where it is, so that a GPU does not wait.
        self.num_right = self.num_right + right.sum()
        self.num_seen += len(right)

    @property
    def value(self) -> float | None:
        """The accuracy in [0, 1], or None before any batch."""
        return float(self.num_right) / self.num_seen if self.num_seen else None

    @property
    def name(self) -> str:
        """The heading of its column."""
        return "member_accuracy"


def _right(pred: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Return which decisions of members (B, M, K) are right: (B, M), or (B, M, K) of several.

    The threshold is that of one label of several, 0 of logits and 0.5 of probabilities.
    """
    if targets.ndim == 1:
        if targets.is_floating_point():
            raise InputError(
                "MemberAccuracy is of classes; the targets are numbers to predict.\n"
                "Name other metrics, as metrics=mae."
            )
        return pred.argmax(dim=2) == targets[:, None]
    return (pred > threshold) == (targets[:, None] > 0.5)
