"""Read the metrics of a run: the final split, and the reliability of a temperature."""

import math
from collections.abc import Mapping
from typing import Any

from mixmo_fastai.metrics.table import round_percent

MAX_TEMPERATURE_ERROR = 0.1
"""Relative standard error of a temperature above which its metrics come with a warning."""


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
    limit = round_percent(MAX_TEMPERATURE_ERROR)
    shown = round_percent(error)
    if shown == limit:
        shown = f"{math.ceil(1000 * error) / 10} %"
    return (
        f"{subject} is fitted on too few images: {metrics['num_images']:,}, a standard error "
        f"of {shown} (at most {limit})."
    )


def temperature_error(metrics: Mapping[str, Any]) -> float:
    """Return the largest relative standard error of the temperatures; 0 if none is known.

    Args:
        metrics: entry "calibrated" or "cross_fitted" of `evaluation.evaluate_splits`.
    """
    errors: list[float] = metrics.get("temperature_errors", [metrics.get("temperature_error", 0.0)])
    return max(errors)
