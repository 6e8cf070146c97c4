"""Figures as PNG files. Drawn without a display and without pyplot's global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fastai.learner import Learner
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from mixmo_fastai.comparison import Compared
from mixmo_fastai.errors import InputError
from mixmo_fastai.filter_use import FilterUse
from mixmo_fastai.lr_search import LrSearch
from mixmo_fastai.preview import Preview, preview_batch
from mixmo_fastai.wording import PART_NAMES

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers
MARKERS = ("o", "s", "^", "D")
_plain_text = rc_context({"text.parse_math": False})  # a class may be called $5$


@_plain_text
def plot_lr_search(search: LrSearch, path: Path, title: str) -> None:
    """Draw the loss over the learning rate, with the suggested rates marked."""
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(search.lrs, search.losses, color="#333333", linewidth=1.5)
    marks = zip(search.suggestions.items(), COLORS, MARKERS, strict=True)
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
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, start = min(search.losses), max(search.losses[: max(1, len(search.losses) // 4)])
    axes.set_ylim(low - 0.1 * (start - low), start + 0.4 * (start - low))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss per member, smoothed")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


@_plain_text
def plot_preview(preview: Preview, file: Path | BinaryIO, title: str) -> None:
    """Draw a row per position: each member's image and mask, then the mixture."""
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
    """Give the width and height of a preview in inches."""
    num_rows, num_members = preview.inputs.shape[:2]
    return 1.7 * (2 * num_members + 1), 1.75 * num_rows + 0.9


def _draw_preview(preview: Preview, figure: Figure, title: str) -> None:
    num_rows, num_members = preview.inputs.shape[:2]
    num_columns = 2 * num_members + 1
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for row in range(num_rows):
        for member in range(num_members):
            _show_image(grid[row][2 * member], preview.inputs[row, member])
            grid[row][2 * member].set_title(preview.labels[row][member], fontsize=8)
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
def plot_filters(titles: list[str], uses: list[FilterUse], norms: list[Tensor], path: Path) -> None:
    """Draw, in a column per run, the active filters of each layer and the encoders' norms."""
    figure = Figure(figsize=(6.5 * len(uses), 7.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(uses), squeeze=False, sharey="row")
    for column, (title, use, norm) in enumerate(zip(titles, uses, norms, strict=True)):
        _plot_use(grid[0][column], use, title)
        _plot_norms(grid[1][column], norm)
    figure.savefig(path)


def _plot_use(axes: Axes, use: FilterUse, title: str) -> None:
    places = range(1, len(use.layers) + 1)
    marks = zip(use.thresholds, use.shares.T, use.average.tolist(), COLORS, MARKERS, strict=True)
    for threshold, shares, average, color, marker in marks:
        label = f"above {threshold:.0%} of the largest; {average:.0%} on average"
        axes.plot(places, shares, marker=marker, markersize=4, color=color, label=label)
    axes.set(title=title, xlabel="convolution of the core", ylabel="share of active filters")
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plot_norms(axes: Axes, norms: Tensor) -> None:
    num_members, num_channels = norms.shape
    width = 0.8 / num_members
    order = (
        (norms[0] - norms[-1]).argsort(descending=True) if num_members > 1 else range(num_channels)
    )
    for member in range(num_members):
        places = [i + (member - (num_members - 1) / 2) * width for i in range(num_channels)]
        color = COLORS[member % len(COLORS)]
        axes.bar(places, norms[member][order], width, color=color, label=f"encoder {member + 1}")
    axes.set_xlabel("feature channel, from the first member's to the last's")
    axes.set_ylabel("L1 norm of the encoder's filter")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


@_plain_text
def plot_comparison(names: list[str], compared: Sequence[Compared], path: Path) -> None:
    """Draw accuracy and NLL of runs, with 95 % intervals, against their parameters."""
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    part = PART_NAMES[compared[0].part].lower()
    panels = (("accuracy", f"{part} accuracy"), ("nll", f"{part} NLL in nats"))
    for axes, (figure_name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, (name, part) in enumerate(zip(names, compared, strict=True)):
            value, (low, high) = part.figures[figure_name], part.intervals[figure_name]
            axes.errorbar(
                part.parameters,
                value,
                [[value - min(low, value)], [max(high, value) - value]],
                fmt=MARKERS[place // len(COLORS) % len(MARKERS)],
                color=COLORS[place % len(COLORS)],
                markersize=8,
                capsize=4,
                label=name + _seen(part.images_seen),
            )
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(lambda count, _: f"{count:,.0f}" if f"{count:e}"[0] in "125" else "")
        axes.tick_params(axis="x", which="both", labelrotation=30)
        axes.set(xlabel="parameters", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path)


def _seen(images: int | None) -> str:
    return "" if images is None else f": {images:,} images seen"


def _show_image(axes: Axes, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0)  # (H, W, C)
    shown = pixels[:, :, 0] if pixels.shape[2] < 3 else pixels[:, :, :3]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1)  # alike in all panels
