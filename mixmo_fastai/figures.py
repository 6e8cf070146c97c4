"""Figures as PNG files. Drawn without a display and without pyplot's global state."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixmo_fastai.lr_search import LrSearch

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers


def plot_lr_search(search: LrSearch, path: Path, title: str) -> None:
    """Draw the loss over the learning rate, with the suggested rates marked."""
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(search.lrs, search.losses, color="#333333", linewidth=1.5)
    marks = zip(search.suggestions.items(), COLORS, ("o", "s", "^", "D"), strict=True)
    for (name, rate), color, marker in marks:
        nearest = min(range(len(search.lrs)), key=lambda i: abs(search.lrs[i] - rate))
        axes.plot(
            rate,
            search.losses[nearest],
            marker,
            color=color,
            markersize=8,
            label=f"{name}: {rate:.2g}",
        )
    axes.set_xscale("log")
    low = min(search.losses)
    axes.set_ylim(low - 0.05 * (search.losses[0] - low), search.losses[0] * 1.5)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss per member, smoothed")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
