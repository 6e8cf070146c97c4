"""`mixmo eval --save-logits`: names, labels and member logits as a file of NumPy."""

import json

import numpy as np
import pytest
import torch
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.runs.folder import open_run

FLAGS = ["--arch", "wrn10_1", "--batch-size", "8", "--epochs", "1", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_image_folder(folder)
    return folder


def saved(run, tmp_path, capsys, *flags):
    file = tmp_path / "logits.npz"
    capsys.readouterr()
    assert program(["eval", str(run), "--save-logits", str(file), "--json", *flags]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["logits"] == str(file)
    with np.load(file) as content:  # without pickled objects
        return metrics, dict(content)


@pytest.mark.parametrize(
    "method", [["--recipe", "digits/cut-mixmo"], ["--members", "1", "--set", "model.num_nets=2"]]
)
def test_the_metrics_follow_from_the_file(method, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*FLAGS, *method, "--limit", "64", "--out", str(run)]
    assert program(["fit", "digits", *flags]) == 0
    metrics, content = saved(run, tmp_path, capsys)
    logits, labels = content["logits"], content["labels"]
    assert (logits.dtype, labels.dtype) == (np.float32, np.int64)
    assert logits.shape == (len(labels), 2, 10)
    computed = evaluate_logits(torch.from_numpy(logits), torch.from_numpy(labels))
    for name in ("accuracy", "nll", "ece"):
        assert computed[name] == pytest.approx(metrics["test"][name], abs=1e-6)
    assert content["classes"].tolist() == [str(digit) for digit in range(10)]
    assert len(set(content["names"])) == len(labels)


def test_images_are_named_in_the_order_of_the_logits(images, tmp_path, capsys):
    run = tmp_path / "run"
    assert program(["fit", str(images), *FLAGS, "--out", str(run)]) == 0
    _, content = saved(run, tmp_path, capsys)
    finished = open_finished(open_run(run))
    assert content["classes"].tolist() == list(finished.source.classes)
    names = [finished.final_images.name(i) for i in range(len(finished.final_images))]
    assert content["names"].tolist() == names
    for name, label in zip(content["names"], content["labels"], strict=True):
        assert (images / name).is_file()
        assert content["classes"][label] in name.split("/")
    test = images / "test"
    assert program(["predict", str(run), str(test), "--json"]) == 0
    rows = {row["image"]: row for row in json.loads(capsys.readouterr().out)["predictions"]}
    votes = content["classes"][content["logits"].argmax(axis=2)]  # (N, M)
    for name, of_image in zip(names, votes.tolist(), strict=True):
        assert list(rows[str(images / name)]["votes"]) == of_image


def test_files_are_checked_before_the_evaluation(tmp_path, capsys):
    run = tmp_path / "run"
    assert program(["fit", "digits", *FLAGS, "--limit", "64", "--out", str(run)]) == 0
    (tmp_path / "there.npz").touch()
    for name, message in {
        "there.npz": "exists and was not changed. Choose another --save-logits",
        "logits.csv": "must end in .npz",
        "none/logits.npz": "There is no folder",
    }.items():
        assert program(["eval", str(run), "--save-logits", str(tmp_path / name)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    file = tmp_path / "logits.npz"
    assert program(["eval", str(run), "--save-logits", str(file)]) == 0
    assert f"Logits: {file}" in "".join(capsys.readouterr().out.split("\n"))
    assert file.is_file()
