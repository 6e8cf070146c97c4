"""Reports of runs in which something cannot be measured."""

from dataclasses import replace

import pytest
from report_pages import Elements, images, reports, runs, validation_only

from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.report.page import render
from mixmo_fastai.report.report_data import collect_report_data
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

pytestmark = pytest.mark.slow

__all__ = ["images", "reports", "runs"]  # fixtures


def test_report_on_validation_images_names_them_and_their_calibration(reports):
    report = validation_only(reports["mixmo"])
    text = Elements(render(replace(report, decisions=None))).text
    assert "There are no labelled test images, on which what the calibration's sets" in text
    metrics = {name: value for name, value in report.metrics.items() if name != "calibration"}
    page = render(replace(report, decisions=None, metrics=metrics))
    assert "Without validation images, there is no calibration" in Elements(page).text
    alternatives = [image["alt"] for image in Elements(page).attributes_of("img")]
    assert all(each.startswith("Validation image ") for each in alternatives)


def test_class_names_in_another_encoding_are_shown(reports):
    """As of folders that are not named in UTF-8."""
    data = replace(reports["mixmo"], classes=("caf\udce9", "cat", "dog"))
    page = render(data)
    page.encode()  # a name that is no text would raise
    assert page.count(">caf?<") >= 3  # twice on the axes of the confusion matrix


def test_report_of_a_network_without_convolutions(tmp_path, images):
    """As a vision transformer, whose only convolution is the encoder."""
    recipe = resolve_recipe(
        str(images),
        None,
        {"model.arch": "timm/test_vit", "train.epochs": 1, "train.batch_size": 64},
        ["data.image_size=160", "data.limit=64", "train.device=cpu", "data.valid_split=0.3"],
    )
    run = create_run(recipe, tmp_path / "run")
    train_run(prepare(recipe), run)
    report = collect_report_data(run)
    assert (report.uses, report.norms) == ([], [])
    text = Elements(render(report)).text
    assert "The core has no convolution (nn.Conv2d); cannot compute filter use." in text
