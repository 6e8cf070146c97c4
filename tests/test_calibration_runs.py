"""Calibration of a run, as used by predict, eval and export."""

import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import TIMEOUT
from short_runs import train_for_calibration, write_digits

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.evaluation.runs import evaluate_ensemble, evaluate_run, open_finished
from mixmo_fastai.evaluation.splits import evaluate_splits
from mixmo_fastai.export.files import load_fused
from mixmo_fastai.runs.calibration import (
    CALIBRATION,
    CALIBRATION_IMAGES,
    read_calibration,
)
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ASK_THE_PAGE = """
import json
import sys
from pathlib import Path
import gradio
from decide_in_the_browser import page
from gradio_client import Client, handle_file

opened = page(Path(sys.argv[1]))
try:
    opened.fn(None)
except gradio.Error as error:
    assert "Choose an image." in str(error)
else:
    raise AssertionError("no image is accepted")
client = Client(opened.launch(prevent_thread_lock=True, quiet=True)[1], verbose=False)
for path in sys.argv[2:]:
    try:
        print(json.dumps(client.predict(handle_file(path), api_name="/decide")))
    except Exception:
        print("refused")
"""
"""Opens the page in another process, since the library leaves event loops behind."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose validation images are calibration images, and whose network is overconfident."""
    settings = ("data.valid_split=0.4", "data.limit=400")
    return train_for_calibration(tmp_path_factory.mktemp("runs") / "run", *settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    test = write_digits(folder, 40)
    return folder, test.labels[:40]


def predict(capsys, *arguments):
    assert program(["predict", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["predictions"]


@pytest.mark.slow
class TestRun:
    def test_fit_stores_a_calibration_and_evaluates_it(self, run, capsys):
        stored, metrics = read_calibration(run), run.metrics()
        assert len(stored.names) == metrics["calibration"]["num_images"] > 500
        assert metrics["calibration"]["temperature"] == pytest.approx(stored.scaling.temperature)
        # The whole validation split, as "calibrated".
        assert metrics["calibrated"]["temperature"] == pytest.approx(stored.scaling.temperature)
        assert program(["eval", str(run.path), "--json", "--coverage", "0.95"]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert evaluated["sets"]["requested_coverage"] == 0.95
        again = program(["eval", str(run.path), "--json"]) or json.loads(capsys.readouterr().out)
        for key in ("calibration", "sets", "abstention"):
            assert again[key] == metrics[key], key
        assert metrics["sets"]["raps"]["interval"][1] > 0.9
        assert program(["eval", str(run.path)]) == 0
        shown = capsys.readouterr().out
        assert "Calibration          temperature " in shown
        assert "Sets, 90 %" in shown
        assert "Risk, 5 %" in shown

    def test_predictions_are_calibrated_unless_raw(self, run, images, capsys):
        folder, _ = images
        calibrated, raw = (predict(capsys, run.path, folder, *flags) for flags in ((), ("--raw",)))
        assert [each["label"] for each in calibrated] == [each["label"] for each in raw]
        temperature = read_calibration(run).scaling.temperature
        for row, other in zip(calibrated, raw, strict=True):
            assert (row["probability"] > other["probability"]) == (temperature < 1)
        assert "set" not in calibrated[0]
        assert "decision" not in calibrated[0]

    def test_sets_and_decisions(self, run, images, capsys):
        folder, _ = images
        flags = ("--coverage", "0.9", "--max-risk", "0.2", "--set-score", "lac")
        rows = predict(capsys, run.path, folder, *flags)
        assert {row["decision"] for row in rows} <= {"accept", "ask"}
        assert all(row["set"][0] == row["label"] for row in rows)
        threshold = read_calibration(run).abstain(0.2).threshold
        for row in rows:
            assert (row["decision"] == "accept") == (row["probability"] >= threshold)
        assert program(["predict", str(run.path), str(folder), *flags]) == 0
        table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["set"].split("|") for row in table] == [row["set"] for row in rows]
        assert list(table[0])[-2:] == ["set", "decision"]

    @pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
    def test_exported_files_give_the_same_sets(self, run, images, tmp_path, capsys, suffix):
        folder, _ = images
        path = tmp_path / f"net{suffix}"
        assert program(["export", str(run.path), "--to", str(path)]) == 0
        assert "the logits contain the temperature" in capsys.readouterr().out
        for flags in (
            ("--coverage", "0.9"),
            ("--coverage", "0.8", "--set-score", "aps", "--per-class"),
            ("--max-risk", "0.1"),
            ("--ood-threshold", "0.9"),
            ("--raw",),
        ):
            expected, found = (predict(capsys, each, folder, *flags) for each in (run.path, path))
            for row, other in zip(expected, found, strict=True):
                assert row["probability"] == pytest.approx(other["probability"], rel=1e-3)
                assert row.get("set") == other.get("set")
                assert row.get("decision") == other.get("decision")
                assert row.get("familiar") == other.get("familiar")
        for flags, message in (
            (("--coverage", "0.93"), "it has: 0.8, 0.9, 0.95, 0.99"),
            (
                ("--max-risk", "0.1", "--risk-score", "mutual-information"),
                "no thresholds for the score",
            ),
        ):
            assert program(["predict", str(path), str(folder), *flags]) == 2
            assert message in capsys.readouterr().err

    def test_app_without_torch_gives_the_same_sets(self, run, images, tmp_path, capsys):
        folder, _ = images
        path = tmp_path / "net.onnx"
        assert program(["export", str(run.path), "--to", str(path)]) == 0
        capsys.readouterr()
        expected = predict(capsys, run.path, folder, "--coverage", "0.9")
        app = runpy.run_path(str(EXAMPLES / "predict_with_onnxruntime.py"))
        arguments = ["app", str(path), *sorted(map(str, folder.iterdir()))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            app["main"]()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 40
        for line, row in zip(lines, expected, strict=True):
            assert line.endswith(f", 90 %: {' or '.join(row['set'])}")
            label, probability = line.split(": ")[1].split(", ")[:2]
            assert label == row["label"]
            assert float(probability.split()[1]) == pytest.approx(row["probability"], abs=1e-3)

    def test_page_in_the_browser_gives_the_same_decisions(self, run, images, tmp_path, capsys):
        folder, _ = images
        path = tmp_path / "net.safetensors"
        assert program(["export", str(run.path), "--to", str(path)]) == 0
        capsys.readouterr()
        rows = predict(capsys, path, folder, "--coverage", "0.9", "--max-risk", "0.1")[::10]
        broken = tmp_path / "broken.png"
        broken.write_text("no image")
        paths = [*(row["image"] for row in rows), str(broken)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
        asked = subprocess.run(
            [sys.executable, "-c", ASK_THE_PAGE, str(path), *paths],
            env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        *answers, refused = asked.stdout.splitlines()[-len(paths) :]
        assert len(answers) == 4
        for row, answer in zip(rows, answers, strict=True):
            label, decision, classes = json.loads(answer)
            (shown,) = label["confidences"]
            assert (label["label"], shown["label"]) == (row["label"], row["label"])
            assert shown["confidence"] == pytest.approx(row["probability"])
            assert decision.split()[0] == row["decision"]
            assert classes.split(" or ") == row["set"]
        assert "refused" in refused

    def test_raw_exports_have_the_logits_of_the_network(self, run, images, tmp_path, capsys):
        path = tmp_path / "net.safetensors"
        assert program(["export", str(run.path), "--to", str(path), "--raw"]) == 0
        assert "no: the logits are those of the network" in capsys.readouterr().out
        assert load_fused(path).calibration.in_logits is False
        for flags in ((), ("--raw",), ("--coverage", "0.9"), ("--ood-threshold", "0.9")):
            expected, found = (
                predict(capsys, each, images[0], *flags) for each in (run.path, path)
            )
            for row, other in zip(expected, found, strict=True):
                assert row["probability"] == pytest.approx(other["probability"], rel=1e-3)
                assert row.get("set") == other.get("set")
                assert row.get("familiar") == other.get("familiar")

    def test_calibrate_writes_it_again(self, run, images, tmp_path, capsys):
        copy = tmp_path / "copy"
        shutil.copytree(run.path, copy)
        before = {name: (copy / name).read_bytes() for name in (CALIBRATION, CALIBRATION_IMAGES)}
        for name in before:
            (copy / name).unlink()
        assert program(["predict", str(copy), str(images[0])]) == 0
        assert "no calibration is stored" in capsys.readouterr().err
        assert program(["calibrate", str(copy), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["method"] == "temperature"
        assert before == {name: (copy / name).read_bytes() for name in before}
        (copy / CALIBRATION).write_text("{")
        assert program(["predict", str(copy), str(images[0])]) == 2
        assert f"mixmo calibrate {copy}" in capsys.readouterr().err
        assert program(["calibrate", str(copy)]) == 0
        capsys.readouterr()
        assert before == {name: (copy / name).read_bytes() for name in before}
        assert program(["calibrate", str(copy), "--method", "vector"]) == 2
        error = capsys.readouterr().err
        assert "vector scaling needs 100 calibration images" in error
        assert "was not changed" in error
        assert before == {name: (copy / name).read_bytes() for name in before}
        assert program(["calibrate", str(copy), "--method", "none"]) == 0
        assert "none: calibration was not requested" in capsys.readouterr().out
        assert program(["calibrate", str(copy), "--method", "vector"]) == 0  # keeps thresholds
        capsys.readouterr()
        assert program(["calibrate", str(copy), "--method", "vectr"]) == 2
        assert "Did you mean 'vector'" in capsys.readouterr().err


@pytest.mark.slow
def test_images_that_select_the_epoch_do_not_calibrate(tmp_path):
    recipe = resolve_recipe(
        "digits",
        "digits/cut-mixmo",
        {"model.arch": "wrn10_1", "train.epochs": 1, "train.device": "cpu"},
        assignments=["data.valid_split=0.2", "data.limit=100", "train.select=best"],
    )
    training = prepare(recipe)
    assert training.recipe.data.calibration_split == 0.5
    selection = training.learn.dls.valid.images
    run = create_run(training.recipe, tmp_path / "run")
    train_run(training, run)
    names = read_calibration(run).names
    assert not set(names) & {selection.name(i) for i in range(len(selection))}
    assert abs(len(names) - len(selection)) <= 10

    # "calibrated" uses the same images, in fit, in eval and in an ensemble with a run that has none
    # set aside.
    metrics, temperature = run.metrics(), read_calibration(run).scaling.temperature
    assert metrics["calibrated"]["temperature"] == pytest.approx(temperature)
    assert metrics["calibrated"]["num_images"] == len(names)
    assert metrics["valid"]["temperature"] != pytest.approx(temperature)
    again = evaluate_run(run)
    assert again["calibrated"] == metrics["calibrated"]
    assert again["calibration"] == metrics["calibration"]
    plain = shutil.copytree(run.path, tmp_path / "plain")
    text = (plain / "recipe.toml").read_text().replace("calibration_split = 0.5\n", "")
    (plain / "recipe.toml").write_text(text.replace('select = "best"', 'select = "last"'))
    empty = open_finished(run)
    empty = replace(
        empty, recipe=replace(empty.recipe, data=replace(empty.recipe.data, calibration_split=0.0))
    )
    assert empty.is_separate
    validation, test, separate = empty.logits(empty.loaders())
    assert separate is None
    assert empty.fit_calibration(validation, separate) is None
    found = evaluate_splits(validation, test, separate=separate, is_separate=True)
    assert "calibrated" not in found  # and not by the images that selected the epoch
    assert "see data.calibration_split" in found["absent"]["calibrated"]
    both = evaluate_ensemble([RunFolder(plain), run])
    for key in ("calibrated", "calibration"):
        assert both[key]["num_images"] == len(names), key
    assert both["calibrated"]["temperature"] == pytest.approx(temperature)
