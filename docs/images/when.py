"""Plot the measured results of small data: `python docs/images/when.py [FILE]`, default when.png.

The figures are those of studies/small-cifar10, see docs/results.md.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixmo_fastai.plots.png import COLORS

RUNS = Path(__file__).resolve().parents[2] / "studies" / "small-cifar10" / "runs"
LENGTH = "1500000"
METHODS = {
    "vanilla": "Vanilla",
    "cutmix": "CutMix",
    "mixup": "mixup",
    "ensemble-cutmix": "two networks\nwith CutMix",
    "cut-mixmo": "Cut-MixMo",
    "cut-mixmo-mixup": "Cut-MixMo\n+ mixup",
}
"""Label of each method, by the first part of the names of its runs."""


def read_runs(method: str) -> list[dict[str, Any]]:
    """Return the recorded metrics of a method's runs, one for each seed."""
    files = sorted(RUNS.glob(f"{method}-{LENGTH}-seed*/metrics.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def accuracies(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the test accuracy of each run in percent."""
    return [100 * run["test"]["accuracy"] for run in runs]


def nlls(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the test NLL of each run in nats."""
    return [run["test"]["nll"] for run in runs]


def calibrated_nlls(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the cross-fitted NLL of each run in nats."""
    return [run["cross_fitted"]["nll"] for run in runs]


def plot_panel(axes: Axes, values: Mapping[str, Sequence[float]], title: str, text: str) -> None:
    """Plot a row for each method: its seeds, their mean, and the mean as text."""
    for row, (method, found) in enumerate(reversed(values.items())):
        is_mixmo = method.startswith("cut-mixmo")
        color = COLORS[1] if is_mixmo else "0.45"
        mean = statistics.fmean(found)
        axes.scatter(found, [row] * len(found), s=18, color=color, alpha=0.45, linewidths=0)
        axes.scatter([mean], [row], s=70, marker="|", color=color, linewidths=2.5)
        axes.annotate(
            text.format(mean),
            (mean, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            color=color,
            fontweight="bold" if is_mixmo else "normal",
        )
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_ylim(-0.5, len(values) - 0.3)
    axes.margins(x=0.12)
    axes.set_yticks(range(len(values)), [METHODS[name] for name in reversed(values)])
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main(path: Path) -> None:
    """Plot the three panels."""
    runs = {method: read_runs(method) for method in METHODS}
    figure = Figure(figsize=(9.6, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (accuracies, "test accuracy in %\n(more is better)", "{:.1f}"),
        (nlls, "NLL in nats\n(less is better)", "{:.2f}"),
        (calibrated_nlls, "NLL in nats, calibrated\n(less is better)", "{:.2f}"),
    )
    for axes, (values_of, title, text) in zip(
        figure.subplots(1, 3, sharey=True), panels, strict=True
    ):
        values = {method: values_of(found) for method, found in runs.items()}
        plot_panel(axes, values, title, text)
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("when.png"))
