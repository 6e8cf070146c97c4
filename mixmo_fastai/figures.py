"""Pictures as PNG files, drawn without a display and without pyplot's global state."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

from fastai.learner import Learner
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from matplotlib.transforms import offset_copy
from torch import Tensor

from mixmo_fastai.comparison import Compared
from mixmo_fastai.errors import InputError
from mixmo_fastai.lr_search import LrSearch
from mixmo_fastai.preview import Preview, preview_batch
from mixmo_fastai.wording import PART_NAMES, shortened

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers
MARKERS = ("o", "s", "^", "D")
LONGEST_NAME = 22
"""Number of characters of a class name above an image."""
_plain_text = rc_context({"text.parse_math": False})  # a class may be called $5$


@_plain_text
def plot_lr_search(search: LrSearch, path: Path, title: str) -> None:
    """Plot the loss over the learning rate, with the suggested rates and the advised one."""
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(search.lrs, search.losses, color="#333333", linewidth=1.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, start = min(search.losses), max(search.losses[: max(1, len(search.losses) // 4)])
    axes.set_ylim(low - 0.1 * (start - low), start + 0.4 * (start - low))
    _mark_suggestions(axes, search)
    if search.advised is not None:
        label = f"advised: {search.advised:.2g}"
        axes.axvline(search.advised, color="#333333", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss per member, smoothed")
    axes.set_title(f"{title}\ntoo flat to advise a learning rate" if search.is_flat else title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


MARKER_SIZE = 8.0
"""Size of markers in points."""


def _mark_suggestions(axes: Axes, search: LrSearch) -> None:
    """Mark the suggested rates on the curve, each at its rate.

    Markers that would hide each other are stacked, with a thin line to the curve.
    """
    figure, spacing = axes.figure, 1.5 * MARKER_SIZE
    taken: list[tuple[float, float]] = []  # places of markers in points
    low, high = axes.get_ylim()
    marks = zip(search.suggestions.items(), COLORS, MARKERS, strict=True)
    for (name, rate), color, marker in marks:
        nearest = min(range(len(search.lrs)), key=lambda i: abs(search.lrs[i] - rate))
        loss = search.losses[nearest]
        x, y = axes.transData.transform((rate, loss)) * 72 / figure.dpi
        step = spacing if loss < (low + high) / 2 else -spacing  # away from the nearer edge
        raised = 0.0
        while any(abs(x - u) < spacing and abs(y + raised - v) < spacing for u, v in taken):
            raised += step
        taken.append((x, y + raised))
        above = offset_copy(axes.transData, figure, 0, raised, "points")
        label = f"{name}: {rate:.2g}"
        if raised:
            axes.annotate(
                "",
                (rate, loss),
                (0, raised),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7},
            )
        axes.plot(
            rate,
            loss,
            marker,
            color=color,
            markersize=MARKER_SIZE,
            linestyle="",
            label=label,
            transform=above,
        )


@_plain_text
def plot_preview(preview: Preview, file: Path | BinaryIO, title: str) -> None:
    """Plot a row per position: each member's image and mask, then the mixture."""
    figure = Figure(figsize=_size_of(preview), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    _draw_preview(preview, figure, title)
    figure.savefig(file, format="png")


@_plain_text
def show_pairs(learn: Learner, max_n: int = 4, title: str = "") -> None:
    """Show what training sees, as fastai's `show_batch` does for plain batches.

    A row per position of the first batch: the image of each member and its mask, then the mixture,
    drawn in pixels where the network mixes features.

    Args:
        learn: with a `MixMoCallback`; it is left as it was.
        max_n: positions to show.
        title: over the figure.

    Raises:
        InputError: the Learner has no `MixMoCallback`, or what a fit would refuse.
    """
    import matplotlib.pyplot as plt  # notebooks show what it draws

    if max_n < 1:
        raise InputError(f"max_n must be 1 or more; got {max_n}.")
    preview = preview_batch(learn, max_n)
    figure = plt.figure(figsize=_size_of(preview), layout="constrained")
    _draw_preview(preview, figure, title)


def _size_of(preview: Preview) -> tuple[float, float]:
    """Return the width and height of a preview in inches."""
    num_rows, num_members = preview.inputs.shape[:2]
    return 1.7 * (2 * num_members + 1), 1.75 * num_rows + 0.9


def _draw_preview(preview: Preview, figure: Figure, title: str) -> None:
    num_rows, num_members = preview.inputs.shape[:2]
    num_columns = 2 * num_members + 1
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for row in range(num_rows):
        for member in range(num_members):
            _show_image(grid[row][2 * member], preview.inputs[row, member])
            name = shortened(preview.labels[row][member], LONGEST_NAME)
            grid[row][2 * member].set_title(name, fontsize=8)
            mask = grid[row][2 * member + 1]
            mask.imshow(preview.masks[row, member], cmap="gray", vmin=0, vmax=1)
            mask.set_title(f"{100 * preview.masks[row, member].mean():.0f} %", fontsize=8)
        _show_image(grid[row][-1], preview.mixed[row])
    mask_name = "its channels" if preview.by_channels else "its mask"
    headings = [name for m in range(num_members) for name in (f"member {m + 1}", mask_name)]
    for axes, heading in zip(grid[0], [*headings, "mixture"], strict=True):
        axes.set_title(f"{heading}\n{axes.get_title()}", fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#999999")  # or a white mask would have no border
    if title:
        figure.suptitle(title, fontsize=10)


@_plain_text
def plot_comparison(names: list[str], compared: Sequence[Compared], path: Path) -> None:
    """Plot accuracy and NLL of runs, with 95 % intervals, against their parameters.

    Runs of nearly one size are drawn side by side, so that no marker hides another. A thin line
    leads from each of these to its true place on the axis, and the label of the axis says so.
    """
    sizes = [part.parameters for part in compared]
    low, high = _size_limits(sizes)
    places = _places(sizes, (low, high))
    legend_height = 0.22 * len(names) + 0.1
    figure = Figure(figsize=(11, 4.6 + legend_height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    part = PART_NAMES[compared[0].part].lower()
    panels = (("accuracy", f"{part} accuracy"), ("nll", f"{part} NLL in nats"))
    for axes, (figure_name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        runs = zip(names, compared, places, strict=True)
        lowest = []
        for place, (name, part, drawn_at) in enumerate(runs):
            value, ends = part.figures[figure_name], part.intervals[figure_name]
            lowest.append(min(ends[0], value))
            axes.errorbar(
                drawn_at,
                value,
                [[value - lowest[-1]], [max(ends[1], value) - value]],
                fmt=MARKERS[(place + place // len(COLORS)) % len(MARKERS)],
                color=COLORS[place % len(COLORS)],
                markersize=MARKER_SIZE,
                capsize=4,
                label=name + _described(part),
            )
        ticks = _size_ticks(low, high)
        axes.set_xticks(ticks, [_round_size(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        _lead_to_sizes(axes, sizes, places, lowest)
        axes.set(xlabel=f"parameters (log scale){SET_APART * (places != sizes)}", ylabel=label)
        axes.grid(alpha=0.3)
        if figure_name == "accuracy":
            axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g} %")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False)
    figure.savefig(path)


LEAST_SPAN = 2.0
"""Least ratio of the ends of an axis of sizes: 1.002 times the parameters are nearly the same."""
SIDE_BY_SIDE = 12.0
"""Least distance in points between markers with intervals."""
PANEL_WIDTH = 330.0
"""Width of a panel of the comparison in points, roughly."""
SET_APART = "\nmarkers set apart; thin lines lead to the true numbers"
"""Remark in the label of an axis on which markers are not at their sizes."""
FOOT = 0.07
"""Fraction of a panel's height within which thin lines run to the true sizes."""


def _size_limits(sizes: Sequence[int]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis around sizes."""
    low, high = min(sizes), max(sizes)
    middle, span = math.sqrt(low * high), max(1.5 * (high / low) ** 1.25, LEAST_SPAN)
    return middle / math.sqrt(span), middle * math.sqrt(span)


_LEADING: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    tuple(i / 10 for i in range(10, 100, 5)),
)


def _size_ticks(low: float, high: float) -> list[float]:
    """Return three to seven round sizes within the ends of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for leading in _LEADING:
        ticks = [lead * 10.0**power for power in decades for lead in leading]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 7)]


def _round_size(size: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= unit:
            return f"{size / unit:g}{name}"
    return f"{size:g}"


def _places(sizes: Sequence[int], limits: tuple[float, float]) -> list[float]:
    """Return the place of each run on the axis: its size, or close to it if others are there.

    Places keep the order of the sizes and `SIDE_BY_SIDE`, and the sum of their squared distances
    from the sizes is as small as possible.
    """
    scale = PANEL_WIDTH / math.log(limits[1] / limits[0])
    distance = min(SIDE_BY_SIDE, 0.9 * PANEL_WIDTH / len(sizes))
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    groups: list[list[float]] = []  # of neighbours at the least distance, as in isotonic regression
    for number, run in enumerate(order):
        groups.append([math.log(sizes[run]) * scale - number * distance])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = [fmean(group) for group in groups for _ in group]
    alone = [len(group) == 1 for group in groups for _ in group]
    places = [float(size) for size in sizes]
    for number, run in enumerate(order):
        if not alone[number]:
            places[run] = math.exp((starts[number] + number * distance) / scale)
    return places


def _lead_to_sizes(
    axes: Axes, sizes: Sequence[int], places: Sequence[float], lowest: Sequence[float]
) -> None:
    """Draw a thin line from each marker that is not at its size to that size on the axis.

    Args:
        axes: a panel in which all markers are drawn.
        sizes: true place of each run.
        places: where its marker is drawn.
        lowest: lower end of its interval.
    """
    low, high = axes.get_ylim()
    bottom = low - FOOT * (high - low)
    for number, (size, place, end) in enumerate(zip(sizes, places, lowest, strict=True)):
        if place != size:
            color = COLORS[number % len(COLORS)]
            axes.plot([size, place, place], [bottom, low, end], color=color, linewidth=0.7)
    axes.set_ylim(bottom, high)


def _described(part: Compared) -> str:
    seen = "" if part.images_seen is None else f", {part.images_seen:,} images seen"
    return f": {part.parameters:,} parameters{seen}"


def _show_image(axes: Axes, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0)  # (H, W, C)
    shown = pixels[:, :, 0] if pixels.shape[2] < 3 else pixels[:, :, :3]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1)  # alike in all panels
