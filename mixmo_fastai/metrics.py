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
        logits = unwrap(learn.model).latest_member_logits  # (B, M, K)
        if learn.training:  # each member's images have been put one after the other
            logits = learn.pred[:, None]
        right = _right(logits, learn.y).float().flatten(1).mean(dim=1)  # (B,)
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


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """Tell which decisions of members (B, M, K) are right: (B, M), or (B, M, K) of several."""
    if targets.ndim == 1:
        if targets.is_floating_point():
            raise InputError(
                "MemberAccuracy is of classes; the targets are numbers to predict.\n"
                "Name other metrics, as metrics=mae."
            )
        return logits.argmax(dim=2) == targets[:, None]
    return (logits > 0) == (targets[:, None] > 0.5)
