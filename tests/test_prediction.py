import csv
import io
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from exports import train_small_run
from PIL import Image
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.evaluation.predict import predict_images
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_network

CLASSES = ("cat", "dog", "fish")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(
        tmp_path_factory.mktemp("images") / "pets", classes=CLASSES, num_train=12, num_test=5
    )


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return train_small_run(images, tmp_path_factory.mktemp("runs") / "mixmo")


def test_predictions_equal_the_evaluation(run, images):
    """Predictions per file equal those for the loaders of `mixmo eval`."""
    finished = open_finished(run)
    _, test, _ = finished.loaders()
    network = load_network(run)
    logits, labels = collect_member_logits(network, test)
    predictions, unreadable = predict_images(run, [images / "test"])
    assert not unreadable
    assert [CLASSES[label] for label in labels] == [p.image.split("/")[-2] for p in predictions]
    for row, prediction in zip(logits.double().numpy(), predictions, strict=True):
        p = oracle.softmax(row.mean(0))
        assert prediction.label == CLASSES[p.argmax()]
        assert prediction.probability == pytest.approx(p.max(), abs=1e-5)
        votes = [CLASSES[member.argmax()] for member in row]
        assert list(prediction.votes) == votes
        assert prediction.agreement == np.mean([vote == prediction.label for vote in votes])
        assert prediction.entropy == pytest.approx(oracle.entropy(p), abs=1e-5)
        expected = oracle.mutual_information(row[None])
        assert prediction.mutual_information == pytest.approx(expected, abs=1e-5)


def test_training_images_are_not_needed(run, images, tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(next((images / "test/cat").iterdir()).read_bytes())
    hidden_images = images.rename(images.with_name("elsewhere"))
    try:
        assert len(predict_images(run, [image])[0]) == 1
        (run.path / "data.json").rename(run.path / "hidden.json")
        with pytest.raises(InputError, match="does not exist"):
            predict_images(run, [image])
    finally:
        hidden_images.rename(images)
        (run.path / "hidden.json").rename(run.path / "data.json")


@pytest.mark.slow
def test_votes_of_a_deep_ensemble_and_of_one_member(images, tmp_path):
    vanilla = {"model.num_members": 1, "mix.kind": "sum", "mix.batch_repetitions": 1}
    both = train_small_run(images, tmp_path / "both", **vanilla, **{"model.num_nets": 2})
    predictions, _ = predict_images(both, [images / "test/cat"])
    parts = [predict_images(n, [images / "test/cat"])[0] for n in both.networks()]
    for prediction, first, second in zip(predictions, *parts, strict=True):
        assert prediction.votes == (first.label, second.label)
        assert prediction.mutual_information is not None
        assert first.mutual_information is None
        assert (first.votes, first.agreement) == ((first.label,), None)


def test_unfinished_deep_ensemble_says_how_to_continue(run, images, tmp_path):
    """As `mixmo fit --nets 2` leaves it, without a folder for the first network."""
    ensemble = RunFolder(tmp_path / "two")
    shutil.copytree(run.path, ensemble.path / "net-2")
    shutil.copy(run.path / "data.json", ensemble.path)
    recipe = run.recipe()
    ensemble.write_recipe(replace(recipe, model=replace(recipe.model, num_nets=2)))
    message = "two has no weights yet: 1 of 2 networks are finished.\nContinue it: .*--resume"
    with pytest.raises(InputError, match=message):
        predict_images(ensemble, [images / "test/cat"])


def test_command_reports_unreadable_images_and_predicts_the_others(run, images, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    arguments = ["predict", str(run.path), str(images / "test/dog"), str(bad)]
    assert program(arguments) == 1
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["image"] for row in rows] == sorted(str(p) for p in (images / "test/dog").iterdir())
    assert {row["label"] for row in rows} <= set(CLASSES)
    assert all(len(row["votes"].split("|")) == 2 for row in rows)
    assert "1 of 6 images could not be read" in err
    assert "bad.png" in err
    assert program([*arguments, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert list(result["unreadable"]) == [str(bad)]
    assert len(result["predictions"]) == 5
    assert program([*arguments[:3], "--json"]) == 0


def test_too_large_images_have_advice(run, images, tmp_path, monkeypatch, capsys):
    for name in ("scan", "other"):
        Image.new("RGB", (90, 90)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    arguments = ["predict", str(run.path), str(images / "test/dog"), str(tmp_path / "scan.png")]
    arguments.append("--raw")
    assert program(arguments) == 1
    first, advice = capsys.readouterr().err.splitlines()
    assert "1 of 6 images" in first
    assert "smaller" in advice
    (tmp_path / "other.png").write_bytes(b"not an image")
    assert program([*arguments, str(tmp_path / "other.png")]) == 1
    assert "Save 1 of them smaller" in capsys.readouterr().err
    assert program([*arguments, "--json"]) == 1
    (reason,) = json.loads(capsys.readouterr().out)["unreadable"].values()
    assert "megapixels" in reason
    assert "smaller" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("path", "message"),
    [("none.png", "no image or folder 'none.png'"), ("empty", "No image was found")],
)
def test_missing_images_are_rejected(run, path, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert program(["predict", str(run.path), path]) == 2
    assert message in capsys.readouterr().err


def test_predictions_are_written_to_a_file(run, images, tmp_path, capsys):
    arguments = ["predict", str(run.path), str(images / "test")]
    assert program([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for name in ("all.csv", "all.JSON"):
        assert program([*arguments, "--out", str(tmp_path / name)]) == 0
        assert name in capsys.readouterr().out
    assert json.loads((tmp_path / "all.JSON").read_text()) == printed
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert [row["label"] for row in rows] == [p["label"] for p in printed["predictions"]]
    assert program([*arguments, "--out", str(tmp_path / "all.csv")]) == 2
    assert "exists and was not changed" in capsys.readouterr().err
    assert program([*arguments, "--out", str(tmp_path / "all.txt")]) == 2
    assert "must end in .csv or .json" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are texts there")
def test_file_names_of_any_bytes_are_written(run, images, tmp_path, capfdbinary):
    image, folder = next((images / "test/dog").iterdir()), tmp_path / "odd"
    names = [b"caf\xe9.png", "line\u2028separator.png".encode(), b'line\nfeed".png']
    folder.mkdir()
    for name in names:
        shutil.copy(image, os.path.join(os.fsencode(folder), name))
    assert program(["predict", str(run.path), str(folder), "--out", str(tmp_path / "a.csv")]) == 0
    text = (tmp_path / "a.csv").read_bytes().decode(errors="surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    found = sorted(os.fsencode(row["image"]).rpartition(b"/")[2] for row in rows)
    assert found == sorted(names)
    assert len({row["label"] for row in rows}) == 1


def test_images_are_predicted_in_several_batches(run, images, monkeypatch):
    expected, _ = predict_images(run, [images / "test"])
    monkeypatch.setattr("mixmo_fastai.evaluation.predict.IMAGES_AT_ONCE", 4)
    batched, _ = predict_images(run, [images / "test"])
    assert [p.label for p in batched] == [p.label for p in expected]
    assert torch.tensor([p.entropy for p in batched]).allclose(
        torch.tensor([p.entropy for p in expected]), atol=1e-5
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": ["a"]}', '{"classes": 3, "mean": 1}'])
def test_damaged_data_json_is_rejected(run, text, tmp_path, images):
    path = run.path / "data.json"
    before = path.read_text()
    path.write_text(text)
    try:
        with pytest.raises(InputError, match=r"data\.json is damaged"):
            predict_images(run, [images / "test"])
    finally:
        path.write_text(before)


@pytest.mark.slow
def test_inspect_one_run_and_two_runs(run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(run.path)
    assert program(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *1  core\.groups\.0\.0\.conv1 ", out, re.MULTILINE)
    assert "average" in out
    assert (tmp_path / "inspect-mixmo.png").read_bytes().startswith(b"\x89PNG")
    assert program(["inspect", path, path, "--out", "two.png", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["runs"]) == 2
    assert len(result["runs"][0]["encoder_norms"]) == 2
    assert len(result["runs"][0]["average"]) == len(result["runs"][0]["thresholds"]) == 4
    first = result["runs"][0]
    assert first["convolutions"][0] == {"number": 1, "module": "core.groups.0.0.conv1"}
    assert list(first["layers"]) == [convolution["module"] for convolution in first["convolutions"]]
    assert program(["inspect", path, path, path]) == 2
    assert "one or two runs" in capsys.readouterr().err
