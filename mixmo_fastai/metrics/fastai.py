"""fastai metrics for networks with several members."""

from typing import Any

from fastai.learner import Metric
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.models.mixmo_model import unwrap


class MemberAccuracy(Metric):
    """Mean accuracy of the individual members, computed from the forward pass of the ensemble.

    For multi-label targets (B, K), it equals fastai's `accuracy_multi`: the fraction of correct
    decisions at a probability of 0.5. For the accuracy of the ensemble, use fastai's metrics.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset the counts."""
        self.num_correct: float | Tensor = 0.0
        self.num_seen = 0

    def accumulate(self, learn: Any) -> None:
        """Add the current batch."""
        network = unwrap(learn.model)
        if learn.training:  # MixMoCallback has flattened the members into the batch axis
            pred = learn.pred[:, None]
        else:
            pred = network.predictions(network.latest_member_logits)  # (B, M, K)
        has_output_layer = getattr(network, "output", None) is not None
        threshold = 0.5 if has_output_layer else 0.0
        correct = _correct(pred, learn.y, threshold).float().flatten(1).mean(dim=1)  # (B,)
        correct = learn.to_detach(correct, cpu=False)  # gathers the values of all processes
        # The sum stays on the device, to avoid synchronisation.
        self.num_correct = self.num_correct + correct.sum()
        self.num_seen += len(correct)

    @property
    def value(self) -> float | None:
        """The accuracy in [0, 1], or None before the first batch."""
        return float(self.num_correct) / self.num_seen if self.num_seen else None

    @property
    def name(self) -> str:
        """Column name in fastai's table."""
        return "member_accuracy"


def _correct(pred: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Check which member predictions are correct: (B, M), or (B, M, K) for multi-label targets.

    Args:
        pred: member logits or probabilities (B, M, K).
        targets: (B,) class indices, or (B, K) multi-label.
        threshold: decision threshold for multi-label targets, 0 for logits, 0.5 for probabilities.
    """
    if targets.ndim == 1:
        if targets.is_floating_point():
            raise InputError(
                f"MemberAccuracy needs class targets; got {targets.dtype} regression targets.\n"
                "Pass other metrics, such as metrics=mae."
            )
        return pred.argmax(dim=2) == targets[:, None]
    return (pred > threshold) == (targets[:, None] > 0.5)
