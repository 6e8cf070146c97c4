"""Lines about calibration, prediction sets and accepted predictions."""

from collections.abc import Mapping
from typing import Any

from mixmo_fastai.metrics.table import percent

CONFIDENCE_NAMES = {
    "confidence": "by confidence",
    "entropy": "by entropy",
    "mutual-information": "by mutual information",
    "max-logit": "by maximum logit",
    "energy": "by energy",
}


def calibration_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describe the calibration of a run and what it promises, as far as the metrics have it.

    Args:
        metrics: from `evaluation.evaluate_splits`.
    """
    rows = []
    if calibration := metrics.get("calibration"):
        rows.append(("Calibration", _calibration_text(calibration)))
    if sets := metrics.get("sets"):
        rows += _set_rows(sets)
    if abstention := metrics.get("abstention"):
        rows += _abstention_rows(abstention)
    return rows


def _calibration_text(calibration: Mapping[str, Any]) -> str:
    images = f"{calibration['num_images']:,} validation images"
    if calibration["method"] == "none":
        return f"none: {calibration['reason']}"
    name = "vector scaling"
    if calibration["temperature"] is not None:
        name = f"temperature {calibration['temperature']:.3f}"
    before, after = calibration["before"], calibration["after"]
    return (
        f"{name}, fitted on {images}; cross-validated on them: NLL {before['nll']:.4f} to "
        f"{after['nll']:.4f}, ECE {percent(before['ece'])} to {percent(after['ece'])}"
    )


def _set_rows(sets: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, values in sets.items():
        if name == "requested_coverage" or "absent" in values:
            continue
        low, high = map(percent, values["interval"])
        text = (
            f"{name}: coverage {percent(values['coverage'])} ({low} to {high}), "
            f"{values['mean_size']:.2f} classes on average"
        )
        rows.append(("" if rows else f"Sets, {_fraction_text(sets['requested_coverage'])}", text))
    if not rows:
        reasons = [values["absent"] for values in sets.values() if isinstance(values, Mapping)]
        rows = [(f"Sets, {_fraction_text(sets['requested_coverage'])}", f"none: {reasons[0]}")]
    return rows


def _abstention_rows(abstention: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, values in abstention.items():
        if name == "max_risk":
            continue
        text = f"{CONFIDENCE_NAMES[name]}: accepts {percent(values['coverage'])}"
        if values["risk"] is not None:
            low, high = map(percent, values["interval"])
            text += f", of which {percent(values['risk'])} are wrong ({low} to {high})"
        elif values["threshold"] is None:
            text += ", since no threshold guarantees that risk on the validation images"
        rows.append(("" if rows else f"Risk, {_fraction_text(abstention['max_risk'])}", text))
    return rows


def _fraction_text(value: float) -> str:
    return f"{100 * value:g} %"
