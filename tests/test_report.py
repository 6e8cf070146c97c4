import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from chromium import Page, needs_chromium
from datasets import write_image_folder
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.recipe import Expected
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.models import create_model
from mixmo_fastai.report.charts import agreement, reliability
from mixmo_fastai.report.drawing import INCORRECT, LIGHT, PLACEHOLDER_COLORS, Plot
from mixmo_fastai.report.page import as_data_uri, render
from mixmo_fastai.report.report_data import collect_report_data
from mixmo_fastai.report.sections import sections
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.weights import save_weights
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

pytestmark = pytest.mark.slow

EVIL = "<script>alert('$x$')</script> & \"co\""
CLASSES = ("cat", EVIL.replace("/", "\u2215"), "fish")
CHARTS = {
    "mixmo": 11,  # 3 training, 2 calibration, risk, 2 members, confusion, 2 filters
    "vanilla": 9,
    "ensemble": 11,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of classes with names that HTML and TeX would take amiss; a third is mislabelled."""
    root = write_image_folder(
        tmp_path_factory.mktemp("images") / "pets<b>", classes=CLASSES, num_train=64, num_test=40
    )
    for part, count in (("train", 64), ("test", 40)):
        for number in range(0, count, 3):
            files = [root / part / name / f"{number:03}.png" for name in CLASSES]
            contents = [file.read_bytes() for file in files]
            for file, other in zip(files, contents[1:] + contents[:1], strict=True):
                file.write_bytes(other)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """A MixMo run, a vanilla one and a deep ensemble, all trained for too short."""
    kinds = {
        "mixmo": [],
        "vanilla": ["model.num_members=1", "mix.kind=sum", "mix.batch_repetitions=1"],
        "ensemble": [
            "model.num_nets=2",
            "model.num_members=1",
            "mix.kind=sum",
            "mix.batch_repetitions=1",
        ],
    }
    made = {}
    for name, changes in kinds.items():
        settings = {"model.arch": "wrn10_1", "train.epochs": 1, "train.batch_size": 32}
        always = ["data.valid_split=0.3", "train.device=cpu", "data.augmix=false"]
        recipe = resolve_recipe(str(images), None, settings, [*always, *changes])
        run = create_run(recipe, tmp_path_factory.mktemp("runs") / f"{name} <i>")
        train_run(prepare(recipe), run)
        made[name] = run
    return made


@pytest.fixture(scope="module")
def findings(runs):
    return {name: collect_report_data(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def pages(findings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, found in findings.items():
        (folder / f"{name}.html").write_text(render(found), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in findings}


TILES = {"three": 3, "four": 4, "five": 5, "six": 6, "validation only": 4}


@pytest.fixture(scope="module")
def tiled_pages(findings, tmp_path_factory):
    """Pages with three to six tiles, by their name in `TILES`."""
    folder, made = tmp_path_factory.mktemp("tiles"), {}
    for name, num_tiles in TILES.items():
        found = with_tiles(findings["vanilla" if num_tiles == 3 else "mixmo"], num_tiles)
        if name == "validation only":
            found = validation_only(findings["mixmo"])
        made[name] = folder / f"{name.replace(' ', '-')}.html"
        made[name].write_text(render(found), encoding="utf-8")
    return made


def with_tiles(found, num_tiles):
    """Findings that have a number of tiles: accuracy, NLL and ECE, and up to three others."""
    metrics = {k: v for k, v in found.metrics.items() if k not in ("calibrated", "cross_fitted")}
    recipe = found.recipe
    if num_tiles >= 5:
        scaled = {"nll": 1.0, "ece": 0.02, "brier": 0.1, "temperature": 1.0, "num_images": 57}
        metrics["calibrated"] = {**scaled, "temperature_error": 0.3}
    if num_tiles >= 6:
        recipe = replace(recipe, expected=Expected(accuracy=0.9, source="Table 1", arch="wrn28_10"))
    return replace(found, metrics=metrics, recipe=recipe)


def validation_only(found):
    """Findings of a run without test images whose validation images are too few to calibrate."""
    reason = "there are no labelled test images beside the validation images"
    metrics = {k: v for k, v in with_tiles(found, 4).metrics.items() if k != "valid"}
    metrics["valid"] = metrics.pop("test")
    metrics["absent"] = {"calibrated": reason, "cross_fitted": "it takes 100 images or more"}
    metrics = {k: v for k, v in metrics.items() if not k.startswith("test_")}
    return replace(
        found,
        metrics=metrics,
        num_images=(len(found.labels), 0),
        calibrated=None,
        calibration=f"{reason}; it takes 100 images or more",
    )


class Elements(HTMLParser):
    """The elements of a page, and whether each is closed by its own end."""

    VOID = ("meta", "link", "img", "path", "use", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.mark.parametrize("kind", CHARTS)
class TestPage:
    def test_is_well_formed(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        assert elements.open == []
        names = [attrs["id"] for _, attrs in elements.found if "id" in attrs]
        assert len(names) == len(set(names))

    def test_every_drawing_has_words(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        plots, pictures = elements.of("svg"), elements.of("img")
        assert len(plots) == CHARTS[kind]
        assert all(len(d["aria-label"]) > 30 and d["role"] == "img" for d in plots)
        assert pictures
        assert all(len(picture["alt"]) > 20 for picture in pictures)

    def test_names_nothing_outside(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        places = [a[k] for _, a in elements.found for k in ("href", "src") if k in a]
        assert all(place.startswith(("#", "data:")) for place in places)
        assert elements.of("script") == []
        targets = {place for place in places if place.startswith("#")}
        assert targets <= {f"#{a['id']}" for _, a in elements.found if "id" in a}
        text = pages[kind].read_text(encoding="utf-8")
        assert "http:" not in text
        assert "https:" not in text

    def test_names_are_escaped_and_shown(self, pages, kind):
        elements = Elements(pages[kind].read_text(encoding="utf-8"))
        assert CLASSES[1] in elements.text
        assert elements.of("b") == elements.of("i") == []

    def test_figures_are_those_of_the_evaluation(self, pages, findings, kind):
        text, test = Elements(pages[kind].read_text(encoding="utf-8")).text, findings[kind].metrics
        assert f"{100 * test['test']['accuracy']:.2f}\u00a0%" in text
        assert f"{test['test']['nll']:.4f}" in text
        assert "nan" not in text.lower().replace("nan.jpg", "")

    def test_a_number_stays_with_its_percent_sign(self, pages, kind):
        text = pages[kind].read_text(encoding="utf-8")
        assert "\u00a0%" in text
        assert not re.search(r"\d %", text)

    def test_convolutions_are_named(self, pages, findings, kind):
        text = Elements(pages[kind].read_text(encoding="utf-8")).text
        assert all(name in text for name in findings[kind].uses[0].layers)


def test_one_member_has_no_members_to_show(pages):
    text = Elements(pages["vanilla"].read_text(encoding="utf-8")).text
    assert "The network has one member" in text
    assert "Ratio of errors" not in text


def test_the_most_confident_mistakes_come_first(findings):
    found = findings["mixmo"]
    confidence = found.logits.softmax(1).amax(1)
    wrong = found.logits.argmax(1) != found.labels
    assert wrong.any()
    shown = [mistake.confidence for mistake in found.mistakes]
    assert shown == sorted(confidence[wrong].tolist(), reverse=True)[:12]
    for mistake in found.mistakes:
        assert mistake.label != mistake.predicted
        assert mistake.label in mistake.name  # its file lies in the folder of its class


def test_the_learning_rate_is_the_one_trained_with(findings):
    found = findings["mixmo"]
    epochs, rates = zip(*found.rates, strict=True)
    assert epochs[0] == 0
    assert epochs[-1] == 1
    assert max(rates) == pytest.approx(found.recipe.lr, rel=1e-3)
    assert rates[-1] == pytest.approx(found.histories[0][-1]["lr"], abs=found.recipe.lr / 50)


def test_a_perfect_network_without_history_has_a_report(tmp_path, images, monkeypatch):
    recipe = resolve_recipe(
        str(images), None, {"model.arch": "wrn10_1"}, ["data.valid_split=0", "train.device=cpu"]
    )
    run = create_run(recipe, tmp_path / "imported")
    save_weights(create_model("wrn10_1", 3, 2, 3), run)
    (run.path / "environment.json").unlink()

    def all_right(self, loaders):
        labels = self.source.test.labels
        logits = 50.0 * torch.nn.functional.one_hot(labels, 3).float()
        return None, (logits[:, None].expand(-1, 2, -1), labels)

    monkeypatch.setattr("mixmo_fastai.evaluation.runs.FinishedRun.logits", all_right)
    text = Elements(render(collect_report_data(run))).text
    for words in (
        "The run has no history.csv",
        "After temperature scaling",
        "no temperature is optimal",
        "Every image is classified correctly.",
        "None: every image is classified correctly",
        "The run has no environment.json",
        "Failure AUROC undefined",
    ):
        assert words in text


def test_a_training_without_validation_split(runs, findings):
    found = findings["mixmo"]
    rows = [
        {k: v for k, v in row.items() if "valid" not in k and "acc" not in k}
        for row in found.histories[0]
    ]
    none = replace(found, histories=[rows], num_images=(0, 120))
    elements = Elements(render(none))
    assert "There is no validation accuracy" in elements.text
    assert len(elements.of("svg")) == CHARTS["mixmo"] - 1


@pytest.mark.parametrize("text", ["epoch,images_seen\n1,many\n", "epoch,lr\n1,0.1\n"])
def test_a_damaged_history_is_refused(runs, text, capsys):
    path = runs["vanilla"].path / "history.csv"
    before = path.read_text()
    path.write_text(text)
    try:
        assert program(["report", str(runs["vanilla"].path)]) == 2
        assert "history.csv is damaged" in capsys.readouterr().err
    finally:
        path.write_text(before)


class TestCommand:
    def test_writes_into_the_run(self, runs, capsys):
        assert program(["report", str(runs["mixmo"].path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["report"] == str(runs["mixmo"].report)
        first = runs["mixmo"].report.read_text(encoding="utf-8")
        assert first.startswith("<!doctype html>")
        assert program(["report", str(runs["mixmo"].path)]) == 0  # made anew

    def test_writes_elsewhere_and_never_over_a_file(self, runs, tmp_path, capsys):
        place = tmp_path / "page.html"
        assert program(["report", str(runs["vanilla"].path), "--out", str(place)]) == 0
        text = place.read_text(encoding="utf-8")
        assert not runs["vanilla"].report.exists()
        assert program(["report", str(runs["vanilla"].path), "--out", str(place)]) == 2
        assert place.read_text(encoding="utf-8") == text
        assert "exists and was not changed" in capsys.readouterr().err

    def test_a_run_without_weights_is_refused(self, images, tmp_path, capsys):
        recipe = resolve_recipe(str(images), None, {"model.arch": "wrn10_1"})
        run = create_run(recipe, tmp_path / "empty")
        assert program(["report", str(run.path)]) == 2
        assert "has no weights yet" in capsys.readouterr().err
        assert not run.report.exists()


def line(figure):
    figure.subplots().plot([1, 2], color=INCORRECT)


class TestDrawing:
    def test_names_and_colours_are_the_page_s(self):
        svg = Plot(line, "own", "Words").svg()
        assert "var(--incorrect)" in svg
        assert "#0101" not in svg
        names = re.findall(r' id="([^"]+)"', svg)
        assert names
        assert all(name.startswith("own-") for name in names)
        for target in re.findall(r"url\(#([^)]+)\)", svg) + re.findall(r'href="#([^"]+)"', svg):
            assert target in names

    def test_text_is_escaped(self):
        svg = Plot(lambda figure: figure.text(0.5, 0.5, EVIL), "own", EVIL).svg()
        assert "<script" not in svg
        assert "alert" in svg
        assert "$x$" in svg  # not TeX

    def test_equal_drawings_are_equal_texts(self):
        assert Plot(line, "own", "Words").svg() == Plot(line, "own", "Words").svg()

    def test_a_picture_has_the_colours_of_the_light_page(self):
        css = (files("mixmo_fastai.report") / "page.css").read_text(encoding="utf-8")
        light = dict(re.findall(r"(--[\w-]+): (#\w+)", css.partition("@media")[0]))
        assert tuple(light[variable[4:-1]] for variable in PLACEHOLDER_COLORS.values()) == LIGHT
        picture = Image.open(io.BytesIO(Plot(line, "own", "Words").png("Title"))).convert("RGB")
        colors = {color for _, color in picture.getcolors(maxcolors=2**16)}
        for wanted in (light["--paper"], light["--incorrect"], light["--ink"]):
            assert ImageColor.getrgb(wanted) in colors, wanted


def test_words_of_a_reliability_diagram():
    logits = torch.tensor([[4.0, 0.0]] * 10)  # 98.2 % sure, nine times right
    labels = torch.tensor([0] * 9 + [1])
    chart = reliability("own", "Title", logits, labels, caption="")
    assert "ECE 8.20 %" in chart.svg
    assert "8.20 points above the accuracy" in chart.svg


@pytest.mark.parametrize(
    ("num_right", "word", "other"), [(9, "overconfident", "under"), (10, "underconfident", "over")]
)
def test_a_caption_says_on_which_side_the_confidence_errs(num_right, word, other):
    logits = torch.tensor([[4.0, 0.0]] * 10)  # 98.2 % sure
    labels = torch.tensor([0] * num_right + [1] * (10 - num_right))
    caption = reliability("own", "Title", logits, labels, caption="").caption
    assert f"{word} on average" in caption
    assert f"{other}confident" not in caption


@pytest.mark.parametrize(("num_lone", "faint"), [(1, True), (9, True), (10, False)])
def test_bins_of_few_images_are_faint(num_lone, faint):
    logits = torch.tensor([[4.0, 0.0]] * 30 + [[0.5, 0.0]] * num_lone)
    labels = torch.tensor([0] * 30 + [1] * num_lone)
    chart = reliability("own", "Title", logits, labels, caption="")
    figure = Figure()
    chart.plot.draw(figure)
    alphas = {round(bar.get_x(), 2): bar.get_alpha() for bar in figure.axes[0].patches}
    assert alphas[round(14 / 15, 2)] > 0.5
    assert (alphas[round(9 / 15, 2)] < 0.2) == faint
    assert ("fewer than 10 images are faint" in chart.caption) == faint


@pytest.mark.parametrize("num_images", [5, 10, 15])
def test_a_reliability_diagram_fills_its_figure(num_images):
    """Also if all of its bins, or none of them, are faint."""
    logits = torch.tensor([[4.0, 0.0]] * num_images)
    chart = reliability("own", "Title", logits, torch.zeros(num_images).long(), caption="")
    figure = Figure(figsize=chart.plot.size, layout="constrained")
    chart.plot.draw(figure)
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().height > 0.55


def tiles_of(found):
    text = render(found)
    return re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd><dd class=\"aside\">(.*?)</dd>", text)


@pytest.mark.parametrize("num_tiles", [4, 6])
def test_a_published_figure_has_a_tile_only_if_there_is_one(findings, num_tiles):
    found = with_tiles(findings["mixmo"], num_tiles)
    tiles = {label: value for label, value, _ in tiles_of(found)}
    assert len(tiles) == num_tiles
    assert tiles.get("Published") == ("90.00\u00a0%" if num_tiles == 6 else None)
    assert ("Published:" in Elements(render(found)).text) == (num_tiles == 6)


@pytest.mark.parametrize(("error", "marked"), [(0.099, False), (0.3, True)])
def test_the_tile_of_an_unreliable_temperature_says_so(findings, error, marked):
    found = with_tiles(findings["mixmo"], 5)
    found.metrics["calibrated"]["temperature_error"] = error
    (remark,) = [aside for label, _, aside in tiles_of(found) if label == "ECE, calibrated"]
    assert remark.startswith("unreliable") == marked
    assert ("30\u00a0%" in remark) == marked


def colors_of(svg):
    return {
        name for name in ("ensemble", "members", "correct", "incorrect") if f"var(--{name})" in svg
    }


def test_a_color_has_one_meaning(findings):
    """Blue is the ensemble, and members, right and wrong have colours of their own."""
    found = findings["mixmo"]
    charts_of = {
        chart.plot.name: colors_of(chart.svg)
        for section in sections(found)
        for chart in section.charts
    }
    assert charts_of == {
        "loss": {"ensemble"},  # of validation; that of training is of the colour of the text
        "validation-accuracy": {"ensemble", "members"},
        "learning-rate": set(),
        "reliability-before": {"ensemble"},
        "reliability-after": {"ensemble"},
        "risk": {"ensemble"},
        "members": {"ensemble", "members"},
        "agreement": {"correct", "incorrect"},
        "confusion": {"correct", "incorrect"},
        "filters": set(),
        "encoders": {"members"},
    }
    text = render(found)
    assert all(f'style="background: var(--{name})"' in text for name in ("ensemble", "incorrect"))


def test_axes_of_fractions_are_in_percent(findings):
    for section in sections(findings["mixmo"]):
        for chart in section.charts:
            if chart.plot.name in ("loss", "learning-rate", "encoders", "confusion"):
                continue
            texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
            assert any(re.fullmatch(r"[\d.]+ %", text) for text in texts), chart.title
            assert not any(re.fullmatch(r"0\.\d+", text) for text in texts), chart.title


def test_a_temperature_of_too_few_images_has_a_remark(findings):
    found = findings["mixmo"]
    calibrated = dict.fromkeys(("nll", "ece", "brier", "temperature"), 1.0)
    for error, remarked in ((0.099, False), (0.101, True)):
        metrics = {**found.metrics, "calibrated": {**calibrated, "temperature_error": error}}
        metrics["calibrated"]["num_images"] = 57
        metrics.pop("cross_fitted", None)
        text = render(replace(found, metrics=metrics))
        assert ("too few images: 57" in text) == remarked


def test_many_classes_have_two_tables(findings):
    found = findings["mixmo"]
    random = torch.Generator().manual_seed(0)
    names = tuple(f"class {number}" for number in range(30))
    logits = torch.randn(300, 2, 30, generator=random).double()
    labels = torch.arange(300) % 30
    many = replace(
        found, classes=names, member_logits=logits, labels=labels, calibrated=logits.mean(1)
    )
    (confusion,) = [section for section in sections(many) if section.name == "confusion"]
    assert confusion.charts == []
    pairs, worst = confusion.tables
    assert len(pairs.rows) == len(worst.rows) == 15
    accuracy = (many.logits.argmax(1) == labels).view(10, 30).double().mean(0)
    assert worst.rows[0][2] == f"{100 * float(accuracy.min()):.2f} %"


def test_words_of_the_agreement():
    members = torch.tensor(
        [[[3.0, 0], [0, 1]], [[2, 0], [1, 0]], [[2, 0], [1, 0]], [[0, 1], [0, 1]]]
    )
    chart = agreement(members, torch.tensor([1, 0, 1, 1]), "member")
    assert "2 of 2 on 75.00 % of the images, 66.67 % of them correct" in chart.svg
    assert "1 of 2 on 25.00 % of the images, 0.00 % of them correct" in chart.svg


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_the_pixels(channels):
    import base64

    import numpy as np

    pixels = torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8)
    address = as_data_uri(pixels)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    assert image.shape[:2] == (64, 64)  # eight times
    small = image[::8, ::8].reshape(8, 8, min(channels, 3))
    np.testing.assert_array_equal(small.transpose(2, 0, 1), pixels[:3])


@needs_chromium
class TestInChromium:
    def test_opens_without_a_word_and_asks_for_nothing(self, pages):
        with Page(pages["mixmo"]) as page:
            assert page.console() == []
            assert page.requests() == [pages["mixmo"].resolve().as_uri()]

    def test_every_figure_is_drawn(self, pages):
        with Page(pages["mixmo"]) as page:
            sizes = page.ask(
                "[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight,"
                " [...s.querySelectorAll('path')].filter(p => p.getBBox().width > 0).length])"
            )
            assert len(sizes) == CHARTS["mixmo"]
            assert all(w > 200 and h > 80 and paths > 4 for w, h, paths in sizes)
            drawn = page.ask("[...document.images].map(i => i.complete && i.naturalWidth)")
            assert len(drawn) == 12
            assert all(width >= 64 for width in drawn)

    def test_text_lies_within_its_drawing(self, pages):
        with Page(pages["ensemble"]) as page:
            outside = page.ask(
                "[...document.querySelectorAll('svg text')].filter(t => {"
                " const a = t.getBoundingClientRect(),"
                " b = t.closest('svg').getBoundingClientRect();"
                " return a.left < b.left - 4 || a.right > b.right + 4 })"
                ".map(t => t.textContent)"
            )
            assert outside == []

    @pytest.mark.parametrize("width", [320, 390, 768])
    def test_a_narrow_window_needs_no_sideways_scrolling(self, pages, width):
        with Page(pages["mixmo"], width=width) as page:
            assert page.ask("document.documentElement.scrollWidth") <= width
            tables = "[...document.querySelectorAll('table')]"
            outside = (
                f"{tables}.filter(t => t.scrollWidth > t.parentElement.clientWidth + 1).length"
            )
            assert page.ask(outside) == 0

    @pytest.mark.parametrize("kind", [*TILES, *CHARTS])
    @pytest.mark.parametrize("width", [390, 768, 1280])
    def test_no_row_of_tiles_has_a_gap(self, pages, tiled_pages, kind, width):
        num_tiles, path = TILES.get(kind), {**pages, **tiled_pages}[kind]
        with Page(path, width=width) as page:
            grid, *tiles = page.ask(
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
    def test_the_word_undefined_is_not_broken(self, tiled_pages, width):
        with Page(tiled_pages["validation only"], width=width) as page:
            (height, line) = page.ask(
                "(cell => { const r = document.createRange(), t = cell.firstChild;"
                " r.setStart(t, 0); r.setEnd(t, 9);"
                " return [r.getClientRects().length, r.toString()] })"
                "(document.querySelector('#calibration .card td'))"
            )
        assert (height, line) == (1, "Undefined")

    @pytest.mark.parametrize("kind", [*CHARTS, "validation only"])
    @pytest.mark.parametrize("width", [768, 1280])
    def test_no_half_of_a_row_is_empty(self, pages, tiled_pages, kind, width):
        with Page({**pages, **tiled_pages}[kind], width=width) as page:
            rows = page.ask(
                "[...document.querySelectorAll('.charts')].map(grid => [grid.children.length,"
                " getComputedStyle(grid).gridTemplateColumns.split(' ').length])"
            )
            assert len(rows) >= 5
            for cells, in_a_row in rows:
                assert in_a_row == 2
                assert cells % in_a_row == 0

    def test_light_dark_and_print(self, pages):
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        text = "getComputedStyle(document.querySelector('svg text')).fill"
        line = "getComputedStyle(document.querySelector('svg g[id*=line2d] path')).stroke"
        seen = {}
        with Page(pages["mixmo"]) as page:
            for dress in ("light", "dark"):
                page.dress(dress)
                seen[dress] = [page.ask(part) for part in (paper, text, line)]
            page.dress("dark", media="print")
            seen["print"] = [page.ask(part) for part in (paper, text, line)]
        assert seen["light"][0] == seen["print"][0] == "rgb(255, 255, 255)"
        assert seen["print"][1] == "rgb(0, 0, 0)"
        assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))

    def test_names_do_nothing(self, pages):
        with Page(pages["mixmo"]) as page:
            assert page.ask("document.querySelectorAll('script').length") == 0
            shown = page.ask("document.body.innerText")
            assert CLASSES[1] in shown
