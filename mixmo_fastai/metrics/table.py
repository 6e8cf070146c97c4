"""Display names and formats of metrics."""

from collections.abc import Callable
from typing import NamedTuple


def percent(value: float) -> str:
    """Format a fraction: 0.9751 is "97.51 %"."""
    return f"{100 * value:.2f} %"


def round_percent(value: float) -> str:
    """Format a fraction without decimals: 0.8 is "80 %"."""
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    """Format a difference of two fractions: 0.0123 is "+1.23 points"."""
    return f"{100 * value:+.2f} points"


def decimal(value: float) -> str:
    """Format a number with four decimals."""
    return f"{value:.4f}"


def signed_decimal(value: float) -> str:
    """Format a difference with four decimals and its sign."""
    return f"{value:+.4f}"


def nats(value: float) -> str:
    """Format an amount of information in nats."""
    return f"{value:.4f} nats"


class MetricFormat(NamedTuple):
    """Display name and format of a metric of `evaluation.evaluate_logits`.

    Attributes:
        name: key of the metric in the result of `evaluate_logits`.
        label: short display name.
        format_value: formats a value.
        definition: short definition.
    """

    name: str
    label: str
    format_value: Callable[[float], str]
    definition: str


METRICS = (
    MetricFormat(
        "accuracy", "Accuracy", percent, "images whose most likely class is the true class"
    ),
    MetricFormat("top5", "Top-5", percent, "images whose true class is among the five most likely"),
    MetricFormat("nll", "NLL", decimal, "mean of -log probability of the true class, in nats"),
    MetricFormat(
        "brier", "Brier", decimal, "squared error of the probabilities, summed over classes"
    ),
    MetricFormat(
        "ece", "ECE", percent, "gap between confidence and accuracy, 15 bins of equal width"
    ),
    MetricFormat("tace", "TACE", percent, "the same per class, bins of equal mass, above 0.001"),
    MetricFormat("failure_auroc", "Failure AUROC", percent, "confidence as a detector of errors"),
    MetricFormat("aurc", "AURC", percent, "error rate, mean over coverages; most confident first"),
    MetricFormat("risk_at_80", "Risk at 80 %", percent, "error rate among the most confident 80 %"),
    MetricFormat("risk_at_90", "Risk at 90 %", percent, "error rate among the most confident 90 %"),
    MetricFormat("risk_at_95", "Risk at 95 %", percent, "error rate among the most confident 95 %"),
    MetricFormat(
        "ratio_error", "Ratio of errors", decimal, "errors of one member per error of both"
    ),
    MetricFormat("disagreement", "Disagreement", percent, "images on which two members differ"),
    MetricFormat(
        "mutual_information", "Mutual information", nats, "between the members, mean over images"
    ),
)
METRIC_BY_NAME = {metric.name: metric for metric in METRICS}
MULTI_MEMBER_METRICS = ("ratio_error", "disagreement", "mutual_information")
"""Metrics that compare members: undefined for a network with one member."""
