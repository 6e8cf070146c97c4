"""Plots of filter use: active filters per convolution, and the norms of the encoders' filters.

Shapes: L convolutions of the core, T thresholds, M members, D feature channels.
"""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mixmo_fastai.metrics.table import percent, round_percent
from mixmo_fastai.models.filters import FilterUse
from mixmo_fastai.report.charts import MARKERS, Chart, percent_axis
from mixmo_fastai.report.drawing import INK, MEMBERS, OPACITIES, Plot

MAX_NAMES = 80
"""Number of convolutions above which the plot of `mixmo inspect` names only some of them."""


def filters(uses: Sequence[FilterUse]) -> Chart:
    """Plot the fraction of active filters per convolution, the mean over networks."""
    first = uses[0]
    active = torch.stack([use.fractions for use in uses]).mean(dim=0)  # (L, T)
    average = active.mean(dim=0).tolist()
    networks = f" Mean over {len(uses)} networks." if len(uses) > 1 else ""
    averages = ", ".join(
        f"{percent(fraction)} above {round_percent(threshold)}"
        for threshold, fraction in zip(first.thresholds, average, strict=True)
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_use(axes, FilterUse(first.layers, active, first.thresholds), legend_columns=1)
        axes.set_xlabel("convolution of the core (names below)")

    return Chart(
        "Active filters",
        Plot(
            draw,
            "filters",
            f"Active filters, average over {len(first.layers)} layers: {averages}.",
            size=(4.1, 3.3),
        ),
        f"Filters whose L1 norm exceeds a fraction of the layer's largest.{networks}",
    )


def encoders(norms: Sequence[Tensor]) -> Chart:
    """Plot the L1 norms of the encoders' filters, one panel per encoder.

    Args:
        norms: encoder norms (M, D) of each network.
    """
    rows = sum(len(of_network) for of_network in norms)
    first = norms[0]
    num_members, num_channels = first.shape

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        _draw_norms(list(panels), norms, max(float(norm.max()) for norm in norms))
        figure.supylabel("L1 norm", fontsize=9)

    largest = first.argmax(dim=0).bincount(minlength=num_members).tolist()
    counts = ", ".join(f"encoder {m + 1} in {count}" for m, count in enumerate(largest))
    text = f"L1 norms of the encoders' filters for {num_channels} channels; largest: {counts}."
    caption = (
        "A channel in which one encoder's norm is large and the others' are small is mainly used "
        "by that member."
        if num_members > 1
        else "Norms of the filters of the first convolution."
    )
    size = (4.1, min(8.0, max(2.9, 0.7 + 0.8 * rows)))
    return Chart("Encoders", Plot(draw, "encoders", text, size=size), caption)


def side_by_side(titles: Sequence[str], uses: Sequence[FilterUse], norms: Sequence[Tensor]) -> Plot:
    """Plot filter use and encoder norms, one column per network, with names of convolutions."""
    rows = max(len(of_network) for of_network in norms)
    longest = max(len(use.layers) for use in uses)
    width = max(6.5, 1.2 + 0.13 * min(longest, MAX_NAMES))
    name_length = max(len(name) for use in uses for name in use.layers)
    highest = max(float(norm.max()) for norm in norms)
    heights = (2.4 + 0.07 * name_length + 0.4 * (len(uses) > 1), 0.5 + 1.2 * rows)

    def draw(figure: Figure) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        top = upper.subplots(1, len(uses), squeeze=False, sharey="row")[0]
        columns = lower.add_gridspec(1, len(uses))
        for column, (title, use, norm) in enumerate(zip(titles, uses, norms, strict=True)):
            _draw_use(top[column], use, legend_columns=2 if len(uses) == 1 else 0)
            _name_convolutions(top[column], use.layers)
            top[column].label_outer()
            top[column].set_title(title)
            cells = columns[column].subgridspec(len(norm), 1)
            _draw_norms(list(cells.subplots(sharex=True, squeeze=False)[:, 0]), [norm], highest)
        if len(uses) > 1:
            handles, labels = top[0].get_legend_handles_labels()
            name = "filters with an L1 norm above a fraction of the layer's largest"
            location = "outside upper center"
            upper.legend(handles, labels, loc=location, ncols=len(labels), title=name)
        lower.supylabel("L1 norm of the encoder's filter", fontsize=9)

    text = f"Active filters and encoder norms of {', '.join(titles)}."
    return Plot(draw, "filter-use", text, size=(width * len(uses), sum(heights)))


def _draw_use(axes: Axes, use: FilterUse, *, legend_columns: int) -> None:
    """Draw a line per threshold.

    Args:
        axes: where to draw.
        use: filter use of one network.
        legend_columns: columns of a legend above the plot, with the averages over the convolutions;
            0 for none.
    """
    numbers = range(1, len(use.layers) + 1)
    average = use.average.tolist()
    for column, threshold in enumerate(use.thresholds):
        axes.plot(
            numbers,
            use.fractions[:, column],
            marker=MARKERS[column % len(MARKERS)],
            color=INK,
            alpha=OPACITIES[column % len(OPACITIES)],
            label=f"above {round_percent(threshold)}"
            + f": {percent(average[column])} on average" * (legend_columns > 0),
        )
    axes.set(ylabel="active filters", ylim=(0, 1.05), xlim=(0.5, len(use.layers) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    percent_axis(axes.yaxis)
    if legend_columns:
        axes.figure.legend(loc="outside upper center", ncols=legend_columns)


def _name_convolutions(axes: Axes, layers: Sequence[str]) -> None:
    """Label each convolution with its number and its module name."""
    step = -(-len(layers) // MAX_NAMES)
    numbers = range(1, len(layers) + 1, step)
    labels = [f"{layers[number - 1]}  {number}" for number in numbers]
    axes.set_xticks(numbers, labels, rotation=90, fontsize=7 if len(numbers) <= 40 else 6)
    axes.set_xlabel("convolution: module name and number")


def _draw_norms(panels: Sequence[Axes], norms: Sequence[Tensor], highest: float) -> None:
    """Draw a bar plot per encoder, with the channels of each network in the same order.

    Args:
        panels: one per encoder.
        norms: encoder norms (M, D) of each network.
        highest: largest norm of all panels with the same scale.
    """
    rows = [(n, m) for n, of_network in enumerate(norms) for m in range(len(of_network))]
    for axes, (network, member) in zip(panels, rows, strict=True):
        of_network = norms[network]
        others = of_network[-1] if len(of_network) > 1 else 0
        order = (of_network[0] - others).argsort(descending=True)
        channels = range(1, len(order) + 1)
        axes.bar(channels, of_network[member][order], width=0.9, color=MEMBERS)
        name = f"encoder {member + 1}"
        if len(norms) > 1:
            name = f"network {network + 1}" + f", {name}" * (len(of_network) > 1)
        axes.set_title(name, loc="left", fontsize=8, pad=2)
        axes.set(xlim=(0.4, len(order) + 0.6), ylim=(0, 1.05 * highest or 1.0))
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    has_members = any(len(of_network) > 1 for of_network in norms)
    order_name = "from the first member's to the last's" if has_members else "sorted by norm"
    panels[-1].set_xlabel(f"feature channel, {order_name}")
