"""Out-of-distribution detection: how well uncertainty identifies images of another data set.

Shapes: N in-distribution images, O out-of-distribution images, M members, K classes.
Sources: Hendrycks, Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
Examples", ICLR 2017 (confidence, AUROC, AUPR); Liang, Li, Srikant, "ODIN", ICLR 2018 (false
positive rate at 95 % true positive rate); Liu, Wang, Owens, Li, "Energy-based Out-of-distribution
Detection", NeurIPS 2020 (energy); Hendrycks et al., "Scaling Out-of-Distribution Detection for
Real-World Settings", ICML 2022 (maximum logit).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.bootstrap import auroc_intervals
from mixmo_fastai.metrics.calibration import check_logits
from mixmo_fastai.metrics.diversity import AXES, mutual_information_per_sample

TRUE_POSITIVE_RATE = 0.95
"""Fraction of in-distribution images accepted at the threshold of the false positive rate."""


def confidence_uncertainty(member_logits: Tensor) -> Tensor:
    """Compute 1 - the largest probability of the ensemble (mean of logits): (N, M, K) -> (N,).

    Example:
        >>> confidence_uncertainty(torch.zeros(1, 2, 4)).item()  # each of four classes has 1/4
        0.75
    """
    return 1 - member_logits.double().mean(dim=1).softmax(dim=1).amax(dim=1)


def entropy_uncertainty(member_logits: Tensor) -> Tensor:
    """Compute the entropy of the ensemble (mean of logits), in nats: (N, M, K) -> (N,).

    Example:
        >>> round(entropy_uncertainty(torch.zeros(1, 2, 4)).item(), 4)  # log 4
        1.3863
    """
    probabilities = member_logits.double().mean(dim=1).softmax(dim=1)
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=1)
    return entropy


def max_logit_uncertainty(member_logits: Tensor) -> Tensor:
    """Compute minus the largest logit of the ensemble: (N, M, K) -> (N,) in float64.

    The ensemble's logits z are the mean of the members'. Unlike its confidence, -max_k z_k changes
    if a constant is added to all logits of an image.

    Args:
        member_logits: (N, M, K).

    Returns:
        (N,) in float64, without bounds, in the unit of logits (nats).

    Raises:
        InputError: wrong shape, or logits that are not finite.

    Example:
        >>> max_logit_uncertainty(torch.tensor([[[1.0, 4.0], [3.0, 2.0]]])).item()  # mean: 2 and 3
        -3.0
    """
    return -_ensemble_logits(member_logits).amax(dim=1)


def energy_uncertainty(member_logits: Tensor) -> Tensor:
    """Compute the energy of the ensemble at temperature 1: (N, M, K) -> (N,) in float64.

    E = -log Σ_k exp(z_k), where the ensemble's logits z are the mean of the members'. It is at most
    `max_logit_uncertainty`, and at most log K smaller.

    Args:
        member_logits: (N, M, K).

    Returns:
        (N,) in float64, without bounds, in nats.

    Raises:
        InputError: wrong shape, or logits that are not finite.

    Example:
        >>> round(energy_uncertainty(torch.zeros(1, 2, 4)).item(), 4)  # -log 4
        -1.3863
    """
    return -_ensemble_logits(member_logits).logsumexp(dim=1)


def _ensemble_logits(member_logits: Tensor) -> Tensor:
    """Check and average member logits: (N, M, K) -> (N, K) in float64."""
    check_logits(member_logits, axes=AXES, name="member_logits")
    return member_logits.double().mean(dim=1)


UNCERTAINTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": confidence_uncertainty,
    "max_logit": max_logit_uncertainty,
    "entropy": entropy_uncertainty,
    "energy": energy_uncertainty,
    "mutual_information": mutual_information_per_sample,
}
"""Measures of uncertainty by name: functions (N, M, K) -> (N,), larger for more uncertain."""


def detection_metrics(in_logits: Tensor, out_logits: Tensor) -> dict[str, Any]:
    """Compute how well each uncertainty separates in- and out-of-distribution images.

    Args:
        in_logits: member logits (N, M, K) of in-distribution test images.
        out_logits: member logits (O, M, K) of out-of-distribution images.

    Returns:
        metrics by uncertainty: "auroc", the probability that an out-of-distribution image is more
        uncertain than an in-distribution one; "aupr", the average precision with
        out-of-distribution as the positive class; "fpr95", the fraction of out-of-distribution
        images accepted at the threshold that accepts 95 % of the in-distribution images; and
        "auroc_interval", its 95 % bootstrap interval over the images of both kinds. If some
        uncertainties cannot be computed, "absent" maps them to the reason.

    Raises:
        InputError: wrong shapes, or logits that are not finite.

    Example:
        >>> certain, uncertain = 100 * torch.eye(4)[:, None], torch.zeros(4, 1, 4)
        >>> detection_metrics(certain, uncertain)["entropy"]
        {'auroc': 1.0, 'aupr': 1.0, 'fpr95': 0.0, 'auroc_interval': [1.0, 1.0]}
    """
    for name, logits in (("in_logits", in_logits), ("out_logits", out_logits)):
        check_logits(logits, axes=AXES, name=name)
    in_scores, out_scores, absent = {}, {}, {}
    for name, uncertainty in UNCERTAINTIES.items():
        try:
            in_scores[name], out_scores[name] = uncertainty(in_logits), uncertainty(out_logits)
        except InputError as error:
            absent[name] = str(error)
    ends = auroc_intervals(in_scores, out_scores)
    metrics: dict[str, Any] = {
        name: {
            **separation_metrics(scores.numpy(), out_scores[name].numpy()),
            "auroc_interval": list(ends[name]),
        }
        for name, scores in in_scores.items()
    }
    return {**metrics, "absent": absent} if absent else metrics


def separation_metrics(in_scores: np.ndarray, out_scores: np.ndarray) -> dict[str, float]:
    """Compute AUROC, AUPR and the FPR at 95 % TPR; see `detection_metrics`.

    Args:
        in_scores: uncertainties (N,) of in-distribution images.
        out_scores: uncertainties (O,) of out-of-distribution images.

    Example:
        >>> found = separation_metrics(np.array([0.1, 0.2]), np.array([0.15, 0.3]))
        >>> found["auroc"], found["fpr95"]  # 3 of 4 pairs are in order; 0.15 is below 0.2
        (0.75, 0.5)
        >>> round(found["aupr"], 4)  # (1/1 + 2/3) / 2
        0.8333
    """
    scores = np.concatenate([in_scores, out_scores])
    is_out = np.arange(len(scores)) >= len(in_scores)
    # The lowest threshold that accepts 95 % of the in-distribution images; ties are accepted.
    threshold = np.sort(in_scores)[math.ceil(TRUE_POSITIVE_RATE * len(in_scores) - 1e-9) - 1]
    return {
        "auroc": float(roc_auc_score(is_out, scores)),
        "aupr": float(average_precision_score(is_out, scores)),
        "fpr95": float((out_scores <= threshold).mean()),
    }
