"""Format the metrics of `--ood` and `--corruptions` as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixmo_fastai.cli.render import columns
from mixmo_fastai.evaluation.results import SPLIT_NAMES, final_metrics
from mixmo_fastai.metrics.table import METRICS, percent


def shift_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Format what was requested: a table for all `--ood`, and one for `--corruptions`."""
    lines = []
    if ood := metrics.get("ood"):
        lines += [*_ood_lines([ood] if isinstance(ood, Mapping) else ood), ""]
    if corruptions := metrics.get("corruptions"):
        split = SPLIT_NAMES[final_metrics(metrics)[0]].lower()
        lines += [*_corruption_lines(corruptions, split), ""]
    return lines


def _ood_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format one row per data set and score, below the name of the data set."""
    table = [("Out-of-distribution images", "AUROC", "95 % interval", "AUPR", "FPR at 95 %")]
    titles: dict[int, str] = {}  # outside of the columns, so that long paths do not widen them
    undefined: dict[str, str] = {}  # the reason is the number of members: equal for all data sets
    for entry in entries:
        count = entry["num_images"]
        undefined |= entry.get("absent", {})
        titles[len(table)] = f"{count:,} image{'s' * (count != 1)} of {entry['dataset']}"
        table.append(("", "", "", "", ""))
        for name, values in entry.items():
            if isinstance(values, Mapping) and name != "absent":
                auroc, aupr, fpr95 = (percent(values[key]) for key in ("auroc", "aupr", "fpr95"))
                interval = " to ".join(map(percent, values["auroc_interval"]))
                table.append((f"  {_label(name)}", auroc, interval, aupr, fpr95))
    lines = [titles.get(index, line) for index, line in enumerate(columns(table, left=(0,)))]
    lines += [f"{_label(name)}: undefined: {reason}" for name, reason in undefined.items()]
    if len({entry["num_images"] for entry in entries}) > 1:
        lines.append("AUPR depends on the number of images; compare it within one data set only.")
    return lines


def _label(score: str) -> str:
    return _LABELS.get(score, score.replace("_", " "))


_LABELS = {"confidence": "1 - confidence", "max_logit": "maximum logit"}


def _corruption_lines(corruptions: Mapping[str, Any], split: str) -> list[str]:
    """Format the metrics under corruption: the means over the types, then each type."""
    types = corruptions["types"]
    computed = [metric for metric in METRICS if metric.corrupted_name]
    lines = [
        f"Corrupted {split} images ({corruptions['source']}), mean of {len(types)} types of 5 "
        "severities",
        ", ".join(
            f"{metric.corrupted_name} {metric.format.value(corruptions[metric.corrupted_name])}"
            for metric in computed
        ),
        "",
    ]
    labels = (metric.label for metric in computed)
    table = [("", *labels, "accuracy in %, severity 1 to 5")]
    for kind, values in types.items():
        by_severity = "  ".join(f"{100 * value:5.2f}" for value in values["severities"]["accuracy"])
        texts = (metric.format.value(values[metric.name]) for metric in computed)
        table.append((kind, *texts, by_severity))
    return [*lines, *columns(table, left=(0, 1 + len(computed)))]
