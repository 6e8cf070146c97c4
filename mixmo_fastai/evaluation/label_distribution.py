"""Evaluation of a run against label distributions.

Shapes: N images, M members, n images with votes, K classes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixmo_fastai.data.label_distributions import LabelDistributions
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.label_distribution import (
    label_agreement,
    label_distribution_metrics,
    label_entropy_terms,
)
from mixmo_fastai.metrics.summary import compute_defined


def evaluate_label_distribution(
    votes: LabelDistributions,
    member_logits: Tensor,
    labels: Tensor,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Compute the metrics of the images with votes, before and after temperature scaling.

    Args:
        votes: label distributions of n of the N images.
        member_logits: (N, M, K).
        labels: labels of the data set, (N,).
        metrics: from `evaluation.evaluate_splits`, with the temperature.

    Returns:
        - "source" and "layout": the file, and how it was read;
        - "num_images", "num_without_votes", "num_votes": images with and without votes, and votes;
        - "label_entropy": mean entropy of the votes, in nats;
        - "label_agreement" and "chance_agreement": see `label_distribution.label_agreement`;
        - the metrics of `label_distribution_metrics` with their "intervals";
        - "calibrated": the same at the "temperature" fitted on the validation split, except for
          "vote_agreement", which does not depend on the temperature.

        Undefined entries are omitted; "absent", present only then, maps their names to the reasons.
    """
    logits = member_logits.double().mean(dim=1)[votes.indices]  # (n, K)
    agreement, by_chance = label_agreement(votes.probabilities, labels[votes.indices])
    return {
        "source": str(votes.path),
        "layout": votes.layout,
        "num_images": len(votes.indices),
        "num_without_votes": len(labels) - len(votes.indices),
        "label_entropy": label_entropy_terms(votes.probabilities).mean().item(),
        "label_agreement": agreement,
        "chance_agreement": by_chance,
        **label_distribution_metrics(logits, votes.probabilities),
        **compute_defined(
            {
                "num_votes": lambda: _num_votes(votes),
                "calibrated": lambda: _calibrate(votes, logits, metrics),
            }
        ),
    }


def _num_votes(votes: LabelDistributions) -> int:
    if votes.num_votes is None:
        raise InputError(f"{votes.path.name} has probabilities instead of numbers of votes")
    return votes.num_votes


def _calibrate(
    votes: LabelDistributions, logits: Tensor, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    if "calibrated" not in metrics:
        raise InputError(metrics["absent"]["calibrated"])
    temperature = metrics["calibrated"]["temperature"]
    calibrated = label_distribution_metrics(logits / temperature, votes.probabilities)
    del calibrated["vote_agreement"], calibrated["intervals"]["vote_agreement"]
    return {"temperature": temperature, **calibrated}
