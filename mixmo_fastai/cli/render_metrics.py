"""Lines about the metrics of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixmo_fastai.cli.render import METRIC_WIDTH, align, columns, expected_rows
from mixmo_fastai.cli.render_calibration import calibration_rows
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.evaluation.results import SPLIT_NAMES, final_metrics, temperature_warning
from mixmo_fastai.metrics.label_results import (
    LABELS,
    NUM_SHOWN,
    label_rows,
    label_table,
    label_table_note,
)
from mixmo_fastai.metrics.table import LISTED_METRICS, MAIN_METRICS, MetricSpec, percent

_ENSEMBLE = " (ensemble, mean of the logits)"
_CALIBRATIONS = (
    ("calibrated", "Calibrated", "fitted on the validation split"),
    ("cross_fitted", "Cross-fitted", "each fitted on the other half of these images, as published"),
)


def metric_lines(
    metrics: Mapping[str, Any], recipe: Recipe, *, is_brief: bool = False
) -> list[str]:
    """Format the metrics of a run, without those of `--ood` and `--corruptions`.

    Args:
        metrics: of a finished run.
        recipe: recipe of the run.
        is_brief: leave out what only `mixmo eval` needs to show.
    """
    split, test = final_metrics(metrics)
    voters = "Networks" if recipe.model.num_nets > 1 else "Members"
    num_members = len(test["member_accuracy"])  # the networks of a deep ensemble
    rows = label_rows(metrics, SPLIT_NAMES[split], voters) if LABELS in metrics else []
    label = "Label accuracy" if rows else f"{SPLIT_NAMES[split]} accuracy"
    has_voters = num_members > 1 and not rows
    rows.append((label, percent(test["accuracy"]) + _ENSEMBLE * (num_members > 1)))
    if has_voters:
        rows.append((voters, ", ".join(map(percent, test["member_accuracy"]))))
    if "selected_epoch" in metrics:
        epochs = metrics["selected_epoch"]
        shown = ", ".join(map(str, epochs)) if isinstance(epochs, list) else epochs
        images = (
            "the validation split"
            if split == "test"
            else "these same images, so their metrics are too optimistic"
        )
        rows.append(("Kept weights", f"epoch {shown}, best on {images}"))
    rows += expected_rows(recipe)
    if is_brief:
        rows += _brief_rows(metrics, num_members)
    else:
        rows += [*_metric_rows(metrics, num_members), *calibration_rows(metrics)]
    return [*align(rows, METRIC_WIDTH), *_label_lines(metrics)]


def ensemble_lines(names: list[str], metrics: Mapping[str, Any]) -> list[str]:
    """Format the metrics of several runs evaluated as one ensemble."""
    split, test = final_metrics(metrics)
    label = f"{SPLIT_NAMES[split]} accuracy"
    rows = [(label, f"{percent(test['accuracy'])} (mean of the runs' logits)")]
    members = test["member_accuracy"]
    if LABELS in metrics:
        rows = label_rows(metrics, SPLIT_NAMES[split], "Networks")
        members = metrics[LABELS].get("member_mean_ap", ())
        rows = [row for row in rows if row[0] != "Networks"]
    rows += list(zip(names, map(percent, members), strict=False))
    return [*align([*rows, *_metric_rows(metrics, len(names))]), *_label_lines(metrics)]


def _brief_rows(metrics: Mapping[str, Any], num_members: int) -> list[tuple[str, str]]:
    """Format the main metrics, and one line on calibration."""
    listed = [metric for metric in LISTED_METRICS if not metric.is_detail]
    rows = _value_rows(metrics, num_members, listed) + _interval_rows(metrics)
    calibration = metrics.get("calibration")
    if calibration and calibration.get("temperature") is None:
        return rows + calibration_rows(metrics)[:1]
    name, label, origin = _CALIBRATIONS[0 if calibration else 1]
    if name in metrics:
        rows += _calibrated_rows(metrics[name], label, origin)
    return rows


def _metric_rows(metrics: Mapping[str, Any], num_members: int) -> list[tuple[str, str]]:
    split, _ = final_metrics(metrics)
    rows = _value_rows(metrics, num_members, LISTED_METRICS) + _interval_rows(metrics)
    absent = metrics.get("absent", {})
    if averaged := metrics.get(f"{split}_mean_probabilities"):
        text = _main_values(averaged)
        rows.append(("Mean probabilities", f"{text} (instead of the mean of the logits)"))
    for name, label, origin in _CALIBRATIONS:
        if name in absent:
            rows.append((label, f"undefined: {absent[name]}"))
        elif name in metrics:
            rows += _calibrated_rows(metrics[name], label, origin)
    return rows


def _value_rows(
    metrics: Mapping[str, Any], num_members: int, listed: Sequence[MetricSpec]
) -> list[tuple[str, str]]:
    """Format metrics with one value each, or why they are undefined."""
    _, test = final_metrics(metrics)
    rows = []
    for metric in listed:
        if metric.name == "accuracy":  # the caller adds this row
            continue
        is_hidden = metric.min_classes > 2 or (metric.compares_members and num_members == 1)
        if metric.name in test and not metric.is_redundant(test):
            rows.append((metric.title, metric.format.value(test[metric.name])))
        elif metric.name in test.get("absent", {}) and not is_hidden:
            rows.append((metric.title, f"undefined: {test['absent'][metric.name]}"))
    return rows


def _interval_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the 95 % confidence intervals of the main metrics."""
    if "intervals" not in metrics:
        return []
    parts = [
        f"{metric.label} {metric.format.value(low)} to {metric.format.value(high)}"
        for metric in MAIN_METRICS
        if metric.name in metrics["intervals"]
        for low, high in [metrics["intervals"][metric.name]]
    ]
    return [("95 % CI", f"{', '.join(parts)} (bootstrap)")]


def _label_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Format the table of labels, if there are several per image."""
    if LABELS not in metrics:
        return []
    values = metrics[LABELS]
    note = label_table_note(values)
    table = columns(label_table(values)[: NUM_SHOWN + 1], left=(0,))
    return ["", *table, *([note] if note else []), ""]


def _calibrated_rows(values: Mapping[str, Any], label: str, origin: str) -> list[tuple[str, str]]:
    """Format metrics after calibration, with a warning if the temperature is uncertain."""
    warning = temperature_warning(values)
    return [(label, _calibrated_text(values, origin)), *([("", warning)] if warning else [])]


def _calibrated_text(values: Mapping[str, Any], origin: str) -> str:
    temperatures = values.get("temperatures", [values.get("temperature")])
    shown = " and ".join(f"{t:.3f}" for t in temperatures)
    plural = "s" * (len(temperatures) > 1)
    return f"{_main_values(values)} at temperature{plural} {shown}, {origin}"


def _main_values(values: Mapping[str, Any]) -> str:
    """Format those of the main metrics that are among the values, in one line."""
    present = [metric for metric in MAIN_METRICS if metric.name in values]
    return ", ".join(f"{each.label} {each.format.value(values[each.name])}" for each in present)
