"""Logits of the members in the validation of a Learner.

Shapes: B samples of a batch, M members, K classes.
"""

from typing import Any

from fastai.callback.core import Callback
from torch import Tensor

from mixmo_fastai.errors import signature_mismatch
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap


class MemberLogits(Callback):
    """Keep the member logits of the current validation batch, for metrics of the members.

    `add_member_logits` adds it together with the callback that requests them. The network computes
    them anyway; all other callbacks, the loss and the metrics get the ensemble's predictions (B,
    K), as without these two.

    Attributes:
        logits: (B, M, K), without the network's `output` layer; None if there are none.
    """

    order, run_train = -100, False  # the first after the network
    logits: Tensor | None = None

    def before_batch(self) -> None:
        """Drop the logits of the previous batch."""
        self.logits = None

    def after_pred(self) -> None:
        """Keep the member logits; replace them by the ensemble's predictions."""
        if len(self.learn.xb) == 3 and self.learn.xb[1:] == _REQUEST:
            self.learn.xb = self.learn.xb[:1]
            self.logits = self.learn.pred.detach()
            self.learn.pred = unwrap(self.learn.model).predictions(self.learn.pred.mean(dim=1))

    def after_validate(self) -> None:
        """Drop the logits of the last batch."""
        self.logits = None


class RequestMembers(Callback):
    """Make the network return member logits in validation, for `MemberLogits`."""

    order, run_train = 1000, False  # the last before the network

    def before_batch(self) -> None:
        """Request member logits by the arguments of the network."""
        is_requested = any(isinstance(other, MemberLogits) for other in self.learn.cbs)
        network = unwrap(self.learn.model)
        if is_requested and len(self.learn.xb) == 1 and _can_return_members(network):
            self.learn.xb = (*self.learn.xb, *_REQUEST)


_REQUEST = (None, True)  # no masks, all members


def _can_return_members(network: Any) -> bool:
    # A forward pass of the user's may take fewer arguments.
    return isinstance(network, MixMoModel) and (
        signature_mismatch(network.forward, "inputs", *_REQUEST) is None
    )


def current_member_logits(learn: Any) -> Tensor:
    """Return the member logits (B, M, K) of a Learner's current validation batch.

    Without the callback `MemberLogits`, the batch passes through the network a second time.
    """
    for callback in learn.cbs:
        if isinstance(callback, MemberLogits) and callback.logits is not None:
            return callback.logits
    logits: Tensor = unwrap(learn.model).member_logits(*learn.xb)
    return logits.detach()


def missing_callbacks(learn: Any) -> list[Callback]:
    """Create those of the two callbacks that a Learner does not have."""
    kinds = (MemberLogits, RequestMembers)
    return [kind() for kind in kinds if not any(isinstance(cb, kind) for cb in learn.cbs)]


def add_member_logits(learn: Any) -> None:
    """Add `MemberLogits` and `RequestMembers` to a Learner if it does not have them."""
    learn.add_cbs(missing_callbacks(learn))
