"""Out of distribution: does a network know what it has never been trained on?

Shapes: N images of the data set, O images of another one, M members, K classes.
Sources: Hendrycks, Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
Examples", ICLR 2017 (confidence, AUROC, AUPR); Liang, Li, Srikant, "ODIN", ICLR 2018 (false
positives at 95 %).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from mixmo_fastai.calibration import check_logits
from mixmo_fastai.diversity import information_per_sample
from mixmo_fastai.errors import InputError

ACCEPTED = 0.95
"""Share of the data set's own images that is accepted where false positives are counted."""


def confidence_uncertainty(member_logits: Tensor) -> Tensor:
    """Give 1 - the largest probability of the ensemble, the mean of logits: (N, M, K) -> (N,)."""
    return 1 - member_logits.double().mean(dim=1).softmax(dim=1).amax(dim=1)


def entropy_uncertainty(member_logits: Tensor) -> Tensor:
    """Give the entropy of the ensemble, the mean of logits, in nats: (N, M, K) -> (N,)."""
    probabilities = member_logits.double().mean(dim=1).softmax(dim=1)
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=1)
    return entropy


UNCERTAINTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": confidence_uncertainty,
    "entropy": entropy_uncertainty,
    "mutual_information": information_per_sample,
}
"""What tells a strange image, by name: each (N, M, K) -> (N,), larger for stranger."""


def detection_metrics(own: Tensor, other: Tensor) -> dict[str, Any]:
    """Compute how well each uncertainty tells images of another data set from the own ones.

    Args:
        own: member logits (N, M, K) of the data set's own test images.
        other: member logits (O, M, K) of the other images.

    Returns:
        by the name of the uncertainty: "auroc", the probability that an image of the other set is
        the less certain one; "aupr", the average precision with the other set as positive;
        "fpr95", the share of the other set that is accepted where 95 % of the own images are.
        "absent", there only then, maps an uncertainty that cannot be computed to the reason.

    Raises:
        InputError: wrong shapes, or logits that are not finite.
    """
    for name, logits in (("own", own), ("other", other)):
        check_logits(logits, axes="(N, M, K)", name=name)
    figures: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, uncertainty in UNCERTAINTIES.items():
        try:
            figures[name] = separation(uncertainty(own).numpy(), uncertainty(other).numpy())
        except InputError as error:
            absent[name] = str(error)
    return {**figures, "absent": absent} if absent else figures


def separation(own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Compute AUROC, AUPR and the false positive rate at 95 %; see `detection_metrics`.

    Args:
        own: uncertainties (N,) of the own images.
        other: uncertainties (O,) of the others.
    """
    scores = np.concatenate([own, other])
    is_other = np.arange(len(scores)) >= len(own)
    # The least limit that accepts 95 % of the own images; what ties with it is accepted too.
    limit = np.sort(own)[math.ceil(ACCEPTED * len(own) - 1e-9) - 1]
    return {
        "auroc": float(roc_auc_score(is_other, scores)),
        "aupr": float(average_precision_score(is_other, scores)),
        "fpr95": float((other <= limit).mean()),
    }
