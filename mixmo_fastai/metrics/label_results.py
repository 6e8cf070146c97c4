"""Metrics of runs with several labels per image, as rows of text."""

from collections.abc import Mapping
from typing import Any

from mixmo_fastai.metrics.table import decimal, percent

LABELS = "multi_label"
"""Key of these metrics in those of a run; see `multi_label`. Absent with one label per image."""
MIN_RELIABLE = 100
"""Number of images from which on thresholds are not called unreliable."""
NUM_SHOWN = 20
"""Largest number of labels in the table; metrics.json and the report have all."""
LABEL_COLUMNS = (
    ("positives", "images", "{:,}".format),
    ("average_precision", "AP", percent),
    ("threshold", "threshold", "{:.3f}".format),
    ("precision", "precision", percent),
    ("recall", "recall", percent),
    ("f1", "F1", decimal),
)
"""Columns of the table of labels: key, heading and format."""


def label_rows(metrics: Mapping[str, Any], split_name: str, voters: str) -> list[tuple[str, str]]:
    """Format the metrics of all labels.

    Args:
        metrics: of a run with several labels per image.
        split_name: "Test" or "Validation".
        voters: "Members" or "Networks".
    """
    values = metrics[LABELS]
    label = f"{split_name} mAP"
    if "mean_ap" not in values:
        return [(label, f"undefined: {values['absent']}")]
    members = values["member_mean_ap"]
    text = percent(values["mean_ap"]) + " (ensemble, mean of the logits)" * (len(members) > 1)
    rows = [(label, text)]
    if len(members) > 1:
        rows.append((voters, ", ".join(map(percent, members))))
    if ends := values.get("mean_ap_interval"):
        rows.append(("95 % CI of mAP", " to ".join(map(percent, ends)) + " (bootstrap)"))
    return [
        *rows,
        ("F1", f"micro {values['f1_micro']:.4f}, macro {values['f1_macro']:.4f} {origin(values)}"),
        ("Exact match", f"{percent(values['exact_match'])} of images"),
    ]


def origin(values: Mapping[str, Any]) -> str:
    """Describe the thresholds."""
    if values["thresholds_from"] == "validation":
        count = values["num_threshold_images"]
        few = ", too few for reliable ones" if count < MIN_RELIABLE else ""
        return f"at the thresholds with the best F1 on {count:,} validation images{few}"
    return "at a threshold of 0.5"


def in_use(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return thresholds and temperature of predictions, which may not be those of the metrics."""
    found: Mapping[str, Any] = values.get("deployed", values)
    return found


def origin_in_use(values: Mapping[str, Any]) -> str:
    """Describe the thresholds of predictions; see `in_use`."""
    if in_use(values) is values:
        return origin(values)
    return (
        "at the thresholds with the best F1 on the evaluated images themselves; the metrics are "
        f"those {origin(values)}"
    )


def label_table(values: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Build the table of labels, the most frequent first: the heading and a row per label."""
    rows = sorted(values["per_class"], key=lambda row: -int(row["positives"]))
    table = [("label", *(heading for _, heading, _ in LABEL_COLUMNS))]
    for row in rows:
        cells = ("-" if row[key] is None else show(row[key]) for key, _, show in LABEL_COLUMNS)
        table.append((row["name"], *cells))
    return table


def label_table_note(values: Mapping[str, Any]) -> str:
    """Say how many labels the printed table leaves out."""
    num_more = len(values["per_class"]) - NUM_SHOWN
    return f"and {num_more:,} more labels, in metrics.json and the report" if num_more > 0 else ""
