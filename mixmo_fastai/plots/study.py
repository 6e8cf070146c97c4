"""Plots of a study."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mixmo_fastai.plots.png import COLORS, MARKERS

METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL in nats",
    "nll_calibrated": "NLL in nats, calibrated",
}
MAX_TICKS = 8
AXES = {
    "images_trained": "images seen by all networks (log scale)",
    "parameters": "parameters of all networks (log scale)",
}


def plot_study(cells: Sequence[Any], path: Path, axis: str = "images_trained") -> None:
    """Plot the means over seeds with their standard deviations, a line for each method.

    Args:
        cells: from `study.results.collect_results`.
        path: PNG to write.
        axis: "images_trained" or "parameters".
    """
    metrics = {
        name: label for name, label in METRICS.items() if all(name in c.metrics for c in cells)
    }
    figure = Figure(figsize=(4.2 * len(metrics) + 1, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (name, label) in zip(panels, metrics.items(), strict=True):
        for number, method in enumerate(methods):
            points = [cell for cell in cells if cell.method == method]
            axes.errorbar(
                [getattr(cell, axis) for cell in points],
                [cell.mean(name) for cell in points],
                [cell.spread(name) or 0.0 for cell in points],
                marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
                color=COLORS[number % len(COLORS)],
                linestyle="-" if axis == "images_trained" else "none",
                capsize=3,
                label=method,
            )
        axes.set_xscale("log")
        ticks = _ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=AXES[axis], ylabel=f"test {label}")
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g} %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def _ticks(low: float, high: float) -> list[float]:
    """Choose round numbers on a logarithmic axis, at most eight."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        if len(inside := [tick for tick in ticks if low <= tick <= high]) <= MAX_TICKS:
            return inside
    return inside


def _short(value: float) -> str:
    """Format a large number: 1500000 is "1.5M"."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"
