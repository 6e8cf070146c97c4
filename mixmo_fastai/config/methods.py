"""Display names of methods, splits, published results and durations."""

from collections.abc import Mapping
from typing import Any

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.resolve import changed_settings
from mixmo_fastai.metrics.table import round_percent

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
