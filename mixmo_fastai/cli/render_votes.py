"""Format the metrics of `--label-distribution` as lines of text."""

from collections.abc import Mapping
from typing import Any

from mixmo_fastai.cli.render import columns
from mixmo_fastai.evaluation.results import SPLIT_NAMES, final_metrics
from mixmo_fastai.metrics.table import percent

_METRICS = {
    "cross_entropy": "cross-entropy",
    "kl_divergence": "KL divergence",
    "brier": "Brier",
    "total_variation": "total variation",
}


def label_distribution_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Format the metrics against label distributions; no lines if they were not requested."""
    found = metrics.get("label_distribution")
    if found is None:
        return []
    low, high = found["intervals"]["vote_agreement"]
    lines = [
        _heading(found, SPLIT_NAMES[final_metrics(metrics)[0]].lower()),
        f"Votes for the data set's label {percent(found['label_agreement'])}, for the prediction "
        f"{percent(found['vote_agreement'])} ({percent(low)} to {percent(high)}); entropy of the "
        f"votes {found['label_entropy']:.4f} nats",
    ]
    # Nearer to the agreement of votes in random order than to full agreement.
    if found["label_agreement"] < (1 + found["chance_agreement"]) / 2:
        by_chance = percent(found["chance_agreement"])
        lines.append(
            f"Warning: votes in random order would agree with {by_chance} of the labels; check the "
            "order of rows and classes"
        )
    table = [("95 % CI (bootstrap)", *_METRICS.values()), ("raw", *_values(found))]
    if (calibrated := found.get("calibrated")) is not None:
        table.append((f"at temperature {calibrated['temperature']:.3f}", *_values(calibrated)))
    lines += columns([*zip(*table, strict=True)], left=(0, 1, 2))
    if calibrated is None:
        lines.append(f"calibrated: undefined: {found['absent']['calibrated']}")
    return [*lines, ""]


def _heading(found: Mapping[str, Any], split: str) -> str:
    num_images, left_out = found["num_images"], found["num_without_votes"]
    if "num_votes" in found:
        per_image = found["num_votes"] / num_images
        votes = f"{found['num_votes']:,} votes ({per_image:.1f} per image)"
    else:
        votes = "probabilities"
    text = f"Label distributions: {found['source']}, {found['layout']}: {votes} for "
    return f"{text}{num_images:,} {split} images" + f"; {left_out:,} without votes are left out" * (
        left_out > 0
    )


def _values(values: Mapping[str, Any]) -> list[str]:
    """Format each metric with its interval."""
    ends = [values["intervals"][name] for name in _METRICS]
    return [
        f"{values[name]:.4f} ({low:.4f} to {high:.4f})"
        for name, (low, high) in zip(_METRICS, ends, strict=True)
    ]
