"""Runs on image folders use the same training, validation and test images in all commands."""

import json
import re
import shutil

import pytest
from PIL import Image
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.evaluation.compare import compare_runs
from mixmo_fastai.evaluation.runs import evaluate_ensemble
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
def data_dir(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path_factory.mktemp("data")))


def write_class_folders(root):
    """Write one folder of ten images per class, without parts."""
    write_image_folder(root / "source", num_train=10, num_test=1, size=(16, 16))
    return (root / "source" / "train").rename(root / "pets")


def fit(folder, out, *flags):
    assert program(["fit", str(folder), *TINY, *flags, "--out", str(out)]) == 0
    return open_run(out)


def evaluate(run, capsys):
    capsys.readouterr()
    assert program(["eval", str(run.path), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    return {name: metrics[name] for name in ("test", "valid") if name in metrics}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--members", "1"), (), ("--limit", "20")], ids=str)
def test_largest_possible_batch_size_is_named_and_trains(tmp_path, flags, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=20 if flags else 6, size=(16, 16))
    arguments = [
        "fit",
        str(folder),
        "--arch",
        "wrn10_1",
        "--epochs",
        "1",
        "--device",
        "cpu",
        *flags,
    ]
    arguments += ["--batch-size", "128"] if "--limit" in flags else []
    assert program(arguments) == 2
    message = capsys.readouterr().err
    (size,) = re.findall(r"Lower the batch size: --batch-size (\d+) is the largest", message)
    assert ("Or raise --limit" in message) == ("--limit" in flags)
    assert ("each repeated 4 times" in message) == ("--members" not in flags)
    for batch_size, code in ((int(size) + 4, 2), (int(size), 0)):
        out = str(tmp_path / f"run-{batch_size}")
        assert (
            program([*arguments, "--batch-size", str(batch_size), "--out", out, "--quiet"]) == code
        )


@pytest.mark.slow
def test_too_few_images_for_a_split_are_refused_with_a_remedy_that_works(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "source", num_train=2) / "train"
    arguments = ["fit", str(folder), *TINY, "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert program(arguments) == 2
    message = capsys.readouterr().err
    assert "no class has two or more" in message
    assert "--valid-split 0." in message
    assert program([*arguments, "--valid-split", "0"]) == 0


@pytest.mark.slow
def test_drawn_test_set_is_the_same_in_all_commands(tmp_path, capsys):
    folder = write_class_folders(tmp_path)
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    plan = capsys.readouterr().out
    assert "12 training, 4 validation and 4 test images" in plan
    assert "20 % of each class, drawn once and stored with the run (--test-split)" in plan
    assert load_recipe(run.path / "recipe.toml").data.test_split == 0.2
    drawn = run.split()["drawn"]
    assert (len(drawn["train"]), len(drawn["test"])) == (16, 4)

    expected = {name: run.metrics()[name] for name in ("test", "valid")}
    shutil.copy(folder / "cat" / "000.png", folder / "cat" / "zzz.png")
    assert evaluate(run, capsys) == expected

    other = fit(folder, tmp_path / "other", "--valid-split", "0.25", "--seed", "1")
    assert len(other.split()["drawn"]["train"]) == 17
    for command in ("ensemble", "compare"):
        assert program([command, str(run.path), str(other.path)]) == 2
        assert "split.json" in capsys.readouterr().err


def test_eval_reports_added_training_images(tmp_path, capsys):
    """The validation split is drawn again and may contain training images."""
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4)
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    capsys.readouterr()
    assert program(["eval", str(run.path)]) == 0
    assert "Changed" not in capsys.readouterr().out
    shutil.copy(folder / "train" / "cat" / "000.png", folder / "train" / "cat" / "zzz.png")
    assert program(["eval", str(run.path)]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "Changed" in each]
    assert "the training images differ from those of the run" in line
    (folder / "test" / "dog" / "000.png").unlink()
    assert program(["eval", str(run.path)]) == 0
    lines = [each for each in capsys.readouterr().out.splitlines() if "Changed" in each]
    assert "the test images differ from those of the run" in lines[1]
    shutil.rmtree(run.checkpoint)  # holds what the images were
    assert program(["eval", str(run.path)]) == 0
    assert "Changed" not in capsys.readouterr().out


@pytest.mark.slow
def test_eval_reports_changed_validation_images(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4)
    (folder / "test").rename(folder / "valid")
    run = fit(folder, tmp_path / "run")
    shutil.copy(folder / "train" / "cat" / "000.png", folder / "valid" / "cat" / "zzz.png")
    capsys.readouterr()
    assert program(["eval", str(run.path)]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "Changed" in each]
    assert "the validation images differ from those of the run" in line


@pytest.fixture
def changed_run(tmp_path):
    """A run, its metrics, and a folder whose training images are darker and larger since."""
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, size=(16, 16))
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    for index in range(40):
        Image.new("RGB", (20, 20), (9, 9, 9)).save(folder / "train" / "cat" / f"z{index}.png")
    return run


def test_metrics_of_test_images_do_not_depend_on_images_added_for_training(changed_run, capsys):
    assert evaluate(changed_run, capsys)["test"] == changed_run.metrics()["test"]
    out = changed_run.path / "net.safetensors"
    assert program(["export", str(changed_run.path), "--to", str(out)]) == 0


def test_each_compared_run_has_its_own_statistics(changed_run, tmp_path, capsys):
    other = fit(tmp_path / "pets", tmp_path / "other", "--valid-split", "0.25")
    facts = [run.data_facts() for run in (changed_run, other)]
    assert [each.image_shape for each in facts] == [(3, 16, 16), (3, 20, 20)]
    assert facts[0].mean != facts[1].mean
    runs = [changed_run, other]
    found = []
    for order in (runs, runs[::-1]):
        compared = compare_runs(order)
        for run, each in zip(order, compared, strict=True):
            assert each.metrics["nll"] == pytest.approx(run.metrics()["test"]["nll"])
        found.append(evaluate_ensemble(order)["test"]["nll"])
    assert found[0] == pytest.approx(found[1])


def test_runs_on_two_folders_with_equal_test_images_are_compared(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, size=(16, 16))
    smaller = shutil.copytree(folder, tmp_path / "smaller")
    for path in sorted((smaller / "train" / "cat").iterdir())[:6]:
        path.unlink()
    runs = [
        fit(each, tmp_path / f"run-{each.name}", "--valid-split", "0.25")
        for each in (folder, smaller)
    ]
    compared = compare_runs(runs)
    for run, each in zip(runs, compared, strict=True):
        assert each.metrics["nll"] == pytest.approx(run.metrics()["test"]["nll"])
    assert compared[1].differences["nll"] != (0, 0)

    for spoil in (
        lambda path: path.rename(path.with_name("other.png")),
        lambda path: Image.new("RGB", (16, 16)).save(path),
    ):
        other = shutil.copytree(folder, tmp_path / f"spoilt-{len(runs)}")
        spoil(min((other / "test" / "dog").iterdir()))
        runs.append(fit(other, tmp_path / f"run-{other.name}", "--valid-split", "0.25"))
        assert program(["compare", str(runs[0].path), str(runs[-1].path)]) == 2
        assert "have different test images, or" in " ".join(capsys.readouterr().err.split())


def test_run_on_a_drawn_split_resumes_after_images_were_added(tmp_path, capsys):
    folder = write_class_folders(tmp_path)
    run = fit(folder, tmp_path / "run", "--test-split", "0.3")
    metrics = run.metrics()
    for name in ("metrics.json", "model.safetensors"):
        (run.path / name).unlink()
    shutil.copy(folder / "cat" / "000.png", folder / "cat" / "zzz.png")
    capsys.readouterr()
    assert program(["fit", "--resume", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 epochs are done" in out
    assert "1 image added after the split was drawn: cat/zzz.png" in out
    assert run.metrics()["test"] == metrics["test"]


@pytest.mark.slow
def test_validation_folder_without_test_set_gives_the_final_metrics(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, test_name="val")
    run = fit(folder, tmp_path / "run", "--valid-split", "0.25")
    out = capsys.readouterr().out
    assert "20 training, 8 validation and no labelled test images" in out
    assert "val/ for validation (valid_split is not used)" in out
    assert "Validation accuracy" in out
    assert "Test accuracy" not in out
    metrics = run.metrics()
    assert "test" not in metrics
    assert float(run.history()[-1]["valid_loss"]) == pytest.approx(
        metrics["valid"]["nll"], abs=1e-4
    )
    assert evaluate(run, capsys) == {"valid": metrics["valid"]}

    assert program(["report", str(run.path)]) == 0
    page = run.report.read_text()
    assert "Validation accuracy" in page
    assert "Test accuracy" not in page
    assert program(["export", str(run.path), "--to", str(tmp_path / "net.safetensors")]) == 0
    ood = write_image_folder(tmp_path / "ood", num_train=2, num_test=2)
    assert program(["eval", str(run.path), "--ood", str(ood)]) == 0

    other = fit(folder, tmp_path / "other", "--seed", "1", "--logger", "csv")
    capsys.readouterr()
    paths = [str(run.path), str(other.path)]
    assert program(["ensemble", *paths]) == 0
    assert "Validation accuracy" in capsys.readouterr().out
    assert program(["compare", *paths, "--out", str(tmp_path / "c.png"), "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)["runs"]
    assert first["valid"]["accuracy"] == metrics["valid"]["accuracy"]


def test_test_set_can_be_drawn_with_a_validation_folder(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, test_name="valid")
    run = fit(folder, tmp_path / "run", "--test-split", "0.2")
    assert "16 training, 8 validation and 4 test images" in capsys.readouterr().out
    assert {"test", "valid"} <= run.metrics().keys()


def test_runs_without_split_json_are_tested_on_val(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4)
    run = fit(folder, tmp_path / "run", "--valid-split", "0.2")
    before = {name: run.metrics()[name] for name in ("test", "valid")}
    (run.path / "split.json").unlink()
    (folder / "test").rename(folder / "val")
    assert evaluate(run, capsys) == before


def test_unlabelled_test_images_can_be_predicted(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, test_name="valid")
    for name in ("1.png", "2.png"):
        (folder / "test").mkdir(exist_ok=True)
        shutil.copy(folder / "valid" / "cat" / "000.png", folder / "test" / name)
    (folder / "test" / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "test" / "1.png", folder / "test" / ".ipynb_checkpoints" / "1.png")
    run = fit(folder, tmp_path / "run")
    assert f"mixmo predict RUN {folder / 'test'}" in capsys.readouterr().out.replace("\n", "")
    assert program(["predict", str(run.path), str(folder / "test"), "--raw", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert len(result["predictions"]) == 2
    assert result["skipped"] == "1 hidden or system folder (.ipynb_checkpoints/)"
    assert err.strip() == f"Skipped: {result['skipped']}"


def test_plan_reports_skipped_files_in_one_line(tmp_path, capsys):
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
def test_eval_reports_missing_skipped_and_damaged_images(tmp_path, capsys):
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
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [line.split() for line in plan]
    assert lines[4] == ""
    assert program(["eval", str(run.path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "test" in json.loads(out)
    assert err.splitlines() == lines[1:4]


@pytest.mark.slow
def test_lr_find_draws_the_test_split(tmp_path, capsys):
    folder = write_class_folders(tmp_path)
    flags = ["--arch", "wrn10_1", "--batch-size", "8", "--repeat", "2", "--steps", "30"]
    flags += ["--test-split", "0.4", "--out", str(tmp_path / "lr.png")]
    assert program(["lr-find", str(folder), *flags]) == 0
    assert "40 % of each class" in capsys.readouterr().out


@pytest.mark.slow
def test_run_on_a_table_keeps_its_columns_and_images(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=20, num_test=1, size=(16, 16))
    paths = sorted((folder / "train").rglob("*.png"))
    rows = [
        f"{path.parent.name}/{path.stem},{path.parent.name},{n // 4}\n"
        for n, path in enumerate(paths)
    ]
    table = tmp_path / "pets/labels.csv"
    table.write_text("file,animal,litter\n" + "".join(rows))
    flags = ["--set", "data.label_column=animal", "--set", "data.group_column=litter"]
    flags += ["--set", "data.image_folder=train", "--valid-split", "0.2"]
    run = fit(table, tmp_path / "run", *flags)
    plan = capsys.readouterr().out
    assert "Table       40 rows; paths in 'file', labels in 'animal', groups in 'litter'" in plan
    assert "whole groups of 'litter'" in plan
    split = run.split()
    assert split["columns"]["label"] == "animal"
    before = evaluate(run, capsys)
    assert before["test"]["accuracy"] == run.metrics()["test"]["accuracy"]
    # A column whose name would be guessed, and an image that the run did not see.
    added = write_image_folder(tmp_path / "more", num_train=1, num_test=1, size=(16, 16))
    shutil.copy(added / "train/cat/000.png", folder / "train/cat/new.png")
    lines = [f"{row.strip()},x\n" for row in rows]
    table.write_text("file,animal,litter,label\n" + "".join([*lines, "cat/new,cat,99,x\n"]))
    assert evaluate(run, capsys) == before
    assert program(["predict", str(run.path), str(folder / "test"), "--json"]) == 0
    labels = {row["label"] for row in json.loads(capsys.readouterr().out)["predictions"]}
    assert labels <= {"cat", "dog"}
    assert program(["report", str(run.path)]) == 0
    table.write_text(table.read_text().replace(rows[0].strip(), "cat/000,dog,0"))
    assert program(["fit", "--resume", str(run.path)]) == 2  # a label has changed
    assert "Undo the change, or start a new run." in capsys.readouterr().err
    table.write_text("file,animal,litter\n" + "".join(rows[1:]))
    assert program(["eval", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert "1 of the run's 40 images is no longer in" in error
    assert str(table) in error
