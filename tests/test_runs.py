import csv
import json
import os
import re
from pathlib import Path

import pytest

from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.config.methods import run_label
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import check_free, create_run
from mixmo_fastai.runs.folder import RunFolder, open_run, write_atomically
from mixmo_fastai.runs.lock import starting
from mixmo_fastai.runs.output import free_file

RECIPE = override(Recipe(), ["train.seed=5"])


@pytest.fixture(autouse=True)
def working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def list_files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_default_run_folders_are_numbered(working_folder):
    names = [create_run(RECIPE).path.as_posix() for _ in range(3)]
    assert names == [f"runs/digits-cut-mixmo-{number}" for number in (1, 2, 3)]
    (working_folder / "runs/digits-cut-mixmo-2/recipe.toml").unlink()
    assert create_run(RECIPE).path.name == "digits-cut-mixmo-4"


@pytest.mark.parametrize(
    ("recipe", "assignments", "label"),
    [
        ("cifar100/cut-mixmo", [], "cifar100-cut-mixmo"),
        ("cifar100/cut-mixmo", ["data.dataset=/data/flowers/"], "flowers-cut-mixmo"),
        ("cifar10/vanilla", ["name=", "data.dataset=."], "data-vanilla"),
        ("cifar10/vanilla", ["data.dataset=pets/labels.CSV"], "labels-vanilla"),
        ("cifar10/vanilla", ["data.dataset=hf:pets"], "pets-vanilla"),
        ("cifar10/cutmix", ["name=", "model.num_nets=3"], "cifar10-cutmix-x3"),
        ("cifar10/mimo", ["name="], "cifar10-mimo"),
        ("cifar10/cut-mixmo-cutmix", ["name="], "cifar10-cut-mixmo-cutmix"),
        ("cifar10/linear-mixmo", ["name="], "cifar10-linear-mixmo"),
        ("cifar10/vanilla", ["name=../../up"], "cifar10-up"),
    ],
)
def test_run_label_names_data_set_and_method(recipe, assignments, label):
    assert run_label(override(load_recipe(recipe), assignments)) == label


def test_new_run_contains_recipe_and_environment(working_folder):
    run = create_run(RECIPE, working_folder / "a" / "b", device="some device")
    assert list_files(run.path) == {"recipe.toml", "environment.json"}
    assert run.recipe() == RECIPE
    environment = json.loads((run.path / "environment.json").read_text())
    assert (environment["seed"], environment["device"]) == (5, "some device")
    assert set(environment["packages"]) >= {"mixmo-fastai", "torch", "fastai"}
    assert environment["command"]
    assert open_run(run.path).recipe() == RECIPE


def test_empty_folder_is_used_and_full_folder_is_rejected(working_folder):
    (working_folder / "empty").mkdir()
    create_run(RECIPE, working_folder / "empty")
    with pytest.raises(InputError, match="already a run") as caught:
        create_run(override(RECIPE, ["train.seed=6"]), working_folder / "empty")
    assert "--resume" in str(caught.value)
    assert open_run(working_folder / "empty").recipe() == RECIPE
    (working_folder / "full").mkdir()
    (working_folder / "full" / "notes").write_text("text")
    with pytest.raises(InputError, match="not empty"):
        check_free(working_folder / "full")
    assert list_files(working_folder / "full") == {"notes"}


@pytest.mark.parametrize("path", ["file", "file/run", "file/a/b"])
def test_paths_below_a_file_are_rejected(working_folder, path):
    (working_folder / "file").write_text("text")
    for use_folder in (check_free, lambda path: create_run(RECIPE, path)):
        with pytest.raises(InputError, match=r"'.*file' is not a folder(.|\n)*--out"):
            use_folder(working_folder / path)
    assert list_files(working_folder) == {"file"}


def test_folder_without_permission_is_rejected(working_folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(InputError, match="cannot be written to"):
        check_free(working_folder / "a" / "b")


def test_file_named_runs_is_rejected(working_folder):
    (working_folder / "runs").touch()
    for use_folder in (check_free, lambda _: create_run(RECIPE)):
        with pytest.raises(InputError, match="--out DIR"):
            use_folder(None)


def test_check_free_creates_no_folder(working_folder):
    for path in (None, working_folder / "new", working_folder / "new" / "deeper"):
        assert check_free(path) is None
    assert list_files(working_folder) == set()
    assert not (working_folder / "new").exists()


def test_tilde_with_unknown_user_is_a_plain_name(working_folder):
    assert create_run(RECIPE, "~nobody-at-all").path.as_posix() == "~nobody-at-all"
    assert open_run("~nobody-at-all").recipe() == RECIPE


@pytest.mark.parametrize("path", ["missing", "file", "a\0b"])
def test_missing_run_is_rejected(working_folder, path):
    (working_folder / "file").touch()
    with pytest.raises(InputError, match="There is no run folder"):
        open_run(path)


FUNCTIONS = [
    open_run,
    lambda path: check_free(Path(path)),
    lambda path: free_file(Path(path), "a", ".png"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("path", ["a" * 300, "new/" + "a" * 300])
def test_too_long_names_are_rejected(working_folder, function, path):
    with pytest.raises(InputError, match="too long for a file"):
        function(path)
    assert list_files(working_folder) == set()


def test_folder_without_a_run_is_rejected(working_folder):
    with pytest.raises(InputError, match=r"not a run folder(.|\n)*mixmo fit"):
        open_run(working_folder)


def test_free_file_numbers_existing_names(working_folder):
    assert free_file(None, "curve", ".png").name == "curve.png"
    for name in ("curve.png", "curve-2.png"):
        (working_folder / name).touch()
    assert free_file(None, "curve", ".png").name == "curve-3.png"
    assert free_file(working_folder / "other.PNG", "curve", ".png") == working_folder / "other.PNG"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("curve.png", "exists and was not changed"),
        ("link.png", "exists and was not changed"),
        ("folder.png", "exists and was not changed"),
        ("curve", "must end in .png"),
        ("curve.jpg", "must end in .png"),
        ("none/x.png", "There is no folder 'none'"),
        ("curve.png/x.png", "There is no folder 'curve.png'"),
    ],
)
def test_unusable_file_paths_are_rejected(working_folder, path, message):
    (working_folder / "curve.png").write_text("text")
    (working_folder / "link.png").symlink_to("nowhere")
    (working_folder / "folder.png").mkdir()
    with pytest.raises(InputError, match=message):
        free_file(working_folder / path if "/" not in path else Path(path), "x", ".png")
    assert (working_folder / "curve.png").read_text() == "text"


def row(epoch, loss=0.5):
    return {"epoch": epoch, "train_loss": loss, "valid_loss": ""}


def test_history_has_one_row_per_epoch(working_folder):
    run = RunFolder(working_folder)
    assert run.history() == []
    for epoch in (1, 2):
        run.append_history(row(epoch))
    text = (working_folder / "history.csv").read_text()
    assert text == "epoch,train_loss,valid_loss\n1,0.5,\n2,0.5,\n"
    assert run.history() == list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3])
def test_history_is_truncated_to_the_saved_epochs(working_folder, num_rows):
    run = RunFolder(working_folder)
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    with (working_folder / "history.csv").open("a") as file:
        file.write("4,0.")  # an incomplete row after a power failure
    run.write_history(run.history()[:num_rows])
    assert (working_folder / "history.csv").exists() == (num_rows > 0)
    run.append_history(row(num_rows + 1, 0.25))
    losses = [(int(entry["epoch"]), entry["train_loss"]) for entry in run.history()]
    assert losses == [*((epoch, "0.5") for epoch in range(1, num_rows + 1)), (num_rows + 1, "0.25")]


def test_metrics_are_read_back_or_rejected(working_folder):
    run = RunFolder(working_folder)
    with pytest.raises(InputError, match="not finished"):
        run.metrics()
    run.write_metrics({"test": {"accuracy": 0.1 + 0.2}})
    assert run.metrics() == {"test": {"accuracy": 0.1 + 0.2}}
    (working_folder / "metrics.json").write_text('{"test": ')
    with pytest.raises(InputError, match="damaged"):
        run.metrics()


def test_log_appends_lines(working_folder):
    run = RunFolder(working_folder)
    run.log("one")
    run.log("two")
    assert (working_folder / "log.txt").read_text() == "one\ntwo\n"


def test_log_accepts_file_names_of_any_bytes(working_folder):
    RunFolder(working_folder).log(f"Skipped {os.fsdecode(b'r' + bytes([252]) + b'.txt')}")
    assert (working_folder / "log.txt").read_text(encoding="utf-8") == "Skipped r\\udcfc.txt\n"


@pytest.mark.parametrize("path", [".", "it/..", "it"])
def test_lock_of_a_start_is_beside_the_folder(working_folder, path):
    (working_folder / "it").mkdir()
    expected = (working_folder / path).resolve()
    with starting(Path(path)):
        assert (expected.parent / f".{expected.name}.starting").is_file()


def test_paths_in_commands_are_quoted(working_folder):
    folder = working_folder / "my run"
    run = create_run(load_recipe("digits/cut-mixmo"), folder)
    for call in (run.metrics, run.check_trained, lambda: open_run(folder / "checkpoint")):
        with pytest.raises(InputError, match=re.escape(f"mixmo fit --resume '{folder}'")):
            call()


def test_write_is_atomic(working_folder, monkeypatch):
    write_atomically(working_folder / "a.txt", "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(working_folder / "a.txt", "new")
    assert (working_folder / "a.txt").read_text() == "old"
