"""Trained runs, the data of their reports, and the elements of a page."""

from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markupsafe import Markup
from small_data import write_image_folder

from mixmo_fastai.config.recipe import Expected
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.report.drawing import Plot
from mixmo_fastai.report.page import render
from mixmo_fastai.report.report_data import collect_report_data
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

UNESCAPED_NAME = "<script>alert('$x$')</script> & \"co\""
CLASSES = ("cat", UNESCAPED_NAME.replace("/", "\u2215"), "fish")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write images whose class names contain HTML and TeX markup; a third is mislabelled."""
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
    """Train a MixMo run, a vanilla run and a deep ensemble for one epoch."""
    changes_by_kind = {
        "mixmo": [],
        "vanilla": ["model.num_members=1", "mix.kind=sum", "mix.batch_repetitions=1"],
        "ensemble": [
            "model.num_nets=2",
            "model.num_members=1",
            "mix.kind=sum",
            "mix.batch_repetitions=1",
        ],
    }
    trained = {}
    for name, changes in changes_by_kind.items():
        settings = {"model.arch": "wrn10_1", "train.epochs": 1, "train.batch_size": 32}
        common = ["data.valid_split=0.3", "train.device=cpu", "data.augmix=false"]
        recipe = resolve_recipe(str(images), None, settings, [*common, *changes])
        run = create_run(recipe, tmp_path_factory.mktemp("runs") / f"{name} <i>")
        train_run(prepare(recipe), run)
        trained[name] = run
    return trained


@pytest.fixture(scope="module")
def reports(runs):
    return {name: collect_report_data(run) for name, run in runs.items()}


def with_tiles(report, num_tiles):
    """Change a report's data to have `num_tiles` tiles: accuracy, NLL, ECE and up to three more."""
    metrics = {k: v for k, v in report.metrics.items() if k not in ("calibrated", "cross_fitted")}
    recipe = report.recipe
    if num_tiles >= 5:
        scaled = {"nll": 1.0, "ece": 0.02, "brier": 0.1, "temperature": 1.0, "num_images": 57}
        metrics["calibrated"] = {**scaled, "temperature_error": 0.3}
    if num_tiles >= 6:
        recipe = replace(recipe, expected=Expected(accuracy=0.9, source="Table 1", arch="wrn28_10"))
    return replace(report, metrics=metrics, recipe=recipe)


def validation_only(report):
    """Change a report's data to have no test images and too few validation images to calibrate."""
    reason = "there are no labelled test images beside the validation images"
    metrics = {k: v for k, v in with_tiles(report, 4).metrics.items() if k != "valid"}
    metrics["valid"] = metrics.pop("test")
    metrics["absent"] = {"calibrated": reason, "cross_fitted": "it takes 100 images or more"}
    metrics = {k: v for k, v in metrics.items() if not k.startswith("test_")}
    return replace(
        report,
        metrics=metrics,
        num_images=(len(report.labels), 0),
        calibrated=None,
        calibration=f"{reason}; it takes 100 images or more",
    )


class Elements(HTMLParser):
    """Parse the elements of a page, and check that each has its end tag."""

    VOID = ("meta", "link", "img", "path", "use", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def attributes_of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


NUM_CHARTS = {
    "mixmo": 12,  # 3 training, 2 calibration, risk, decisions, 2 members, confusion, 2 filters
    "vanilla": 10,
    "ensemble": 12,
}


@pytest.fixture(scope="module")
def pages(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(render(report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


NUM_TILES = {"three": 3, "four": 4, "five": 5, "six": 6, "validation only": 4}


@contextmanager
def empty_plots():
    """Replace plots, which take nearly all of the time of a page, by empty <svg> elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "svg", lambda plot: Markup("<svg></svg>"))
        yield


@pytest.fixture(scope="module")
def tiled_pages(reports, tmp_path_factory):
    """Write pages with three to six tiles; return their paths by name in `NUM_TILES`.

    Only "validation only" has plots.
    """
    folder, paths = tmp_path_factory.mktemp("tiles"), {}
    for name, num_tiles in NUM_TILES.items():
        report = with_tiles(reports["vanilla" if num_tiles == 3 else "mixmo"], num_tiles)
        paths[name] = folder / f"{name.replace(' ', '-')}.html"
        if name == "validation only":
            text = render(validation_only(reports["mixmo"]))
        else:
            with empty_plots():
                text = render(report)
        paths[name].write_text(text, encoding="utf-8")
    return paths
