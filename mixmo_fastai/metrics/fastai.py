"""fastai metrics for the `metrics` of a Learner: calibration of the predictions, and the members.

Shapes: B samples of a batch, M members, K classes, Q bins.

All of them are sums over samples, kept in float64 on the device of the predictions: the memory does
not grow with the number of samples, and no batch waits for the device. They equal the metrics of
`evaluation.evaluate_logits` on the same logits.

Example:
    A network that leaves inputs of zero unchanged, so that both classes have probability 1/2. The
    first class is predicted, and it is correct three times in four.

    >>> import fastai.callback.progress  # adds `no_bar` to Learner
    >>> from fastai.data.core import DataLoaders
    >>> from fastai.data.load import DataLoader
    >>> from fastai.learner import Learner
    >>> loader = DataLoader([*zip(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))], bs=3)
    >>> dls = DataLoaders(loader, loader, device="cpu")
    >>> metrics = [NLL(), Brier(), ECE()]
    >>> learn = Learner(dls, torch.nn.PReLU(), torch.nn.CrossEntropyLoss(), metrics=metrics)
    >>> with learn.no_bar():
    ...     loss, nll, brier, ece = learn.validate()
    >>> round(nll, 4), brier, ece  # log 2, 1/4 + 1/4, |3/4 - 1/2|
    (0.6931, 0.5, 0.25)
"""

from typing import Any

import torch
from fastai.learner import Metric
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.calibration import (
    NUM_BINS,
    brier_terms,
    check_num_bins,
    ece_terms,
    nll_terms,
)
from mixmo_fastai.metrics.diversity import disagreement_terms
from mixmo_fastai.metrics.members import current_member_logits
from mixmo_fastai.mixing.base_losses import is_known, is_multi_label, loss_name
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap

__all__ = ["ECE", "NLL", "Brier", "Disagreement", "MemberAccuracy", "StreamingMetric"]


class StreamingMetric(Metric):
    """A metric that is computed from the mean of its terms over all samples.

    Subclasses implement `terms`. Their name in fastai's tables is that of the class in snake case.
    In distributed training, `distributed.SummedMetrics` adds up `sums` and `num_seen`.

    Attributes:
        sums: sums of the terms over the samples so far: a scalar, or (Q,).
        num_seen: number of samples so far.
        sums_columns: whether the terms are (B, Q) instead of (B,); see `terms`.

    Example:
        >>> class Confidence(StreamingMetric):
        ...     def terms(self, learn):
        ...         return learn.pred.double().softmax(dim=1).amax(dim=1)
        >>> Confidence().name
        'confidence'
    """

    sums_columns = False
    # Class attributes, since Learners exported by version 0.1.0 do not have them.
    sums: float | Tensor = 0.0
    num_seen: int = 0

    def reset(self) -> None:
        """Reset the sums."""
        self.sums, self.num_seen = 0.0, 0

    def check(self, learn: Any) -> None:
        """Check that the metric is defined for a Learner; `MixMoCallback` calls it before a fit."""

    def terms(self, learn: Any) -> Tensor:
        """Compute the terms of the current batch, without waiting for the device.

        Returns:
            Terms (B,) in float64 on the device of the predictions, the mean of which is the metric;
            or, if `sums_columns` is True, (B, Q), for which the metric is the sum over Q of the
            absolute values of their means.
        """
        raise InputError(f"{type(self).__name__} must define the method terms(learn).")

    def accumulate(self, learn: Any) -> None:
        """Add the current batch."""
        terms = self.terms(learn)
        self._check_terms(terms, learn)
        terms = learn.to_detach(terms, cpu=False)  # gathers those of all processes
        self.sums = self.sums + terms.sum(dim=0)
        self.num_seen += len(terms)

    def _check_terms(self, terms: Any, learn: Any) -> None:
        count = len(learn.pred) if isinstance(learn.pred, Tensor) else None
        if isinstance(terms, Tensor):
            is_valid = terms.ndim == 1 or (terms.ndim == 2 and self.sums_columns)
            if is_valid and terms.is_floating_point() and count in (None, len(terms)):
                return
            found = f"{tuple(terms.shape)} of {str(terms.dtype).removeprefix('torch.')}"
        else:
            found = type(terms).__name__
        raise InputError(
            f"{type(self).__name__}.terms must return one floating-point number per sample, "
            f"({'B' if count is None else count},); got {found}."
        )

    @property
    def value(self) -> float | None:
        """The metric of all samples so far; None if there are none."""
        if not self.num_seen:
            return None
        means = torch.as_tensor(self.sums, dtype=torch.float64) / self.num_seen
        return float(means.abs().sum() if means.ndim else means)


class _ClassificationMetric(StreamingMetric):
    """A metric of the predicted logits (B, K) and classes (B,), in any classification Learner.

    With a MixMo network, the logits are those of the ensemble. If fastai's training metrics are
    enabled, they are those of the members in training, each on its own images.
    """

    def check(self, learn: Any) -> None:
        """Check the loss, if it is one of torch or fastai; others are checked at the first batch.

        Raises:
            InputError: its activation is not the softmax.
        """
        loss = _as_mixmo_loss(learn)
        if is_known(loss.base) and not _uses_softmax(loss, torch.zeros(1, 2)):
            raise self._error(loss)

    def terms(self, learn: Any) -> Tensor:
        """Compute the terms of the current batch: (B,) or (B, Q).

        Raises:
            InputError: the Learner's loss does not compare softmax probabilities with one class per
                image.
        """
        logits, labels = learn.pred, learn.y
        is_classification = (
            isinstance(labels, Tensor)
            and labels.ndim == 1
            and not labels.is_floating_point()
            and isinstance(logits, Tensor)
            and logits.ndim == 2
            and len(logits) == len(labels)
        )
        if not is_classification:
            raise self._error(_as_mixmo_loss(learn), f"{_describe(labels)} and ")
        if not self.num_seen:  # the loss does not change between batches, and its check waits
            loss = _as_mixmo_loss(learn)
            if not _uses_softmax(loss, logits):
                raise self._error(loss)
        return self.terms_of(_in_float64(logits), _plain(labels, logits))

    def _error(self, loss: MixMoLoss, targets: str = "") -> InputError:
        name = type(self).__name__
        return InputError(
            f"{name} needs one class per image and a loss of softmax probabilities, such as "
            f"cross-entropy; got {targets}the loss {loss_name(loss.base)!r}.\n"
            f"Remove {name}() from the metrics."
        )

    def terms_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the terms of logits (B, K) and labels (B,): (B,) or (B, Q), in float64."""
        raise NotImplementedError


class NLL(_ClassificationMetric):
    """Negative log-likelihood: mean of -log probability of the true class, in nats.

    It equals the validation loss if this is cross-entropy without class weights and label
    smoothing. For another loss of softmax probabilities, such as fastai's label smoothing or focal
    loss, it is still the negative log-likelihood.

    Example:
        >>> terms = NLL().terms_of(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        >>> terms
        tensor([0.6931], dtype=torch.float64)
    """

    def terms_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the negative log-likelihood of each sample: (B,)."""
        return nll_terms(logits, labels)


class Brier(_ClassificationMetric):
    """Brier score: mean of the squared error of the probabilities, summed over the classes.

    Example:
        >>> Brier().terms_of(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.5000], dtype=torch.float64)
    """

    def terms_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the Brier score of each sample: (B,)."""
        return brier_terms(logits, labels)


class ECE(_ClassificationMetric):
    """Expected calibration error: gap between confidence and accuracy, in bins of equal width.

    Args:
        num_bins: Q, the number of bins.

    Raises:
        InputError: `num_bins` is below one.

    Example:
        >>> ECE(num_bins=2).terms_of(torch.zeros(1, 2), torch.tensor([0]))  # 1 - 1/2, first bin
        tensor([[0.5000, 0.0000]], dtype=torch.float64)
    """

    sums_columns = True

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        check_num_bins(num_bins)
        self.num_bins = num_bins

    def terms_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute correctness - confidence of each sample in the column of its bin: (B, Q)."""
        return ece_terms(logits, labels, self.num_bins)


class MemberAccuracy(StreamingMetric):
    """Mean accuracy of the individual members, computed from the forward pass of the ensemble.

    For multi-label targets (B, K), it equals fastai's `accuracy_multi`: the fraction of correct
    decisions at a probability of 0.5. For the accuracy of the ensemble, use fastai's metrics.

    Example:
        >>> from mixmo_fastai.learner.build import mixmo_learner
        >>> from mixmo_fastai.data.dataloaders import make_dataloaders
        >>> from mixmo_fastai.data.sources import load_source
        >>> dls = make_dataloaders(load_source("digits"), batch_size=16, valid_split=0.1)
        >>> learn = mixmo_learner(dls, "wrn10_1", metrics=MemberAccuracy())
        >>> for head in learn.model.heads:  # each member always predicts the first class
        ...     nothing = torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        >>> with learn.no_bar():
        ...     loss, member_accuracy = learn.validate()
        >>> round(member_accuracy, 1)  # one of ten classes
        0.1
    """

    def terms(self, learn: Any) -> Tensor:
        """Compute the fraction of correct members or decisions of each sample: (B,).

        Raises:
            InputError: the network is not a MixMo network, or the targets are regression targets.
        """
        network = _mixmo_network(self, learn)
        if learn.training:  # MixMoCallback has flattened the members into the batch axis
            pred = learn.pred[:, None]
        else:
            pred = network.predictions(current_member_logits(learn))  # (B, M, K)
        has_output_layer = getattr(network, "output", None) is not None
        threshold = 0.5 if has_output_layer else 0.0
        targets = learn.y.as_subclass(Tensor)
        is_number = targets.ndim == 1 and targets.is_floating_point()
        if is_number and is_multi_label(_as_mixmo_loss(learn).base):
            targets = targets[:, None]  # one label, which an image has or not
        correct = _correct(pred.as_subclass(Tensor), targets, threshold)
        return _in_float64(correct).flatten(1).mean(dim=1)


class Disagreement(StreamingMetric):
    """Fraction of images on which two members predict different classes, mean over pairs.

    It is nan where it is undefined: for a network with one member, and in training, where the
    members see different images.

    Example:
        >>> from mixmo_fastai.learner.build import mixmo_learner
        >>> from mixmo_fastai.data.dataloaders import make_dataloaders
        >>> from mixmo_fastai.data.sources import load_source
        >>> dls = make_dataloaders(load_source("digits"), batch_size=16, valid_split=0.1)
        >>> learn = mixmo_learner(dls, "wrn10_1", num_members=3, mix="sum", metrics=Disagreement())
        >>> for head, favourite in zip(learn.model.heads, (4, 4, 7)):  # two members always agree
        ...     nothing = torch.nn.init.zeros_(head.weight), head.bias.data[favourite].fill_(9)
        >>> with learn.no_bar():
        ...     loss, disagreement = learn.validate()
        >>> round(disagreement, 4)  # two of three pairs
        0.6667
    """

    def terms(self, learn: Any) -> Tensor:
        """Compute the fraction of pairs of members that differ, for each sample: (B,).

        Raises:
            InputError: the network is not a MixMo network, or the targets are not classes.
        """
        network = _mixmo_network(self, learn)
        if learn.y.ndim != 1 or learn.y.is_floating_point():
            raise InputError(
                f"Disagreement needs one class per image; got {_describe(learn.y)}.\n"
                "Remove Disagreement() from the metrics."
            )
        if learn.training or network.num_members == 1:
            return _in_float64(torch.full(learn.y.shape, torch.nan, device=learn.y.device))
        return disagreement_terms(_in_float64(current_member_logits(learn)))


def _mixmo_network(metric: StreamingMetric, learn: Any) -> Any:
    """Return the Learner's MixMo network.

    Raises:
        InputError: the network is another one.
    """
    network = unwrap(learn.model)
    if not isinstance(network, MixMoModel):
        raise InputError(
            f"{type(metric).__name__} needs a MixMo network; the Learner has a "
            f"{type(network).__name__}.\nConvert it first, to_mixmo(learn), or remove "
            f"{type(metric).__name__}() from the metrics."
        )
    return network


def _as_mixmo_loss(learn: Any) -> MixMoLoss:
    loss = learn.loss_func
    return loss if isinstance(loss, MixMoLoss) else MixMoLoss(loss)


def _uses_softmax(loss: MixMoLoss, logits: Tensor) -> bool:
    """Check whether the activation of a loss is the softmax of logits like these, (B, K)."""
    num_classes = logits.shape[1]
    if num_classes < 2:
        return False
    probe = torch.linspace(-1, 2, 2 * num_classes, device=logits.device).view(2, num_classes)
    probabilities = loss.activation(probe)
    return probabilities.shape == probe.shape and torch.allclose(
        probabilities.to(probe), probe.softmax(dim=1)
    )


def _in_float64(values: Tensor) -> Tensor:
    """Convert values to float64, on the CPU if their device is Apple's MPS, which has none."""
    values = values.detach().as_subclass(Tensor)
    return (values.cpu() if values.device.type == "mps" else values).double()


def _plain(labels: Tensor, logits: Tensor) -> Tensor:
    labels = labels.as_subclass(Tensor)
    return labels.cpu() if logits.device.type == "mps" else labels


def _describe(targets: Any) -> str:
    """Describe targets by dtype and shape, such as "float32 targets (B, 3)"."""
    if not isinstance(targets, Tensor):
        return f"{type(targets).__name__} targets"
    sizes = ", ".join(("B", *map(str, targets.shape[1:])))
    return f"{str(targets.dtype).removeprefix('torch.')} targets ({sizes})"


def _correct(pred: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Check which member predictions are correct: (B, M), or (B, M, K) for multi-label targets.

    Args:
        pred: member logits or probabilities (B, M, K).
        targets: (B,) or (B, 1) class indices, or (B, K) multi-label.
        threshold: decision threshold for multi-label targets, 0 for logits, 0.5 for probabilities.
    """
    if targets.ndim == 2 and targets.shape[1] == 1 != pred.shape[2]:
        targets = targets[:, 0]
    if targets.ndim == 1:
        if targets.is_floating_point():
            raise InputError(
                f"MemberAccuracy needs class targets; got {targets.dtype} regression targets.\n"
                "Pass other metrics, such as metrics=mae."
            )
        return pred.argmax(dim=2) == targets[:, None]
    return (pred > threshold) == (targets[:, None] > 0.5)
