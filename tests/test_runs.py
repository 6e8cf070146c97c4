import csv
import json
import os
from pathlib import Path

import pytest

from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.config.methods import run_label
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import check_free, create_run
from mixmo_fastai.runs.folder import RunFolder, open_run, write_atomically
from mixmo_fastai.runs.output import free_file

RECIPE = override(Recipe(), ["train.seed=5"])


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_default_run_folders_are_numbered(folder):
    names = [create_run(RECIPE).path.as_posix() for _ in range(3)]
    assert names == [f"runs/digits-cut-mixmo-{number}" for number in (1, 2, 3)]
    (folder / "runs/digits-cut-mixmo-2/recipe.toml").unlink()
    assert create_run(RECIPE).path.name == "digits-cut-mixmo-4"


@pytest.mark.parametrize(
    ("recipe", "assignments", "label"),
    [
        ("cifar100/cut-mixmo", [], "cifar100-cut-mixmo"),
        ("cifar100/cut-mixmo", ["data.dataset=/data/flowers/"], "flowers-cut-mixmo"),
        ("cifar10/vanilla", ["name=", "data.dataset=."], "data-vanilla"),
        ("cifar10/cutmix", ["name=", "model.num_nets=3"], "cifar10-cutmix-x3"),
        ("cifar10/mimo", ["name="], "cifar10-mimo"),
        ("cifar10/cut-mixmo-cutmix", ["name="], "cifar10-cut-mixmo-cutmix"),
        ("cifar10/linear-mixmo", ["name="], "cifar10-linear-mixmo"),
        ("cifar10/vanilla", ["name=../../up"], "cifar10-up"),
    ],
)
def test_a_run_is_named_by_data_set_and_method(recipe, assignments, label):
    assert run_label(override(load_recipe(recipe), assignments)) == label


def test_a_new_run_says_how_to_run_it_again(folder):
    run = create_run(RECIPE, folder / "a" / "b", device="some device")
    assert files(run.path) == {"recipe.toml", "environment.json"}
    assert run.recipe() == RECIPE
    environment = json.loads((run.path / "environment.json").read_text())
    assert (environment["seed"], environment["device"]) == (5, "some device")
    assert set(environment["packages"]) >= {"mixmo-fastai", "torch", "fastai"}
    assert environment["command"]
    assert open_run(run.path).recipe() == RECIPE


def test_an_empty_folder_is_taken_and_a_full_one_is_not(folder):
    (folder / "empty").mkdir()
    create_run(RECIPE, folder / "empty")
    with pytest.raises(InputError, match="already a run") as caught:
        create_run(override(RECIPE, ["train.seed=6"]), folder / "empty")
    assert "--resume" in str(caught.value)
    assert open_run(folder / "empty").recipe() == RECIPE
    (folder / "full").mkdir()
    (folder / "full" / "letter").write_text("dear")
    with pytest.raises(InputError, match="not empty"):
        check_free(folder / "full")
    assert files(folder / "full") == {"letter"}


@pytest.mark.parametrize("path", ["file", "file/run", "file/a/b"])
def test_a_place_that_cannot_be_written_is_refused(folder, path):
    (folder / "file").write_text("text")
    for refuse in (check_free, lambda place: create_run(RECIPE, place)):
        with pytest.raises(InputError, match=r"'.*file' is not a folder(.|\n)*--out"):
            refuse(folder / path)
    assert files(folder) == {"file"}


def test_a_folder_without_permission_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(InputError, match="cannot be written to"):
        check_free(folder / "a" / "b")


def test_runs_that_is_a_file_is_refused(folder):
    (folder / "runs").touch()
    for refuse in (check_free, lambda _: create_run(RECIPE)):
        with pytest.raises(InputError, match="--out DIR"):
            refuse(None)


def test_what_is_free_is_left_as_it_is(folder):
    for path in (None, folder / "new", folder / "new" / "deeper"):
        assert check_free(path) is None
    assert files(folder) == set()
    assert not (folder / "new").exists()


def test_the_home_folder_of_nobody_is_a_name_like_any_other(folder):
    assert create_run(RECIPE, "~nobody-at-all").path.as_posix() == "~nobody-at-all"
    assert open_run("~nobody-at-all").recipe() == RECIPE


@pytest.mark.parametrize("path", ["missing", "file", "a\0b"])
def test_a_missing_run_is_said_so(folder, path):
    (folder / "file").touch()
    with pytest.raises(InputError, match="There is no run folder"):
        open_run(path)


USES = [
    open_run,
    lambda path: check_free(Path(path)),
    lambda path: free_file(Path(path), "a", ".png"),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("path", ["a" * 300, "new/" + "a" * 300])
def test_names_that_no_file_can_have(folder, use, path):
    with pytest.raises(InputError, match="too long for a file"):
        use(path)
    assert files(folder) == set()


def test_a_folder_of_something_else_is_no_run(folder):
    with pytest.raises(InputError, match=r"not a run folder(.|\n)*mixmo fit"):
        open_run(folder)


def test_a_file_is_free_under_the_next_name(folder):
    assert free_file(None, "curve", ".png").name == "curve.png"
    for name in ("curve.png", "curve-2.png"):
        (folder / name).touch()
    assert free_file(None, "curve", ".png").name == "curve-3.png"
    assert free_file(folder / "other.PNG", "curve", ".png") == folder / "other.PNG"


@pytest.mark.parametrize(
    ("path", "part"),
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
def test_a_file_that_cannot_be_made_is_refused(folder, path, part):
    (folder / "curve.png").write_text("picture")
    (folder / "link.png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()
    with pytest.raises(InputError, match=part):
        free_file(folder / path if "/" not in path else type(folder)(path), "x", ".png")
    assert (folder / "curve.png").read_text() == "picture"


def row(epoch, loss=0.5):
    return {"epoch": epoch, "train_loss": loss, "valid_loss": ""}


def test_history_has_a_row_per_epoch(folder):
    run = RunFolder(folder)
    assert run.history() == []
    for epoch in (1, 2):
        run.append_history(row(epoch))
    text = (folder / "history.csv").read_text()
    assert text == "epoch,train_loss,valid_loss\n1,0.5,\n2,0.5,\n"
    assert run.history() == list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_history_is_put_back_to_the_epochs_that_are_saved(folder, kept):
    run = RunFolder(folder)
    for epoch in (1, 2, 3):
        run.append_history(row(epoch))
    with (folder / "history.csv").open("a") as file:
        file.write("4,0.")  # the power failed
    run.write_history(run.history()[:kept])
    assert (folder / "history.csv").exists() == (kept > 0)
    run.append_history(row(kept + 1, 0.25))
    losses = [(int(entry["epoch"]), entry["train_loss"]) for entry in run.history()]
    assert losses == [*((epoch, "0.5") for epoch in range(1, kept + 1)), (kept + 1, "0.25")]


def test_metrics_are_read_back_or_refused(folder):
    run = RunFolder(folder)
    with pytest.raises(InputError, match="not finished"):
        run.metrics()
    run.write_metrics({"test": {"accuracy": 0.1 + 0.2}})
    assert run.metrics() == {"test": {"accuracy": 0.1 + 0.2}}
    (folder / "metrics.json").write_text('{"test": ')
    with pytest.raises(InputError, match="damaged"):
        run.metrics()


def test_the_log_grows_by_lines(folder):
    run = RunFolder(folder)
    run.log("one")
    run.log("two")
    assert (folder / "log.txt").read_text() == "one\ntwo\n"


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    write_atomically(folder / "a.txt", "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(folder / "a.txt", "new")
    assert (folder / "a.txt").read_text() == "old"
