"""Metrics as lines of text, for those of a run in studies/."""

import json
from pathlib import Path

import pytest

from mixmo_fastai.cli.render_metrics import metric_lines
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.evaluation.results import temperature_warning

STUDY = Path(__file__).resolve().parents[1] / "studies" / "small-cifar10"


@pytest.fixture
def metrics():
    return json.loads((STUDY / "runs/cut-mixmo-1500000-seed0/metrics.json").read_text())


def labels(metrics, **options):
    lines = metric_lines(metrics, load_recipe("small-cifar10/cut-mixmo"), **options)
    return [line.partition("  ")[0].strip() for line in lines]


BRIEF = ["Test accuracy", "Members", "Expected", "NLL", "ECE", "Disagreement", "95 % CI"]


@pytest.mark.parametrize(
    ("calibration", "last"),
    [
        (None, "Cross-fitted"),
        ({"method": "temperature", "temperature": 1.5}, "Calibrated"),
        ({"method": "none", "temperature": None, "num_images": 4, "reason": "few"}, "Calibration"),
    ],
)
def test_a_training_ends_with_the_main_metrics_and_one_line_on_calibration(
    metrics, calibration, last
):
    if calibration:
        metrics["calibration"] = calibration
        metrics["calibrated"] = {"nll": 1.0, "ece": 0.1, "temperature": 1.5}
    metrics["intervals"] = {"accuracy": [0.6, 0.7]}
    assert labels(metrics, is_brief=True) == [*BRIEF, last]


def test_evaluation_shows_all(metrics):
    shown = labels(metrics)
    assert {*labels(metrics, is_brief=True)} < {*shown}
    assert {"Brier", "TACE", "Failure AUROC", "Ratio of errors", "Mean probabilities"} < {*shown}


@pytest.mark.parametrize("is_brief", [True, False])
def test_balanced_accuracy_is_shown_where_it_differs_from_accuracy(metrics, is_brief):
    accuracy = metrics["test"]["accuracy"]
    for same in (accuracy, accuracy + 1e-9):  # summed in another order
        metrics["test"]["balanced_accuracy"] = same
        assert "Balanced accuracy" not in labels(metrics, is_brief=is_brief)
    metrics["test"]["balanced_accuracy"] = accuracy - 0.01
    assert labels(metrics, is_brief=is_brief)[3] == "Balanced accuracy"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (0.1, ""),
        (0.1004, "a standard error of 10.1 % (at most 10 %)."),
        (0.104, "a standard error of 10.4 % (at most 10 %)."),
        (0.3, "a standard error of 30 % (at most 10 %)."),
    ],
)
def test_an_uncertain_temperature_does_not_look_certain(error, expected):
    warning = temperature_warning({"num_images": 143, "temperature_error": error})
    assert warning.endswith(expected)
    assert bool(warning) == bool(expected)
