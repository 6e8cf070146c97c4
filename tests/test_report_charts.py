"""The charts of the report: their SVG, colours, descriptions and captions."""

import io
import re
from importlib.resources import files

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from report_pages import UNESCAPED_NAME

from mixmo_fastai.report.charts import agreement, reliability
from mixmo_fastai.report.drawing import INCORRECT, LIGHT, PLACEHOLDER_COLORS, Plot
from mixmo_fastai.report.page import as_data_uri

pytestmark = pytest.mark.slow


def draw_line(figure):
    figure.subplots().plot([1, 2], color=INCORRECT)


class TestPlot:
    def test_ids_have_a_prefix_and_colours_are_variables(self):
        svg = Plot(draw_line, "example", "Description").svg()
        assert "var(--incorrect)" in svg
        assert "#0101" not in svg
        names = re.findall(r' id="([^"]+)"', svg)
        assert names
        assert all(name.startswith("example-") for name in names)
        for target in re.findall(r"url\(#([^)]+)\)", svg) + re.findall(r'href="#([^"]+)"', svg):
            assert target in names

    def test_text_is_escaped(self):
        svg = Plot(
            lambda figure: figure.text(0.5, 0.5, UNESCAPED_NAME), "example", UNESCAPED_NAME
        ).svg()
        assert "<script" not in svg
        assert "alert" in svg
        assert "$x$" in svg  # not parsed as TeX

    def test_svg_is_deterministic(self):
        assert (
            Plot(draw_line, "example", "Description").svg()
            == Plot(draw_line, "example", "Description").svg()
        )

    def test_png_has_the_colours_of_the_light_page(self):
        css = (files("mixmo_fastai.report") / "page.css").read_text(encoding="utf-8")
        light = dict(re.findall(r"(--[\w-]+): (#\w+)", css.partition("@media")[0]))
        assert tuple(light[variable[4:-1]] for variable in PLACEHOLDER_COLORS.values()) == LIGHT
        image = Image.open(
            io.BytesIO(Plot(draw_line, "example", "Description").png("Title"))
        ).convert("RGB")
        colors = {color for _, color in image.getcolors(maxcolors=2**16)}
        for expected in (light["--paper"], light["--incorrect"], light["--ink"]):
            assert ImageColor.getrgb(expected) in colors, expected


def test_description_of_a_reliability_diagram():
    logits = torch.tensor([[4.0, 0.0]] * 10)  # confidence 98.2 %, nine of ten correct
    labels = torch.tensor([0] * 9 + [1])
    chart = reliability("example", "Title", logits, labels, caption="")
    assert "ECE 8.20 %" in chart.svg
    assert "8.20 points above the accuracy" in chart.svg


@pytest.mark.parametrize(
    ("num_correct", "word", "other"),
    [(9, "overconfident", "under"), (10, "underconfident", "over")],
)
def test_caption_names_over_or_underconfidence(num_correct, word, other):
    logits = torch.tensor([[4.0, 0.0]] * 10)  # confidence 98.2 %
    labels = torch.tensor([0] * num_correct + [1] * (10 - num_correct))
    caption = reliability("example", "Title", logits, labels, caption="").caption
    assert f"{word} on average" in caption
    assert f"{other}confident" not in caption


@pytest.mark.parametrize(("num_in_bin", "is_faint"), [(1, True), (9, True), (10, False)])
def test_bins_with_few_images_are_faint(num_in_bin, is_faint):
    logits = torch.tensor([[4.0, 0.0]] * 30 + [[0.5, 0.0]] * num_in_bin)
    labels = torch.tensor([0] * 30 + [1] * num_in_bin)
    chart = reliability("example", "Title", logits, labels, caption="")
    figure = Figure()
    chart.plot.draw(figure)
    alphas = {round(bar.get_x(), 2): bar.get_alpha() for bar in figure.axes[0].patches}
    assert alphas[round(14 / 15, 2)] > 0.5
    assert (alphas[round(9 / 15, 2)] < 0.2) == is_faint
    assert ("fewer than 10 images are faint" in chart.caption) == is_faint


@pytest.mark.parametrize("num_images", [5, 10, 15])
def test_reliability_diagram_fills_its_figure(num_images):
    """Check diagrams in which all bins or no bins are faint."""
    logits = torch.tensor([[4.0, 0.0]] * num_images)
    chart = reliability("example", "Title", logits, torch.zeros(num_images).long(), caption="")
    figure = Figure(figsize=chart.plot.size, layout="constrained")
    chart.plot.draw(figure)
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().height > 0.55


def test_description_of_the_agreement():
    members = torch.tensor(
        [[[3.0, 0], [0, 1]], [[2, 0], [1, 0]], [[2, 0], [1, 0]], [[0, 1], [0, 1]]]
    )
    chart = agreement(members, torch.tensor([1, 0, 1, 1]), "member")
    assert "2 of 2 on 75.00 % of the images, 66.67 % of them correct" in chart.svg
    assert "1 of 2 on 25.00 % of the images, 0.00 % of them correct" in chart.svg


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_data_uri_contains_the_pixels(channels):
    import base64

    import numpy as np

    pixels = torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8)
    address = as_data_uri(pixels)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    assert image.shape[:2] == (64, 64)  # enlarged eight times
    small = image[::8, ::8].reshape(8, 8, min(channels, 3))
    np.testing.assert_array_equal(small.transpose(2, 0, 1), pixels[:3])
