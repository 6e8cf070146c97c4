"""docs/evaluation.md and the table of a run folder name what commands write."""

import io
import json
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pages import TEXTS, names_in, prose, table
from small_data import write_image_folder

from mixmo_fastai.cli.program import run
from mixmo_fastai.data.corruptions import BUILT_IN
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.evaluation.splits import MIN_IMAGES_FOR_TEMPERATURE
from mixmo_fastai.metrics.summary import evaluate_logits


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Return a finished run and the JSON output of the commands that read it."""
    folder = tmp_path_factory.mktemp("small")
    path, images = folder / "run", folder / "images"
    arguments = ["--arch", "wrn10_1", "--limit", "48", "--batch-size", "16", "--device", "cpu"]
    assert run(["fit", *arguments, "--epochs", "1", "--quiet", "--out", str(path)]) == 0
    write_image_folder(images, classes=("a", "b"), num_train=4, num_test=4)
    np.save(folder / "counts.npy", np.ones((len(load_source("digits").test), 10)))
    options = ["--ood", str(images), "--corruptions", "built-in"]
    options += ["--label-distribution", str(folder / "counts.npy")]
    return {
        "folder": path,
        "eval": as_json("eval", path, *options),
        "fused": as_json("eval", path, "--fused"),
        "predict": as_json("predict", path, images),
        "report": as_json("report", path),
    }


def as_json(*arguments):
    text = io.StringIO()
    with redirect_stdout(text):
        assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(text.getvalue())


def keys_of(metrics):
    for key, value in metrics.items() if isinstance(metrics, dict) else ():
        yield key
        yield from keys_of(value)


DOCUMENTED = set(names_in(prose(TEXTS["evaluation.md"])))


RANGES = {
    name: row["range"]
    for row in table("evaluation.md", "key", "range")
    for name in names_in(row["key"])
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eval", "fused"])
def test_every_key_of_eval_is_documented(small_run, kind):
    keys = set(keys_of(small_run[kind]))
    assert ("absent" in keys) == (kind == "fused")
    assert keys <= DOCUMENTED, keys - DOCUMENTED
    assert set(BUILT_IN) <= DOCUMENTED


@pytest.mark.slow
def test_every_key_of_metrics_json_is_documented(small_run):
    metrics = json.loads((small_run["folder"] / "metrics.json").read_text())
    assert set(keys_of(metrics)) <= DOCUMENTED


def test_tables_of_metrics_list_all_keys_of_eval(small_run):
    metrics = small_run["eval"]
    assert set(metrics["test"]) <= RANGES.keys()
    assert set(metrics["ood"]["entropy"]) <= RANGES.keys()
    assert set(metrics["label_distribution"]["intervals"]) <= RANGES.keys()
    top_level = {
        name for row in table("evaluation.md", "key", "meaning") for name in names_in(row["key"])
    }
    not_in_every_run = {"absent", "valid_mean_probabilities"}
    assert set(metrics) | not_in_every_run == top_level


def confident_metrics(is_correct):
    """Compute the metrics of two confident members, all correct or all incorrect."""
    labels = torch.arange(8) % 6
    logits = 100 * torch.nn.functional.one_hot(labels if is_correct else (labels + 1) % 6, 6)
    member_logits = torch.stack([logits, logits.flip(0)], dim=1).float()
    return evaluate_logits(torch.stack([logits, logits], dim=1).float(), labels) | {
        "mutual_information": evaluate_logits(member_logits, labels)["mutual_information"]
    }


def test_metrics_are_in_their_ranges_and_reach_the_ends(small_run):
    ends = {"0 to 1": (0, 1), "0 to 2": (0, 2), "0 to ∞": (0, math.inf), "as above": (0, math.inf)}
    ends |= {"0 to log M": (0, math.log(2)), "0.001 to 1000": (0.001, 1000)}
    parts = [small_run["eval"][name] for name in ("test", "valid", "test_mean_probabilities")]
    values_by_name = {}
    for part in (*parts, confident_metrics(is_correct=True), confident_metrics(is_correct=False)):
        for name, values in part.items():
            if name != "absent":
                values_by_name.setdefault(name, []).extend(
                    values if isinstance(values, list) else [values]
                )
    for name, values in values_by_name.items():
        low, high = ends[RANGES[name]]
        assert low - 1e-9 <= min(values), name
        assert max(values) <= high + 1e-9, name
    for name in ("accuracy", "brier", "ece", "aurc", "risk_at_90", "temperature"):
        assert max(values_by_name[name]) == pytest.approx(ends[RANGES[name]][1]), name


def test_columns_of_predictions_are_documented(small_run):
    rows = [names_in(row["column"])[0] for row in table("evaluation.md", "column", "meaning")]
    optional = ["set", "decision", "familiar"]  # with flags
    assert rows == [*small_run["predict"]["predictions"][0], *optional]
    assert set(small_run["predict"]) - {"predictions"} <= DOCUMENTED


def test_files_of_a_run_folder_are_documented(small_run):
    rows = {
        name for row in table("recipes.md", "file", "content") for name in names_in(row["file"])
    }
    names = {path.name + "/" * path.is_dir() for path in small_run["folder"].iterdir()}
    assert names == rows - {
        "net-1/",
        "net-2/",
        "logs/",
        "left-out.json",
        "split.json",
    }  # not in every run


def test_min_images_for_a_temperature_is_documented():
    rows = table("evaluation.md", "use it")
    assert f"{MIN_IMAGES_FOR_TEMPERATURE} images" in rows[0]["$T$ is fitted on"]
    assert f"{2 * MIN_IMAGES_FOR_TEMPERATURE} images" in rows[1]["$T$ is fitted on"]
