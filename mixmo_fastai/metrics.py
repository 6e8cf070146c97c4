"""fastai metrics of a network with several members."""

from typing import Any

from fastai.learner import Metric
from torch import Tensor

from mixmo_fastai.models.mixmo_model import unwrap


class MemberAccuracy(Metric):
    """Mean accuracy of the members on their own, from the forward pass of the ensemble.

    Ensemble figures are those of fastai's ordinary metrics.
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
        right = logits.argmax(dim=2) == learn.y[:, None]  # (B, M)
        # Summed up where it is, so that a GPU does not wait.
        self.num_right = self.num_right + right.float().mean(dim=1).sum()
        self.num_seen += len(right)

    @property
    def value(self) -> float | None:
        """The accuracy in [0, 1], or None before any batch."""
        return float(self.num_right) / self.num_seen if self.num_seen else None

    @property
    def name(self) -> str:
        """The heading of its column."""
        return "member_accuracy"
