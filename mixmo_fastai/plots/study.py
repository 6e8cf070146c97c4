"""Plots of a study."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mixmo_fastai.plots.png import format_size, marker_style, size_limits, size_ticks

METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL in nats",
    "nll_calibrated": "NLL in nats, calibrated",
}
AXES = {
    "images_trained": "images seen by all networks (log scale)",
    "parameters": "parameters of all networks (log scale)",
}
MIN_BIN_IMAGES = 50
"""Number of images from which on the accuracy in a bin of confidence is drawn."""


def plot_study(
    cells: Sequence[Any],
    file: Path | BinaryIO,
    axis: str = "images_trained",
    *,
    methods: Sequence[str] | None = None,
) -> None:
    """Plot the means over seeds with their standard deviations, a line for each method.

    Args:
        cells: from `study.results.collect_results`; for the parameters, of one training length.
        file: PNG to write.
        axis: "images_trained" or "parameters".
        methods: all methods of the study in their order, which gives each its colour and marker in
            all plots; by default those of the cells.
    """
    metrics = {
        name: label for name, label in METRICS.items() if all(name in c.metrics for c in cells)
    }
    figure = _new_figure(4.2 * len(metrics) + 1)
    numbers = _numbers(cells, methods)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (name, label) in zip(panels, metrics.items(), strict=True):
        for method, number in numbers.items():
            points = [cell for cell in cells if cell.method == method]
            if not points:
                continue
            axes.errorbar(
                [getattr(cell, axis) for cell in points],
                [cell.mean(name) for cell in points],
                [cell.spread(name) or math.nan for cell in points],
                **marker_style(number),
                linestyle="-" if axis == "images_trained" else "none",
                capsize=3,
                label=method,
            )
        axes.set_xscale("log")
        axes.set_xlim(*size_limits([getattr(cell, axis) for cell in cells]))
        ticks = size_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [format_size(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=AXES[axis], ylabel=f"{_split_name(cells)} {label}")
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(_percent)
    if axis == "parameters":
        figure.suptitle(f"{cells[0].images_seen:,} images seen", fontsize=10)
    _save(figure, panels[0], file)


def plot_calibration(
    cells: Sequence[Any], file: Path | BinaryIO, *, methods: Sequence[str] | None = None
) -> None:
    """Plot accuracy minus confidence in bins of confidence, over all seeds of each method.

    Args:
        cells: of one training length, from `study.results.collect_results`.
        file: PNG to write.
        methods: see `plot_study`.
    """
    numbers = _numbers(cells, methods)
    figure = _new_figure(7.5)
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for cell in cells:
        bins = [each for each in cell.reliability if each.images >= MIN_BIN_IMAGES]
        axes.plot(
            [each.confidence for each in bins],
            [each.accuracy - each.confidence for each in bins],
            **marker_style(numbers[cell.method]),
            markersize=4,
            label=cell.method,
        )
    axes.set(
        xlim=(0, 1),
        xlabel="confidence",
        ylabel=f"{_split_name(cells)} accuracy minus confidence, in points",
    )
    title = f"{cells[0].images_seen:,} images seen; methods below the line are overconfident"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g}")
    _save(figure, axes, file)


def _numbers(cells: Sequence[Any], methods: Sequence[str] | None) -> dict[str, int]:
    """Return the number of the colour and marker of each method."""
    names = dict.fromkeys(methods or (cell.method for cell in cells))
    return {name: number for number, name in enumerate(names)}


def _new_figure(width: float) -> Figure:
    figure = Figure(figsize=(width, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, axes: Axes, file: Path | BinaryIO) -> None:
    """Add a legend of the methods and write the PNG."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, format="png")


def _split_name(cells: Sequence[Any]) -> str:
    return "test" if cells[0].split == "test" else "validation"


def _percent(fraction: float, _: int) -> str:
    return f"{100 * fraction:.4g} %"
