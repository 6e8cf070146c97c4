"""Plots of a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mixmo_fastai.plots.png import marker_style, size_ticks

METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL in nats",
    "nll_calibrated": "NLL in nats, calibrated",
}
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
                **marker_style(number),
                linestyle="-" if axis == "images_trained" else "none",
                capsize=3,
                label=method,
            )
        axes.set_xscale("log")
        ticks = size_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=AXES[axis], ylabel=f"test {label}")
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g} %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def _short(value: float) -> str:
    """Format a large number: 1500000 is "1.5M"."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"
