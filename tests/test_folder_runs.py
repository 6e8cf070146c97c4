"""Runs on image folders: what trains, validates and tests is the same in every command."""

import json
import re
import shutil

import pytest
from datasets import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.runs.folder import open_run

TINY = (
    "--arch",
    "wrn10_1",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--repeat",
    "2",
    "--device",
    "cpu",
)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path_factory.mktemp("home")))


def classes_alone(root):
    """Write one folder per class, ten images each."""
    write_image_folder(root / "source", num_train=10, num_test=1, size=(16, 16))
    return (root / "source" / "train").rename(root / "pets")


def fit(folder, out, *flags):
    assert program(["fit", str(folder), *TINY, *flags, "--out", str(out)]) == 0
    return open_run(out)


def evaluated(run, capsys):
    capsys.readouterr()
    assert program(["eval", str(run.path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    return {name: figures[name] for name in ("test", "valid") if name in figures}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--members", "1"), (), ("--limit", "20")], ids=str)
def test_the_largest_batch_is_named_and_trains(tmp_path, flags, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=20 if flags else 6, size=(16, 16))
    words = ["fit", str(folder), "--arch", "wrn10_1", "--epochs", "1", "--device", "cpu", *flags]
    words += ["--batch-size", "128"] if "--limit" in flags else []
    assert program(words) == 2
    message = capsys.readouterr().err
    (size,) = re.findall(r"Lower the batch size: --batch-size (\d+) is the largest", message)
    assert ("Or raise --limit" in message) == ("--limit" in flags)
    assert ("each repeated 4 times" in message) == ("--members" not in flags)
    for wanted, code in ((int(size) + 4, 2), (int(size), 0)):
        out = str(tmp_path / f"run-{wanted}")
        assert program([*words, "--batch-size", str(wanted), "--out", out, "--quiet"]) == code


@pytest.mark.slow
def test_one_training_image_per_class_is_answered_with_what_trains(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "source", num_train=2) / "train"
    words = ["fit", str(folder), *TINY, "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert program(words) == 2
    message = capsys.readouterr().err
    assert "no class has two or more" in message
    assert "--valid-split 0." in message
    assert program([*words, "--valid-split", "0"]) == 0


@pytest.mark.slow
def test_a_drawn_test_set_is_that_of_every_command(tmp_path, capsys):
    folder = classes_alone(tmp_path)
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    plan = capsys.readouterr().out
    assert "12 training, 4 validation and 4 test images" in plan
    assert "20 % of each class, drawn once and stored with the run (--test-split)" in plan
    assert load_recipe(run.path / "recipe.toml").data.test_split == 0.2
    drawn = run.split()["drawn"]
    assert (len(drawn["train"]), len(drawn["test"])) == (16, 4)

    trained = {name: run.metrics()[name] for name in ("test", "valid")}
    shutil.copy(folder / "cat" / "000.png", folder / "cat" / "zzz.png")
    assert evaluated(run, capsys) == trained

    other = fit(folder, tmp_path / "other", "--valid-split", "0.25", "--seed", "1")
    assert len(other.split()["drawn"]["train"]) == 17
    for command in ("ensemble", "compare"):
        assert program([command, str(run.path), str(other.path)]) == 2
        assert "split.json" in capsys.readouterr().err


def test_training_images_that_have_come_are_told_by_eval(tmp_path, capsys):
    """The validation split is drawn anew, and may hold images that trained."""
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4)
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    capsys.readouterr()
    assert program(["eval", str(run.path)]) == 0
    assert "Changed" not in capsys.readouterr().out
    shutil.copy(folder / "train" / "cat" / "000.png", folder / "train" / "cat" / "zzz.png")
    assert program(["eval", str(run.path)]) == 0
    assert "differ from those of the run" in capsys.readouterr().out


def test_a_run_on_a_drawn_split_is_resumed_when_images_have_come(tmp_path, capsys):
    folder = classes_alone(tmp_path)
    run = fit(folder, tmp_path / "run", "--test-split", "0.3")
    figures = run.metrics()
    for name in ("metrics.json", "model.safetensors"):
        (run.path / name).unlink()
    shutil.copy(folder / "cat" / "000.png", folder / "cat" / "zzz.png")
    capsys.readouterr()
    assert program(["fit", "--resume", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 epochs are done" in out
    assert "1 image added after the split was drawn: cat/zzz.png" in out
    assert run.metrics()["test"] == figures["test"]


@pytest.mark.slow
def test_a_validation_folder_validates_and_gives_the_final_figures_alone(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, test_name="val")
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    out = capsys.readouterr().out
    assert "20 training, 8 validation and no labelled test images" in out
    assert "val/ for validation (valid_split is not used)" in out
    assert "Validation accuracy" in out
    assert "Test accuracy" not in out
    figures = run.metrics()
    assert "test" not in figures
    assert float(run.history()[-1]["valid_loss"]) == pytest.approx(
        figures["valid"]["nll"], abs=1e-4
    )
    assert evaluated(run, capsys) == {"valid": figures["valid"]}

    assert program(["report", str(run.path)]) == 0
    page = run.report.read_text()
    assert "Validation accuracy" in page
    assert "Test accuracy" not in page
    assert program(["export", str(run.path), "--to", str(tmp_path / "net.safetensors")]) == 0
    assert program(["eval", str(run.path), "--ood", str(folder)]) == 0

    other = fit(folder, tmp_path / "other", "--seed", "1", "--logger", "csv")
    capsys.readouterr()
    both = [str(run.path), str(other.path)]
    assert program(["ensemble", *both]) == 0
    assert "Validation accuracy" in capsys.readouterr().out
    assert program(["compare", *both, "--out", str(tmp_path / "c.png"), "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)["runs"]
    assert first["valid"]["accuracy"] == figures["valid"]["accuracy"]


def test_a_test_set_can_be_drawn_beside_a_validation_folder(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, test_name="valid")
    run = fit(folder, tmp_path / "run", "--test-split", "0.2")
    assert "16 training, 8 validation and 4 test images" in capsys.readouterr().out
    assert {"test", "valid"} <= run.metrics().keys()


def test_runs_without_split_json_test_on_val_as_they_did(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4)
    run = fit(folder, tmp_path / "run", "--valid-split", "0.2")
    before = {name: run.metrics()[name] for name in ("test", "valid")}
    (run.path / "split.json").unlink()
    (folder / "test").rename(folder / "val")
    assert evaluated(run, capsys) == before


def test_unlabelled_test_images_can_be_predicted(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, test_name="valid")
    for name in ("1.png", "2.png"):
        (folder / "test").mkdir(exist_ok=True)
        shutil.copy(folder / "valid" / "cat" / "000.png", folder / "test" / name)
    (folder / "test" / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "test" / "1.png", folder / "test" / ".ipynb_checkpoints" / "1.png")
    run = fit(folder, tmp_path / "run")
    assert f"mixmo predict RUN {folder / 'test'}" in capsys.readouterr().out.replace("\n", "")
    assert program(["predict", str(run.path), str(folder / "test"), "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert len(answer["predictions"]) == 2
    assert answer["skipped"] == "1 hidden or system folder (.ipynb_checkpoints/)"
    assert err.strip() == f"Skipped: {answer['skipped']}"


def test_what_is_skipped_is_one_line_of_the_plan(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10)
    for name in ("train/cat/Thumbs.db", "train/._x", "test/dog/._000.png"):
        (folder / name).touch()
    (folder / "train" / "__MACOSX").mkdir()
    fit(folder, tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Skipped")]
    assert lines == [
        "Skipped     1 hidden or system folder (__MACOSX/), 2 hidden files (._000.png, ._x), "
        "1 file that is not an image (Thumbs.db)"
    ]


@pytest.mark.slow
def test_evaluation_names_missing_skipped_and_left_out_images(tmp_path, capsys):
    folder = write_image_folder(
        tmp_path / "pets", classes=("cat", "dog", "eel"), num_train=10, num_test=2
    )
    shutil.rmtree(folder / "test" / "eel")
    (folder / "test" / "cat" / "Thumbs.db").touch()
    (folder / "test" / "dog" / "000.png").write_bytes(b"")
    run = fit(folder, tmp_path / "run", "--skip-damaged")
    labels = ("Missing", "Skipped", "Left out")
    plan = [line for line in capsys.readouterr().out.splitlines() if line.startswith(labels)]
    assert len(plan) == 3
    assert "test images of 1 of 3 classes: eel" in plan[0]
    assert program(["eval", str(run.path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[1:4]] == [line.split() for line in plan]
    assert shown[4] == ""
    assert program(["eval", str(run.path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "test" in json.loads(out)
    assert err.splitlines() == shown[1:4]


@pytest.mark.slow
def test_the_learning_rate_test_takes_the_same_images(tmp_path, capsys):
    folder = classes_alone(tmp_path)
    flags = ["--arch", "wrn10_1", "--batch-size", "8", "--repeat", "2", "--steps", "30"]
    flags += ["--test-split", "0.4", "--out", str(tmp_path / "lr.png")]
    assert program(["lr-find", str(folder), *flags]) == 0
    assert "40 % of each class" in capsys.readouterr().out
