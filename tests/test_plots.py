"""Plots are readable: markers do not overlap, ticks are numbers, long names are cut."""

from itertools import combinations, pairwise

import pytest
import torch
from matplotlib.figure import Figure

from mixmo_fastai.learner.preview import Preview
from mixmo_fastai.plots.png import MARKERS, plot_comparison, plot_lr_search, plot_preview
from mixmo_fastai.training.lr_find import LrSearch


class ComparedRun:
    """The attributes of a run that `plot_comparison` reads."""

    def __init__(self, parameters):
        self.parameters, self.images_seen, self.split = parameters, 1000, "test"
        self.metrics = {"accuracy": 0.5, "nll": 1.0}
        self.intervals = {"accuracy": (0.4, 0.6), "nll": (0.9, 1.1)}


@pytest.fixture
def ticks(monkeypatch):
    """Return the list to which saving a plot adds the tick labels of its horizontal axes.

    They do not depend on the layout, so the plot is not drawn.
    """
    collected = []

    def inspect_figure(figure, *_, **__):
        for axes in figure.axes:
            labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
            collected.extend(text for label in labels if (text := label.get_text()))

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    return collected


def test_learning_rate_ticks_are_plain_numbers(ticks, tmp_path):
    rates = [10.0**power for power in range(-6, 2)]
    suggestions = dict.fromkeys(("valley", "slide", "steep", "minimum"), 1e-3)
    plot_lr_search(LrSearch(rates, [*range(8, 0, -1)], suggestions), tmp_path / "it.png", "rates")
    assert {"1e-05", "1e-01"} <= set(ticks)
    assert not [text for text in ticks if "$" in text]


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.3, 10.0])
def test_markers_of_nearly_equal_learning_rates_do_not_overlap(monkeypatch, tmp_path, rate):
    positions = []

    def inspect_figure(figure, *_, **__):
        figure.canvas.draw()
        (axes,) = figure.axes
        for line in axes.get_lines():
            if line.get_marker() in MARKERS:
                (x, y) = line.get_transform().transform(line.get_xydata()[0])
                assert axes.bbox.contains(x, y)
                assert line.get_xdata()[0] == pytest.approx(rate, rel=0.1)
                positions.append((x, y))

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    names = ("valley", "slide", "steep", "minimum")
    suggestions = {name: rate * (1 + 0.02 * i) for i, name in enumerate(names)}
    rates = [10.0 ** (power / 10 - 6) for power in range(71)]
    losses = [2.5] * 35 + [2.5 - 0.04 * step for step in range(36)]
    plot_lr_search(LrSearch(rates, losses, suggestions), tmp_path / "it.png", "rates")
    assert len(positions) == 4
    for (x, y), (u, v) in combinations(positions, 2):
        assert abs(x - u) > 15 or abs(y - v) > 15  # markers are 8 points wide, at 120 dpi


@pytest.mark.parametrize(("slope", "flat"), [(0.001, True), (0.04, False)])
def test_title_states_that_a_curve_is_flat(monkeypatch, tmp_path, slope, flat):
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda f, *_, **__: titles.append(f.axes[0].get_title()))
    losses = [2.5] * 4 + [2.5 - slope * step for step in range(20)]
    suggestions = dict.fromkeys(("valley", "slide", "steep", "minimum"), 1e-3)
    rates = [10.0 ** (power / 4 - 5) for power in range(24)]
    plot_lr_search(LrSearch(rates, losses, suggestions), tmp_path / "it.png", "rates")
    assert ("too flat" in titles[0]) == flat


UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_parameters", [8, 77_850, 99_000, 1_200_000, 36_479_194, 2_000_000_000]
)
@pytest.mark.parametrize("ratio", [1, 1.002, 1.1, 1.5, 2, 3.7, 10, 100, 4000])
def test_size_axis_has_labels_for_all_pairs_of_sizes(ticks, tmp_path, num_parameters, ratio):
    sizes = (num_parameters, round(num_parameters * ratio))
    plot_comparison(["one", "two"], [ComparedRun(size) for size in sizes], tmp_path / "it.png")
    left, right = ticks[: len(ticks) // 2], ticks[len(ticks) // 2 :]
    assert left == right
    assert 3 <= len(left) <= 8
    values = [float(number) * UNITS[unit] for number, _, unit in (t.partition(" ") for t in left)]
    assert values == sorted(set(values))
    assert values[-1] / values[0] < 10 * max(ratio**1.25, 2)


@pytest.mark.parametrize("ratio", [1, 1.002, 2, 100])
def test_markers_of_runs_are_inside_the_plot_and_do_not_overlap(monkeypatch, tmp_path, ratio):
    positions = []

    def inspect_figure(figure, *_, **__):
        figure.canvas.draw()
        for axes in figure.axes:
            for container in axes.containers:
                (x, y) = axes.transData.transform(container[0].get_xydata()[0])
                assert axes.bbox.contains(x, y)
                positions.append((axes, x))

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    sizes = (36_479_194, round(36_479_194 * ratio))
    plot_comparison(["one", "two"], [ComparedRun(size) for size in sizes], tmp_path / "it.png")
    assert len(positions) == 4
    for (axes, x), (other, next_x) in pairwise(positions):
        assert axes is not other or next_x - x > 15  # markers are 8 points wide, at 120 dpi


def leader_lines(axes):
    """Return the lines of a panel that belong to no marker."""
    marked = [line for container in axes.containers for line in container.get_children()]
    return [line for line in axes.get_lines() if line not in marked]


def leaders_of(axes):
    """Return the points of each leader line of a panel, starting at the axis."""
    return [line.get_xydata() for line in leader_lines(axes)]


@pytest.mark.parametrize(
    ("sizes", "num_shifted"),
    [
        ((303_418, 304_852), 2),
        ((304_852, 303_418, 304_000, 5_000_000), 3),
        ((300_000, 300_000, 300_000), 3),
        ((300_000, 3_000_000), 0),
        ((300_000,) * 40, 40),
    ],
)
def test_shifted_markers_have_leader_lines(monkeypatch, tmp_path, sizes, num_shifted):
    panels = []

    def inspect_figure(figure, *_, **__):
        figure.canvas.draw()
        panels.extend(figure.axes)
        for axes in figure.axes:
            markers = [container[0].get_xydata()[0] for container in axes.containers]
            shifted = [
                (size, marker)
                for size, marker in zip(sizes, markers, strict=True)
                if marker[0] != size
            ]
            leaders = leaders_of(axes)
            assert len(shifted) == len(leaders) == num_shifted
            for (size, marker), leader in zip(shifted, leaders, strict=True):
                assert leader[0].tolist() == [size, axes.get_ylim()[0]]  # on the axis
                assert leader[-1][0] == marker[0]
            assert ("markers shifted" in axes.get_xlabel()) == (num_shifted > 0)
            positions = [axes.transData.transform(marker)[0] for marker in markers]
            in_order = [position for _, position in sorted(zip(sizes, positions, strict=True))]
            assert in_order == sorted(positions)
            assert axes.bbox.x0 < in_order[0]
            assert in_order[-1] < axes.bbox.x1

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    names = [f"run {number}" for number in range(len(sizes))]
    plot_comparison(names, [ComparedRun(size) for size in sizes], tmp_path / "it.png")
    assert len(panels) == 2


def test_runs_whose_names_begin_with_an_underscore_are_in_the_legend(monkeypatch, tmp_path):
    texts = []

    def inspect_figure(figure, *_, **__):
        texts.extend(text.get_text() for text in figure.legends[0].get_texts())

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    plot_comparison(["_first", "second"], [ComparedRun(300_000)] * 2, tmp_path / "it.png")
    assert [text.partition(" ")[0].rstrip(":,") for text in texts] == ["_first", "second"]


def test_leader_lines_have_the_colours_of_their_markers(monkeypatch, tmp_path):
    panels = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: panels.extend(figure.axes))
    plot_comparison(list("abcdef"), [ComparedRun(300_000)] * 6, tmp_path / "it.png")
    for axes in panels:
        colors = [container[0].get_color() for container in axes.containers]
        assert len({*colors}) == 6
        assert [line.get_color() for line in leader_lines(axes)] == colors


def test_shifted_markers_keep_their_distance_from_neighbours(monkeypatch, tmp_path):
    """A group of shifted markers also keeps its distance from the marker next to it."""
    positions = []

    def inspect_figure(figure, *_, **__):
        figure.canvas.draw()
        axes = figure.axes[0]
        for container in axes.containers:
            positions.append(axes.transData.transform(container[0].get_xydata()[0])[0])

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    sizes = (300_000, 300_000, 300_000, 300_000, 315_000)
    plot_comparison(list("abcde"), [ComparedRun(size) for size in sizes], tmp_path / "it.png")
    for position, next_place in pairwise(positions):
        assert next_place - position > 15


def test_long_class_name_is_cut(monkeypatch, tmp_path):
    collected = []
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *_, **__: collected.extend(a.get_title() for a in f.axes)
    )
    preview = Preview(
        torch.zeros(1, 2, 1, 4, 4),
        torch.zeros(1, 2, 4, 4),
        torch.zeros(1, 1, 4, 4),
        [["a" * 80, "b"]],
    )
    plot_preview(preview, tmp_path / "it.png", "pairs")
    assert max(len(title.splitlines()[-1]) for title in collected) == 22


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_all_panels_have_the_same_grey_levels(monkeypatch, tmp_path, channels):
    """The contrast of a nearly uniform image is not stretched."""
    collected = []

    def inspect_figure(figure, *_, **__):
        for axes in figure.axes:
            collected.extend(image.to_rgba(image.get_array(), norm=True) for image in axes.images)

    monkeypatch.setattr(Figure, "savefig", inspect_figure)
    inputs = torch.full((1, 2, channels, 4, 4), 0.5)
    inputs[..., 0, 0] = 0.52
    masks = torch.full((1, 2, 4, 4), 0.5)
    plot_preview(
        Preview(inputs, masks, inputs.mean(dim=1), [["a", "b"]]), tmp_path / "it.png", "pairs"
    )
    assert len(collected) == 5
    for image in collected:
        assert abs(image[..., 0] - 0.5).max() < 0.03
