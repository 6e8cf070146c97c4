"""What figures say can be read: class names as they are, ticks as numbers."""

import pytest
import torch
from matplotlib.figure import Figure

from mixmo_fastai.figures import plot_comparison, plot_lr_search, plot_preview
from mixmo_fastai.lr_search import LrSearch
from mixmo_fastai.preview import Preview


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


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_levels_of_all_panels_compare(monkeypatch, tmp_path, channels):
    """An image of nearly one grey is not stretched from black to white."""
    seen = []

    def look(figure, *_, **__):
        for axes in figure.axes:
            seen.extend(image.to_rgba(image.get_array(), norm=True) for image in axes.images)

    monkeypatch.setattr(Figure, "savefig", look)
    inputs = torch.full((1, 2, channels, 4, 4), 0.5)
    inputs[..., 0, 0] = 0.52
    masks = torch.full((1, 2, 4, 4), 0.5)
    plot_preview(
        Preview(inputs, masks, inputs.mean(dim=1), [["a", "b"]]), tmp_path / "it.png", "pairs"
    )
    assert len(seen) == 5
    for picture in seen:
        assert abs(picture[..., 0] - 0.5).max() < 0.03
