"""What figures say can be read: class names as they are, ticks as numbers."""

import pytest
from matplotlib.figure import Figure

from mixmo_fastai.figures import plot_comparison, plot_lr_search
from mixmo_fastai.lr_search import LrSearch


class Part:
    """A run as `plot_comparison` takes it."""

    def __init__(self, parameters):
        self.parameters, self.images_seen = parameters, 1000
        self.figures = {"accuracy": 0.5, "nll": 1.0}
        self.intervals = {"accuracy": (0.4, 0.6), "nll": (0.9, 1.1)}


@pytest.fixture
def ticks(monkeypatch):
    """The texts of the horizontal axis of whatever is saved."""
    seen = []

    def look(figure, *_, **__):
        figure.canvas.draw()
        for axes in figure.axes:
            labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
            seen.extend(text for label in labels if (text := label.get_text()))

    monkeypatch.setattr(Figure, "savefig", look)
    return seen


def test_rates(ticks, tmp_path):
    rates = [10.0**power for power in range(-6, 2)]
    suggestions = dict.fromkeys(("valley", "slide", "steep", "minimum"), 1e-3)
    plot_lr_search(LrSearch(rates, [*range(8, 0, -1)], suggestions), tmp_path / "it.png", "rates")
    assert {"1e-05", "1e-01"} <= set(ticks)
    assert not [text for text in ticks if "$" in text]


@pytest.mark.parametrize("counts", [(78_356, 302_000), (36_500_000, 73_000_000)])
def test_parameters(ticks, tmp_path, counts):
    parts = [Part(count) for count in counts]
    plot_comparison(["one", "two"], parts, tmp_path / "it.png")
    assert ticks
    assert all(text.replace(",", "").isdigit() for text in ticks)
