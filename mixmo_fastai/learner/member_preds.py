"""Predictions of each member of a Learner's network.

Shapes: N images, M members, K classes, labels or regression targets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.diversity import mixture_information
from mixmo_fastai.metrics.members import current_member_logits, missing_callbacks
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap


class MemberPreds(NamedTuple):
    """Predictions of the members, image by image, on the CPU.

    Attributes:
        probabilities: (N, M, K), from the activation of the Learner's loss: softmax for
            single-label, sigmoid for multi-label; for regression, the outputs themselves.
        targets: (N,) or (N, K); None for a loader without targets.
        votes: each member's decision: classes (N, M), labels (N, M, K), or the regression outputs.
        mutual_information: (N,) between class and member, in nats, from 0 to log M; summed over the
            labels for multi-label. It is large if members disagree confidently. None for one member
            and for regression.
    """

    probabilities: Tensor
    targets: Tensor | None
    votes: Tensor
    mutual_information: Tensor | None


def member_preds(learn: Learner, ds_idx: int = 1, dl: Any = None) -> MemberPreds:
    """Return the predictions of each member; `Learner.get_preds` returns those of the ensemble.

    Every member sees every image, in one forward pass. The ensemble's probabilities come from the
    mean of the members' logits, not from the mean of their probabilities.

    Args:
        learn: a Learner with a MixMo network; it is not changed.
        ds_idx: index of the Learner's loader: 0 for training, without shuffling, 1 for validation.
        dl: another loader, such as `learn.dls.test_dl(files)`, instead of `ds_idx`.

    Raises:
        InputError: the Learner's network is not a `MixMoModel`.
    """
    network = unwrap(learn.model)
    if not isinstance(network, MixMoModel):
        raise InputError(
            f"member_preds needs a MixMo network; the Learner has a {type(network).__name__}.\n"
            "Convert it first: to_mixmo(learn)."
        )
    loss = learn.loss_func
    loss = loss if isinstance(loss, MixMoLoss) else MixMoLoss(loss)
    logits, targets = collect_preds(
        learn, lambda learn: network.predictions(current_member_logits(learn)), ds_idx, dl
    )
    rows = loss.activation(logits.flatten(0, 1))
    probabilities = rows.reshape(logits.shape)
    votes = loss.decodes(rows)
    return MemberPreds(
        probabilities,
        targets,
        votes.reshape(*logits.shape[:2], *votes.shape[1:]).as_subclass(Tensor),
        _mutual_information(probabilities, votes),
    )


def collect_preds(
    learn: Learner, of_batch: Callable[[Learner], Tensor], ds_idx: int = 1, dl: Any = None
) -> tuple[Tensor, Tensor | None]:
    """Collect what a function computes from each batch, in the order of the images.

    Args:
        learn: the Learner; it is not changed.
        of_batch: called after the forward pass of each batch of B images; returns (B, …).
        ds_idx: as for `Learner.get_preds`.
        dl: as for `Learner.get_preds`.

    Returns:
        (N, …) on the CPU; and the targets, None for a loader without targets.
    """
    collected = _Collect(of_batch)
    is_mixmo = isinstance(unwrap(learn.model), MixMoModel)
    # fastai sorts the output of `act` into the order of the data set.
    values, targets = learn.get_preds(
        ds_idx=ds_idx,
        dl=dl,
        cbs=[*(missing_callbacks(learn) if is_mixmo else []), collected],
        act=lambda _: torch.cat(collected.batches),
    )
    return values, None if targets is None else targets.as_subclass(Tensor)


class _Collect(Callback):
    """Collect what a function computes from each batch."""

    def __init__(self, of_batch: Callable[[Learner], Tensor]) -> None:
        super().__init__()
        self.of_batch, self.batches = of_batch, list[Tensor]()

    def after_batch(self) -> None:
        """Copy the result for the current batch to the CPU."""
        self.batches.append(self.learn.to_detach(self.of_batch(self.learn).as_subclass(Tensor)))


def _mutual_information(probabilities: Tensor, votes: Tensor) -> Tensor | None:
    """Compute the mutual information (N,) of probabilities (N, M, K); None if it is undefined.

    Args:
        probabilities: (N, M, K).
        votes: decisions, flattened over images and members: (N · M,) or (N · M, K).
    """
    if probabilities.shape[1] < 2 or votes.is_floating_point():
        return None
    if votes.ndim == 1:  # one class per image
        return mixture_information(probabilities)
    both = torch.stack([probabilities, 1 - probabilities], dim=-1)  # (N, M, K, 2)
    return mixture_information(both).sum(dim=-1)
