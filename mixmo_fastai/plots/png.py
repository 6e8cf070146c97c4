"""Plots as PNG files, without a display and without pyplot's global state."""

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

from mixmo_fastai.errors import check_count
from mixmo_fastai.evaluation.compare import ComparedRun
from mixmo_fastai.evaluation.results import SPLIT_NAMES
from mixmo_fastai.learner.preview import Preview, preview_batch
from mixmo_fastai.runtime.text import truncate
from mixmo_fastai.training.lr_find import LrSearch

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable by colour-blind readers
MANY_COLORS = (*COLORS, "#e69f00", "#56b4e9", "#000000", "#8c510a")
MARKERS = ("o", "s", "^", "D")
MAX_NAME_LENGTH = 22
"""Largest number of characters of a class name above an image."""
MAX_TICKS = 7
"""Largest number of ticks of a logarithmic axis."""
_plain_text = rc_context({"text.parse_math": False})  # a class may be called $5$


@_plain_text
def plot_lr_search(search: LrSearch, path: Path, title: str) -> None:
    """Plot the loss over the learning rate, with the suggested rates and the recommended one."""
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
    if search.recommended is not None:
        label = f"recommended: {search.recommended:.2g}"
        axes.axvline(search.recommended, color="#333333", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss per member, smoothed")
    flat_title = f"{title}\ntoo flat to recommend a learning rate"
    axes.set_title(flat_title if search.is_flat else title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


MARKER_SIZE = 8.0
"""Size of markers in points."""


def _mark_suggestions(axes: Axes, search: LrSearch) -> None:
    """Mark the suggested rates on the curve.

    Markers that would overlap are stacked, with a thin line to the curve.
    """
    figure, spacing = axes.figure, 1.5 * MARKER_SIZE
    marker_positions: list[tuple[float, float]] = []  # in points
    low, high = axes.get_ylim()
    marks = zip(search.suggestions.items(), COLORS, MARKERS, strict=True)
    for (name, rate), color, marker in marks:
        nearest = min(range(len(search.lrs)), key=lambda i: abs(search.lrs[i] - rate))
        loss = search.losses[nearest]
        x, y = axes.transData.transform((rate, loss)) * 72 / figure.dpi
        step = spacing if loss < (low + high) / 2 else -spacing  # away from the nearer edge
        offset = 0.0
        while any(
            abs(x - u) < spacing and abs(y + offset - v) < spacing for u, v in marker_positions
        ):
            offset += step
        marker_positions.append((x, y + offset))
        shifted = offset_copy(axes.transData, figure, 0, offset, "points")
        label = f"{name}: {rate:.2g}"
        if offset:
            axes.annotate(
                "",
                (rate, loss),
                (0, offset),
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
            transform=shifted,
        )


@_plain_text
def plot_preview(preview: Preview, file: Path | BinaryIO, title: str) -> None:
    """Plot one row per sample: each member's image and mask, then the mixture."""
    figure = Figure(figsize=_preview_size(preview), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    _draw_preview(preview, figure, title)
    figure.savefig(file, format="png")


@_plain_text
def show_pairs(learn: Learner, max_n: int = 4, title: str = "") -> None:
    """Plot the first training batch, as fastai's `show_batch` does for plain batches.

    One row per sample: the image of each member and its mask, then the mixture, shown in pixel
    space although the network mixes features. Pairs are mixed by masks, and different, also if
    `mix_prob` and `early_repetition` would change that in the first batch.

    Args:
        learn: a Learner with a `MixMoCallback`; it is not changed.
        max_n: number of samples to show.
        title: title of the plot.

    Raises:
        InputError: the Learner has no `MixMoCallback`, or cannot be trained.
    """
    import matplotlib.pyplot as plt  # notebooks display pyplot figures

    check_count("max_n", max_n)
    preview = preview_batch(learn, max_n)
    figure = plt.figure(figsize=_preview_size(preview), layout="constrained")
    _draw_preview(preview, figure, title)


def _preview_size(preview: Preview) -> tuple[float, float]:
    """Return the width and height of the plot of a preview, in inches."""
    num_rows, num_members = preview.inputs.shape[:2]
    return 1.7 * (2 * num_members + 1), 1.75 * num_rows + 0.9


def _draw_preview(preview: Preview, figure: Figure, title: str) -> None:
    num_rows, num_members = preview.inputs.shape[:2]
    num_columns = 2 * num_members + 1
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for row in range(num_rows):
        for member in range(num_members):
            _show_image(grid[row][2 * member], preview.inputs[row, member])
            name = truncate(preview.labels[row][member], MAX_NAME_LENGTH)
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
        axes.spines[:].set_color("#999999")  # makes the border of a white mask visible
    if title:
        figure.suptitle(title, fontsize=10)


@_plain_text
def plot_comparison(names: list[str], compared: Sequence[ComparedRun], path: Path) -> None:
    """Plot accuracy and NLL of runs, with 95 % intervals, against their number of parameters.

    Runs of nearly the same size are drawn side by side, so that no marker hides another. A thin
    line connects each of them with its true position on the axis, and the axis label says so.
    """
    sizes = [each.parameters for each in compared]
    low, high = size_limits(sizes)
    positions = _marker_positions(sizes, (low, high))
    legend_height = 0.22 * len(names) + 0.1
    figure = Figure(figsize=(11, 4.6 + legend_height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    split = SPLIT_NAMES[compared[0].split].lower()
    panels = (("accuracy", f"{split} accuracy"), ("nll", f"{split} NLL in nats"))
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        runs = zip(compared, positions, strict=True)
        lowest = []
        for number, (each, position) in enumerate(runs):
            value, ends = each.metrics[metric], each.intervals[metric]
            lowest.append(min(ends[0], value))
            axes.errorbar(
                position,
                value,
                [[value - lowest[-1]], [max(ends[1], value) - value]],
                **marker_style(number),
                linestyle="none",
                markersize=MARKER_SIZE,
                capsize=4,
            )
        ticks = size_ticks(low, high)
        axes.set_xticks(ticks, [format_size(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        _draw_leader_lines(axes, sizes, positions, lowest)
        remark = SHIFTED_REMARK * (positions != sizes)
        axes.set(xlabel=f"parameters (log scale){remark}", ylabel=label)
        axes.grid(alpha=0.3)
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g} %")
    # Not by `label` of each marker: matplotlib omits those that begin with "_".
    labels = [name + _legend_text(each) for name, each in zip(names, compared, strict=True)]
    figure.legend(axes.containers, labels, loc="outside lower left", fontsize=8, frameon=False)
    figure.savefig(path)


MIN_SPAN = 2.0
"""Smallest ratio of the limits of the size axis, so that nearly equal sizes look nearly equal."""
MIN_MARKER_DISTANCE = 12.0
"""Smallest distance between markers, in points."""
PANEL_WIDTH = 330.0
"""Approximate width of a panel of the comparison, in points."""
SHIFTED_REMARK = "\nmarkers shifted; thin lines lead to the true numbers"
"""Remark in the axis label if markers are not at their sizes."""
LEADER_HEIGHT = 0.07
"""Fraction of a panel's height in which leader lines run to the true sizes."""


def marker_style(number: int) -> dict[str, str]:
    """Return marker and colour of a run or method; the first eight differ in colour."""
    return {
        "marker": MARKERS[(number + number // len(MANY_COLORS)) % len(MARKERS)],
        "color": MANY_COLORS[number % len(MANY_COLORS)],
    }


def size_limits(sizes: Sequence[int]) -> tuple[float, float]:
    """Return the limits of a logarithmic axis of sizes."""
    low, high = min(sizes), max(sizes)
    middle, span = math.sqrt(low * high), max(1.5 * (high / low) ** 1.25, MIN_SPAN)
    return middle / math.sqrt(span), middle * math.sqrt(span)


_LEADING_DIGITS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    tuple(i / 10 for i in range(10, 100, 5)),
)


def size_ticks(low: float, high: float) -> list[float]:
    """Return two to `MAX_TICKS` round sizes within the limits of a logarithmic axis.

    In a narrow range without round sizes these are its limits, rounded to three digits.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in _LEADING_DIGITS:
        ticks = [digit * 10.0**power for power in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:  # a narrow range
        return sorted({float(f"{end:.3g}") for end in (low, high)})
    distance = math.log(high / low) / MAX_TICKS
    kept: list[float] = []
    for tick in sorted(ticks, key=_num_digits):  # the roundest first, if they are too close
        if all(abs(math.log(tick / other)) >= distance for other in kept):
            kept.append(tick)
    return sorted(kept)


def _num_digits(number: float) -> int:
    """Return the number of significant digits, of at most three: 1 for 1,000, 2 for 1,500."""
    return len(f"{number:.2e}".partition("e")[0].replace(".", "").rstrip("0"))


def format_size(size: float) -> str:
    """Format a large number: 1500000 is "1.5 M"."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.3g}"


def _marker_positions(sizes: Sequence[int], limits: tuple[float, float]) -> list[float]:
    """Return the position of each run on the axis: its size, or close to it to avoid overlaps.

    Positions keep the order of the sizes and at least `MIN_MARKER_DISTANCE`, and minimise the sum
    of squared distances from the sizes (isotonic regression).
    """
    scale = PANEL_WIDTH / math.log(limits[1] / limits[0])
    distance = min(MIN_MARKER_DISTANCE, 0.9 * PANEL_WIDTH / len(sizes))
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    groups: list[list[float]] = []  # neighbours at the minimum distance are pooled in a group
    for number, run in enumerate(order):
        groups.append([math.log(sizes[run]) * scale - number * distance])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = [fmean(group) for group in groups for _ in group]
    is_single = [len(group) == 1 for group in groups for _ in group]
    positions = [float(size) for size in sizes]
    for number, run in enumerate(order):
        if not is_single[number]:
            positions[run] = math.exp((starts[number] + number * distance) / scale)
    return positions


def _draw_leader_lines(
    axes: Axes, sizes: Sequence[int], positions: Sequence[float], lowest: Sequence[float]
) -> None:
    """Draw a thin line from each shifted marker to its true size on the axis.

    Args:
        axes: a panel in which all markers are drawn.
        sizes: true size of each run.
        positions: position of the marker of each run.
        lowest: lower end of the interval of each run.
    """
    low, high = axes.get_ylim()
    bottom = low - LEADER_HEIGHT * (high - low)
    for number, (size, position, end) in enumerate(zip(sizes, positions, lowest, strict=True)):
        if position != size:
            color = marker_style(number)["color"]
            axes.plot([size, position, position], [bottom, low, end], color=color, linewidth=0.7)
    axes.set_ylim(bottom, high)


def _legend_text(compared: ComparedRun) -> str:
    seen = "" if compared.images_seen is None else f", {compared.images_seen:,} images seen"
    return f": {compared.parameters:,} parameters{seen}"


def _show_image(axes: Axes, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0)  # (H, W, C)
    shown = pixels[:, :, 0] if pixels.shape[2] < 3 else pixels[:, :, :3]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1)  # the same range in all panels
