"""What each member of a Learner's network predicts.

Shapes: N images, M members, K classes, labels or numbers.
"""

from typing import Any, NamedTuple

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import Tensor

from mixmo_fastai.diversity import mixture_information
from mixmo_fastai.errors import InputError
from mixmo_fastai.losses import MixMoLoss
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap


class MemberPreds(NamedTuple):
    """Predictions of the members, image by image, on the CPU.

    Attributes:
        probabilities: (N, M, K), of the activation of the Learner's loss: softmax for classes,
            sigmoid for several labels; numbers to predict as they are.
        targets: (N,) or (N, K); None for a loader without targets.
        votes: each member's decision: classes (N, M), labels (N, M, K), or the numbers again.
        mutual_information: (N,) of class and member, in nats, from 0 to log M; for several labels
            summed over them. It is large where members contradict each other with confidence. None
            for one member, and for numbers to predict.
    """

    probabilities: Tensor
    targets: Tensor | None
    votes: Tensor
    mutual_information: Tensor | None


def member_preds(learn: Learner, ds_idx: int = 1, dl: Any = None) -> MemberPreds:
    """Return what each member predicts, as `Learner.get_preds` returns the ensemble's predictions.

    Every member sees every image, in one forward pass. The ensemble's probabilities are those of
    the mean of the members' logits, not the mean of their probabilities.

    Args:
        learn: with a MixMo network; it is left as it was.
        ds_idx: which of the Learner's loaders: 0 for training, without shuffling, 1 for validation.
        dl: another loader, such as `learn.dls.test_dl(files)`, in place of `ds_idx`.

    Raises:
        InputError: the Learner's network is no MixMo network.
    """
    network = unwrap(learn.model)
    if not isinstance(network, MixMoModel):
        raise InputError(
            f"member_preds needs a MixMo network; the Learner has a {type(network).__name__}.\n"
            "Convert it first: to_mixmo(learn)."
        )
    own = learn.loss_func
    loss = own if isinstance(own, MixMoLoss) else MixMoLoss(own)
    members = _MemberLogits()
    # fastai brings what the activation returns into the order of the data set.
    logits, targets = learn.get_preds(
        ds_idx=ds_idx, dl=dl, cbs=members, act=lambda _: torch.cat(members.batches)
    )
    rows = loss.activation(logits.flatten(0, 1))
    probabilities = rows.reshape(logits.shape)
    votes = loss.decodes(rows)
    return MemberPreds(
        probabilities,
        None if targets is None else targets.as_subclass(Tensor),
        votes.reshape(*logits.shape[:2], *votes.shape[1:]).as_subclass(Tensor),
        _information(probabilities, votes),
    )


class _MemberLogits(Callback):
    """Keep the members' logits of each batch, as fastai keeps the ensemble's."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []

    def after_batch(self) -> None:
        """Bring the batch that the network has just seen to the host."""
        network = unwrap(self.learn.model)
        logits = network.predictions(network.latest_member_logits).as_subclass(Tensor)
        self.batches.append(self.learn.to_detach(logits))


def _information(probabilities: Tensor, votes: Tensor) -> Tensor | None:
    """Compute the mutual information of probabilities (N, M, K); votes are rows of decisions."""
    if probabilities.shape[1] < 2 or votes.is_floating_point():
        return None
    if votes.ndim == 1:  # a class
        return mixture_information(probabilities)
    both = torch.stack([probabilities, 1 - probabilities], dim=-1)  # (N, M, K, 2)
    return mixture_information(both).sum(dim=-1)
