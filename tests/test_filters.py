import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from torch import nn

from mixmo_fastai.cli.render import filter_lines
from mixmo_fastai.errors import InputError
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.filters import THRESHOLDS, encoder_norms, filter_use
from mixmo_fastai.report.filters import side_by_side


def l1_norms(weight):
    """Compute the L1 norm of each filter in plain Python."""
    return np.array([sum(abs(float(w)) for w in kernel.flatten()) for kernel in weight])


def test_active_fractions_match_their_definition():
    model = create_model("wrn10_1", 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # half of the filters of one layer become inactive
        first = next(m for m in model.core.modules() if isinstance(m, nn.Conv2d))
        first.weight[::2] *= 0.25
    use = filter_use(model)
    convolutions = {n: m for n, m in model.core.named_modules() if isinstance(m, nn.Conv2d)}
    assert use.layers == tuple(f"core.{name}" for name in convolutions)
    assert use.fractions.shape == (len(convolutions), 4)
    for row, layer in zip(use.fractions, convolutions.values(), strict=True):
        norms = l1_norms(layer.weight.detach())
        expected = [np.mean(norms > t * norms.max()) for t in THRESHOLDS]
        assert row.tolist() == pytest.approx(expected)
    assert use.fractions[0, -1] < 0.6 < use.fractions[1, -1]
    assert use.average.tolist() == pytest.approx(use.fractions.numpy().mean(0))


def test_encoder_norms_match_their_definition():
    model = create_model("wrn10_1", 10, 3)
    norms = encoder_norms(model)
    assert norms.shape == (3, 16)
    for row, encoder in zip(norms, model.encoders, strict=True):
        assert row.tolist() == pytest.approx(l1_norms(encoder.weight.detach()), rel=1e-5)


def test_zero_layer_has_no_active_filter():
    model = create_model("wrn10_1", 10)
    with torch.no_grad():
        next(m for m in model.core.modules() if isinstance(m, nn.Conv2d)).weight.zero_()
    assert filter_use(model).fractions[0].tolist() == [0, 0, 0, 0]


def test_networks_without_convolutions_are_refused():
    flat = MixMoModel([nn.Linear(4, 4)], nn.Linear(4, 4), [nn.Linear(4, 2)])
    with pytest.raises(InputError, match="no convolution"):
        filter_use(flat)
    with pytest.raises(InputError, match="Linear has no convolution"):
        encoder_norms(flat)
    with pytest.raises(InputError, match="thresholds"):
        filter_use(create_model("wrn10_1", 10), (1.0,))


def test_plot_names_all_convolutions(monkeypatch):
    model = create_model("wrn10_1", 10, 2)
    use, norms = filter_use(model), encoder_norms(model)
    texts = []

    def inspect_canvas(canvas, *_, **__):
        canvas.draw()
        for axes in canvas.figure.findobj(Axes):
            texts.extend(label.get_text() for label in axes.get_xticklabels())

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", inspect_canvas)
    side_by_side(["one", "two"], [use, use], [norms, norms]).png()
    for number, name in enumerate(use.layers, 1):
        assert texts.count(f"{name}  {number}") == 2


def test_runs_with_different_numbers_of_members_are_plotted():
    models = [create_model("wrn10_1", 10, 1), create_model("wrn16_1", 10, 3)]
    uses, norms = [filter_use(m) for m in models], [encoder_norms(m) for m in models]
    assert side_by_side(["one", "two"], uses, norms).png().startswith(b"\x89PNG")


def test_plot_of_two_runs_is_filled_and_readable(monkeypatch):
    """All bars and ticks are visible, and the panels fill the plot."""
    models = [create_model("wrn10_1", 10, 1), create_model("wrn10_1", 10, 3)]
    uses, norms = [filter_use(m) for m in models], [encoder_norms(m) for m in models]
    norms[1][2, 3] = 3 * max(norm.max() for norm in norms)
    panels, legends = [], []

    def inspect_canvas(canvas, *_, **__):
        canvas.draw()
        bars = [axes for axes in canvas.figure.findobj(Axes) if axes.patches]
        panels.extend((axes.bbox, axes.get_ylim(), axes.patches, axes) for axes in bars)
        legends.extend(canvas.figure.findobj(Legend))
        for axes in bars:
            assert axes.get_visible()
            assert [label.get_text() for label in axes.get_yticklabels() if label.get_visible()]
        for lowest in (bars[0], bars[-1]):
            assert any(label.get_text() for label in lowest.get_xticklabels())

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", inspect_canvas)
    side_by_side(["one", "two"], uses, norms).png()
    assert len(panels) == 4
    for _, (low, high), bars, _ in panels:
        assert low == 0
        assert max(bar.get_height() for bar in bars) < 0.99 * high
    (left, *_), *right = panels
    assert left.y0 == pytest.approx(right[-1][0].y0, abs=2)  # at the same height
    assert left.y1 == pytest.approx(right[0][0].y1, abs=2)
    assert len(legends) == 1
    texts = [text.get_text() for text in legends[0].get_texts()]
    assert texts == [f"above {threshold:.0%}".replace("%", " %") for threshold in THRESHOLDS]


def test_table_contains_the_norms_of_the_encoders():
    model = create_model("wrn10_1", 10, 2)
    norms = torch.tensor([[1.0, 4.0, 2.5], [3.0, 2.0, 1.0]])
    lines = filter_lines(["run"], [filter_use(model)], [norms])
    head, first, second = (line.split() for line in lines[-3:])
    assert head[:4] == ["encoder", "mean", "smallest", "largest"]
    assert first == ["1", "2.500", "1.000", "4.000", "2", "channels"]
    assert second == ["2", "2.000", "1.000", "3.000", "1", "channel"]
    assert any("core.groups.0.0.conv1" in line for line in lines)
