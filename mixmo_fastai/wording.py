"""Display names and formats of methods, published results and metrics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mixmo_fastai.recipe import Recipe
from mixmo_fastai.resolve import changed_settings

PIXEL_NAMES = {"cutmix": "CutMix", "mixup": "Mixup"}
MAX_TEMPERATURE_ERROR = 0.1
"""Relative standard error of a temperature above which its metrics come with a warning."""
METHOD_NAMES = {"cutmix": "Cut-MixMo", "linear": "Linear-MixMo", "sum": "MIMO"}


SPLIT_NAMES = {"test": "Test", "valid": "Validation"}


def final_metrics(metrics: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the split of the final metrics, and the metrics on it.

    Args:
        metrics: from `evaluation.evaluate_splits`.

    Returns:
        "test", or "valid" if there are no labelled test images; and the metrics on that split.
    """
    split = "test" if "test" in metrics else "valid"
    return split, metrics[split]


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


def estimated_duration(seconds: float) -> str:
    """Format an estimated time in its largest unit: 4,000 is "about 67 min"."""
    if seconds < 10:
        return "a few seconds"
    unit, decimals, name = next(row[1:] for row in _DURATIONS if seconds < row[0])
    return f"about {seconds / unit:.{decimals}f} {name}"


_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_DURATIONS = (
    (100, 1, 0, "s"),
    (100 * _MINUTE, _MINUTE, 0, "min"),
    (10 * _HOUR, _HOUR, 1, "h"),
    (48 * _HOUR, _HOUR, 0, "h"),
    (1000 * _DAY, _DAY, 0, "days"),
    (float("inf"), 365 * _DAY, 0, "years"),
)
"""Upper limit of each row in seconds; seconds per unit, number of decimals and name of the unit."""


def truncate(name: str, length: int) -> str:
    """Truncate a name to at most `length` characters, the last of them "…"."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def duration(seconds: float) -> str:
    """Format a time: 192 is "3.2 min"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


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


def method_name(recipe: Recipe) -> str:
    """Return the display name of a recipe's method."""
    if recipe.name == "imported":
        return f"Imported network, members: {recipe.model.num_members}"
    name = METHOD_NAMES.get(recipe.mix.kind, f"MixMo ({recipe.mix.kind})")
    if recipe.model.num_members == 1:
        name = "Vanilla"
    if pixels := PIXEL_NAMES.get(recipe.mix.msda):
        name = f"{name} + {pixels}"
    if recipe.data.augmix:
        name = f"{name} + AugMix"
    nets = recipe.model.num_nets
    return f"{name}, deep ensemble of {nets} networks" if nets > 1 else name


def published_result(recipe: Recipe) -> str:
    """Return the published result of a recipe and the settings that differ; "" if there is none."""
    expected = recipe.expected
    if expected.accuracy is None:
        return ""
    text = f"{100 * expected.accuracy:.2f} % top-1 with {expected.arch} ({expected.source})"
    changed = changed_settings(recipe)
    return f"{text}; this run differs in {', '.join(changed)}" if changed else text


def temperature_warning(metrics: Mapping[str, Any]) -> str:
    """Return a warning if a temperature is uncertain; otherwise "".

    Args:
        metrics: entry "calibrated" or "cross_fitted" of `evaluation.evaluate_splits`.
    """
    error = temperature_error(metrics)
    if error <= MAX_TEMPERATURE_ERROR:
        return ""
    several = len(metrics.get("temperature_errors", ())) > 1
    subject = "Each temperature" if several else "The temperature"
    return (
        f"{subject} is fitted on too few images: {metrics['num_images']:,}, a standard error "
        f"of {round_percent(error)} (at most {round_percent(MAX_TEMPERATURE_ERROR)})."
    )


def temperature_error(metrics: Mapping[str, Any]) -> float:
    """Return the largest relative standard error of the temperatures; 0 if none is known.

    Args:
        metrics: entry "calibrated" or "cross_fitted" of `evaluation.evaluate_splits`.
    """
    errors: list[float] = metrics.get("temperature_errors", [metrics.get("temperature_error", 0.0)])
    return max(errors)
