import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from chromium import Page, needs_chromium
from report_pages import (
    CLASSES,
    NUM_CHARTS,
    NUM_TILES,
    Elements,
    empty_plots,
    images,
    pages,
    reports,
    runs,
    tiled_pages,
    with_tiles,
)

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.models import create_model
from mixmo_fastai.report.page import render
from mixmo_fastai.report.report_data import collect_report_data
from mixmo_fastai.report.sections import sections
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.weights import save_weights

pytestmark = pytest.mark.slow

__all__ = ["images", "pages", "reports", "runs", "tiled_pages"]  # fixtures


@pytest.mark.parametrize("kind", NUM_CHARTS)
class TestPage:
    def test_is_well_formed(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        assert elements.open == []
        names = [attrs["id"] for _, attrs in elements.tags if "id" in attrs]
        assert len(names) == len(set(names))

    def test_every_plot_has_alternative_text(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        plots, images = elements.attributes_of("svg"), elements.attributes_of("img")
        assert len(plots) == NUM_CHARTS[kind]
        assert all(len(d["aria-label"]) > 30 and d["role"] == "img" for d in plots)
        assert images
        assert all(len(image["alt"]) > 20 for image in images)

    def test_has_no_external_references(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        addresses = [a[k] for _, a in elements.tags for k in ("href", "src") if k in a]
        assert all(address.startswith(("#", "data:")) for address in addresses)
        assert elements.attributes_of("script") == []
        targets = {address for address in addresses if address.startswith("#")}
        assert targets <= {f"#{a['id']}" for _, a in elements.tags if "id" in a}
        text = pages[kind].read_text(encoding="utf-8")
        assert "http:" not in text
        assert "https:" not in text

    def test_names_are_escaped(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        assert CLASSES[1] in elements.text
        assert elements.attributes_of("b") == elements.attributes_of("i") == []

    def test_metrics_equal_the_evaluation(self, pages, reports, kind):
        text = Elements(pages[kind].read_text(encoding="utf-8")).text
        metrics = reports[kind].metrics
        assert f"{100 * metrics['test']['accuracy']:.2f}\u00a0%" in text
        assert f"{metrics['test']['nll']:.4f}" in text
        assert "nan" not in text.lower().replace("nan.jpg", "")

    def test_percent_signs_follow_a_non_breaking_space(self, pages, kind):
        text = pages[kind].read_text(encoding="utf-8")
        assert "\u00a0%" in text
        assert not re.search(r"\d %", text)

    def test_convolutions_are_named(self, pages, reports, kind):
        text = Elements(pages[kind].read_text(encoding="utf-8")).text
        assert all(name in text for name in reports[kind].uses[0].layers)


def test_network_with_one_member_has_no_member_charts(pages):
    text = Elements(pages["vanilla"].read_text(encoding="utf-8")).text
    assert "The network has one member" in text
    assert "Ratio of errors" not in text


def test_mistakes_are_sorted_by_confidence(reports):
    report = reports["mixmo"]
    confidence = report.logits.softmax(1).amax(1)
    wrong = report.logits.argmax(1) != report.labels
    assert wrong.any()
    listed = [mistake.confidence for mistake in report.mistakes]
    assert listed == sorted(confidence[wrong].tolist(), reverse=True)[:12]
    for mistake in report.mistakes:
        assert mistake.label != mistake.predicted
        assert mistake.label in mistake.name  # its file is in the folder of its class


def test_learning_rates_equal_those_of_the_training(reports):
    report = reports["mixmo"]
    epochs, rates = zip(*report.rates, strict=True)
    assert epochs[0] == 0
    assert epochs[-1] == 1
    assert max(rates) == pytest.approx(report.recipe.lr, rel=1e-3)
    assert rates[-1] == pytest.approx(report.histories[0][-1]["lr"], abs=report.recipe.lr / 50)


def test_report_of_a_perfect_network_without_history(tmp_path, images, monkeypatch):
    recipe = resolve_recipe(
        str(images), None, {"model.arch": "wrn10_1"}, ["data.valid_split=0", "train.device=cpu"]
    )
    run = create_run(recipe, tmp_path / "imported")
    save_weights(create_model("wrn10_1", 3, 2, 3), run)
    (run.path / "environment.json").unlink()

    def perfect_logits(self, loaders):
        labels = self.source.test.labels
        logits = 50.0 * torch.nn.functional.one_hot(labels, 3).float()
        return None, (logits[:, None].expand(-1, 2, -1), labels), None

    monkeypatch.setattr("mixmo_fastai.evaluation.runs.FinishedRun.logits", perfect_logits)
    text = Elements(render(collect_report_data(run))).text
    for phrase in (
        "The run has no history.csv",
        "After temperature scaling",
        "no temperature is optimal",
        "Every image is classified correctly.",
        "None: every image is classified correctly",
        "The run has no environment.json",
        "Failure AUROC undefined",
    ):
        assert phrase in text


def test_report_without_validation_split(runs, reports):
    report = reports["mixmo"]
    rows = [
        {k: v for k, v in row.items() if "valid" not in k and "acc" not in k}
        for row in report.histories[0]
    ]
    without_validation = replace(report, histories=[rows], num_images=(0, 120))
    elements = Elements(render(without_validation))
    assert "There is no validation accuracy" in elements.text
    assert len(elements.attributes_of("svg")) == NUM_CHARTS["mixmo"] - 1


@pytest.mark.parametrize("text", ["epoch,images_seen\n1,many\n", "epoch,lr\n1,0.1\n"])
def test_damaged_history_is_rejected(runs, text, capsys):
    path = runs["vanilla"].path / "history.csv"
    before = path.read_text()
    path.write_text(text)
    try:
        assert program(["report", str(runs["vanilla"].path)]) == 2
        assert "history.csv is damaged" in capsys.readouterr().err
    finally:
        path.write_text(before)


class TestCommand:
    def test_report_is_written_to_the_run_folder(self, runs, capsys):
        assert program(["report", str(runs["mixmo"].path), "--json"]) == 0
        output = json.loads(capsys.readouterr().out)
        assert output["report"] == str(runs["mixmo"].report)
        first = runs["mixmo"].report.read_text(encoding="utf-8")
        assert first.startswith("<!doctype html>")
        assert program(["report", str(runs["mixmo"].path)]) == 0  # overwrites its own report

    def test_other_files_are_not_overwritten(self, runs, tmp_path, capsys):
        path = tmp_path / "page.html"
        assert program(["report", str(runs["vanilla"].path), "--out", str(path)]) == 0
        text = path.read_text(encoding="utf-8")
        assert not runs["vanilla"].report.exists()
        assert program(["report", str(runs["vanilla"].path), "--out", str(path)]) == 2
        assert path.read_text(encoding="utf-8") == text
        assert "exists and was not changed" in capsys.readouterr().err

    def test_run_without_weights_is_rejected(self, images, tmp_path, capsys):
        recipe = resolve_recipe(str(images), None, {"model.arch": "wrn10_1"})
        run = create_run(recipe, tmp_path / "empty")
        assert program(["report", str(run.path)]) == 2
        assert "has no weights yet" in capsys.readouterr().err
        assert not run.report.exists()


def render_without_plots(report):
    with empty_plots():
        return render(report)


def tiles_of(text):
    return re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd><dd class=\"aside\">(.*?)</dd>", text)


@pytest.mark.parametrize("num_tiles", [4, 6])
def test_published_accuracy_has_a_tile_if_it_exists(reports, num_tiles):
    report = with_tiles(reports["mixmo"], num_tiles)
    text = render_without_plots(report)
    tiles = {label: value for label, value, _ in tiles_of(text)}
    assert len(tiles) == num_tiles
    assert tiles.get("Published") == ("90.00\u00a0%" if num_tiles == 6 else None)
    assert ("Published:" in Elements(text).text) == (num_tiles == 6)


@pytest.mark.parametrize(("error", "is_marked"), [(0.099, False), (0.3, True)])
def test_tile_of_an_unreliable_temperature_is_marked(reports, error, is_marked):
    report = with_tiles(reports["mixmo"], 5)
    report.metrics["calibrated"]["temperature_error"] = error
    tiles = tiles_of(render_without_plots(report))
    (remark,) = [aside for label, _, aside in tiles if label == "ECE, calibrated"]
    assert remark.startswith("unreliable") == is_marked
    assert ("30\u00a0%" in remark) == is_marked


def colors_of(svg):
    return {
        name for name in ("ensemble", "members", "correct", "incorrect") if f"var(--{name})" in svg
    }


@pytest.fixture(scope="module")
def svgs(reports):
    """Return the plots of a report by name."""
    charts = [chart for section in sections(reports["mixmo"]) for chart in section.charts]
    return {chart.plot.name: chart.svg for chart in charts}


def test_each_color_has_one_meaning(pages, svgs):
    """The ensemble, the members, correct and incorrect predictions have their own colours."""
    assert {name: colors_of(svg) for name, svg in svgs.items()} == {
        "loss": {"ensemble"},  # the validation loss; the training loss has the text colour
        "validation-accuracy": {"ensemble", "members"},
        "learning-rate": set(),
        "reliability-before": {"ensemble"},
        "reliability-after": {"ensemble"},
        "risk": {"ensemble"},
        "decisions": {"ensemble"},
        "members": {"ensemble", "members"},
        "agreement": {"correct", "incorrect"},
        "confusion": {"correct", "incorrect"},
        "filters": set(),
        "encoders": {"members"},
    }
    text = pages["mixmo"].read_text(encoding="utf-8")
    assert all(f'style="background: var(--{name})"' in text for name in ("ensemble", "incorrect"))


def test_axes_of_fractions_are_in_percent(svgs):
    for name, svg in svgs.items():
        if name in ("loss", "learning-rate", "encoders", "confusion"):
            continue
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert any(re.fullmatch(r"[\d.]+ %", text) for text in texts), name
        assert not any(re.fullmatch(r"0\.\d+", text) for text in texts), name


def test_temperature_from_too_few_images_has_a_remark(reports):
    report = reports["mixmo"]
    calibrated = dict.fromkeys(("nll", "ece", "brier", "temperature"), 1.0)
    for error, has_remark in ((0.099, False), (0.101, True)):
        metrics = {**report.metrics, "calibrated": {**calibrated, "temperature_error": error}}
        metrics["calibrated"]["num_images"] = 57
        metrics.pop("cross_fitted", None)
        text = render_without_plots(replace(report, metrics=metrics))
        assert ("too few images: 57" in text) == has_remark


def test_many_classes_have_two_tables(reports):
    report = reports["mixmo"]
    random = torch.Generator().manual_seed(0)
    names = tuple(f"class {number}" for number in range(30))
    logits = torch.randn(300, 2, 30, generator=random).double()
    labels = torch.arange(300) % 30
    many = replace(
        report, classes=names, member_logits=logits, labels=labels, calibrated=logits.mean(1)
    )
    (confusion,) = [section for section in sections(many) if section.name == "confusion"]
    assert confusion.charts == []
    pairs, worst = confusion.tables
    assert len(pairs.rows) == len(worst.rows) == 15
    accuracy = (many.logits.argmax(1) == labels).view(10, 30).double().mean(0)
    assert worst.rows[0][2] == f"{100 * float(accuracy.min()):.2f} %"


@needs_chromium
class TestInChromium:
    def test_opens_without_console_messages_or_requests(self, pages):
        with Page(pages["mixmo"]) as page:
            assert page.console() == []
            assert page.requests() == [pages["mixmo"].resolve().as_uri()]

    def test_every_plot_and_image_is_visible(self, pages, reports):
        with Page(pages["mixmo"]) as page:
            sizes = page.evaluate(
                "[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight,"
                " [...s.querySelectorAll('path')].filter(p => p.getBBox().width > 0).length])"
            )
            assert len(sizes) == NUM_CHARTS["mixmo"]
            assert all(w > 200 and h > 80 and paths > 4 for w, h, paths in sizes)
            image_widths = page.evaluate(
                "[...document.images].map(i => i.complete && i.naturalWidth)"
            )
            num_examples = len(reports["mixmo"].decisions.examples)
            assert len(image_widths) == 12 + num_examples
            assert all(width >= 64 for width in image_widths)

    def test_text_is_inside_its_plot(self, pages):
        with Page(pages["ensemble"]) as page:
            outside = page.evaluate(
                "[...document.querySelectorAll('svg text')].filter(t => {"
                " const a = t.getBoundingClientRect(),"
                " b = t.closest('svg').getBoundingClientRect();"
                " return a.left < b.left - 4 || a.right > b.right + 4 })"
                ".map(t => t.textContent)"
            )
            assert outside == []

    @pytest.mark.parametrize("width", [320, 390, 768])
    def test_narrow_windows_need_no_horizontal_scrolling(self, pages, width):
        with Page(pages["mixmo"], width=width) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            tables = "[...document.querySelectorAll('table')]"
            outside = (
                f"{tables}.filter(t => t.scrollWidth > t.parentElement.clientWidth + 1).length"
            )
            assert page.evaluate(outside) == 0

    @pytest.mark.parametrize("kind", [*NUM_TILES, *NUM_CHARTS])
    @pytest.mark.parametrize("width", [390, 768, 1280])
    def test_rows_of_tiles_have_no_gaps(self, pages, tiled_pages, kind, width):
        num_tiles, path = NUM_TILES.get(kind), {**pages, **tiled_pages}[kind]
        with Page(path, width=width) as page:
            grid, *tiles = page.evaluate(
                "[document.querySelector('.tiles'), ...document.querySelectorAll('.tiles > div')]"
                ".map(e => e.getBoundingClientRect()).map(b => [b.top, b.left, b.right])"
            )
        assert num_tiles in (None, len(tiles))
        rows = {}
        for top, left, right in tiles:
            rows.setdefault(round(top), []).append((left, right))
        for row in rows.values():
            assert row[0][0] == pytest.approx(grid[1], abs=1)
            assert row[-1][1] == pytest.approx(grid[2], abs=1)
            for (_, end), (start, _) in pairwise(row):
                assert 0 < start - end < 20
        assert len(rows) == {390: (len(tiles) + 1) // 2, 768: 1 + (len(tiles) > 3), 1280: 1}[width]

    @pytest.mark.parametrize("width", [320, 390, 768])
    def test_the_word_undefined_is_not_wrapped(self, tiled_pages, width):
        with Page(tiled_pages["validation only"], width=width) as page:
            (num_lines, text) = page.evaluate(
                "(cell => { const r = document.createRange(), t = cell.firstChild;"
                " r.setStart(t, 0); r.setEnd(t, 9);"
                " return [r.getClientRects().length, r.toString()] })"
                "(document.querySelector('#calibration .card td'))"
            )
        assert (num_lines, text) == (1, "Undefined")

    @pytest.mark.parametrize("kind", [*NUM_CHARTS, "validation only"])
    @pytest.mark.parametrize("width", [768, 1280])
    def test_rows_of_charts_are_full(self, pages, tiled_pages, kind, width):
        with Page({**pages, **tiled_pages}[kind], width=width) as page:
            rows = page.evaluate(
                "[...document.querySelectorAll('.charts')].map(grid => [grid.children.length,"
                " getComputedStyle(grid).gridTemplateColumns.split(' ').length])"
            )
            assert len(rows) >= 5
            for num_cells, num_columns in rows:
                assert num_columns == 2
                assert num_cells % num_columns == 0

    def test_light_dark_and_print_colours(self, pages):
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        text = "getComputedStyle(document.querySelector('svg text')).fill"
        line = "getComputedStyle(document.querySelector('svg g[id*=line2d] path')).stroke"
        colors = {}
        with Page(pages["mixmo"]) as page:
            for scheme in ("light", "dark"):
                page.set_colors(scheme)
                colors[scheme] = [page.evaluate(part) for part in (paper, text, line)]
            page.set_colors("dark", media="print")
            colors["print"] = [page.evaluate(part) for part in (paper, text, line)]
        assert colors["light"][0] == colors["print"][0] == "rgb(255, 255, 255)"
        assert colors["print"][1] == "rgb(0, 0, 0)"
        assert all(
            light != dark for light, dark in zip(colors["light"], colors["dark"], strict=True)
        )

    def test_names_are_not_executed(self, pages):
        with Page(pages["mixmo"]) as page:
            assert page.evaluate("document.querySelectorAll('script').length") == 0
            text = page.evaluate("document.body.innerText")
            assert CLASSES[1] in text
