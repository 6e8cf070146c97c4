"""Runs whose images, or which themselves, are in another place than in training."""

import csv
import json

import pytest
from exports import train_small_run
from short_runs import TINY, fit
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.training.prepare import prepare


@pytest.fixture(params=["folder", "table"])
def data(request, tmp_path):
    """An image folder, or a table of the same images."""
    folder = write_image_folder(tmp_path / "here" / "pets", num_train=12, num_test=5, size=(12, 12))
    if request.param == "folder":
        return folder
    rows = [
        [str(path.relative_to(folder)), path.parent.name, path.parent.parent.name]
        for path in sorted(folder.rglob("*.png"))
    ]
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    return folder / "labels.csv"


@pytest.mark.parametrize("num_nets", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_new_path_is_written_into_the_recipe(data, tmp_path, capsys, num_nets):
    run = train_small_run(data, tmp_path / "run", **{"model.num_nets": num_nets})
    expected = run.metrics()["test"]
    (tmp_path / "here").rename(tmp_path / "there")
    run.path.rename(tmp_path / "moved run")
    moved = RunFolder(tmp_path / "moved run")
    for command in (["eval", str(moved.path)], ["fit", "--resume", str(moved.path)]):
        capsys.readouterr()
        assert program(command) == 2
        error = capsys.readouterr().err
        assert str(data) in error
        assert "Restore it, or write its new path into recipe.toml of the run" in error
    recipe = moved.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("/here/", "/there/"))
    assert program(["eval", str(moved.path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["test"]
    assert values["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert program(["fit", "--resume", str(moved.path), "--quiet"]) == 0


def test_interrupted_run_continues_with_moved_images(data, tmp_path):
    recipe = override(TINY, [f"data.dataset={data}"])
    expected = create_run(recipe, tmp_path / "expected")
    steps = fit(expected)
    run = create_run(recipe, tmp_path / "run")
    first = fit(run, (1, 1))
    (tmp_path / "here").rename(tmp_path / "there")
    path = run.path / "recipe.toml"
    path.write_text(path.read_text().replace("/here/", "/there/"))
    assert first + fit(run, resume=True) == steps
    weights = [(each.path / "model.safetensors").read_bytes() for each in (expected, run)]
    assert weights[0] == weights[1]
    assert run.metrics()["test"] == expected.metrics()["test"]


def test_folder_of_the_images_of_a_table_may_be_moved(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "here", num_train=12, num_test=5, size=(12, 12))
    files = sorted(folder.rglob("*.png"))
    rows = [f"{file.relative_to(folder)},{file.parent.name}" for file in files]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    settings = [f"data.dataset={table}", f"data.image_folder={folder}"]
    run = create_run(override(TINY, settings), tmp_path / "run")
    first = fit(run, (1, 1))
    folder.rename(tmp_path / "there")
    assert program(["fit", "--resume", str(run.path)]) == 2
    assert "as data.image_folder." in capsys.readouterr().err
    path = run.path / "recipe.toml"
    path.write_text(path.read_text().replace("/here", "/there"))
    rest = fit(run, resume=True)
    assert len(first + rest) == 3 * prepare(run.recipe()).steps_per_epoch


def test_run_does_not_continue_with_other_images(data, tmp_path):
    run = create_run(override(TINY, [f"data.dataset={data}"]), tmp_path / "run")
    fit(run, (1, 1))
    (tmp_path / "here").rename(tmp_path / "there")
    path = run.path / "recipe.toml"
    path.write_text(path.read_text().replace("/here/", "/there/"))
    image = sorted((tmp_path / "there").rglob("*.png"))[0]
    image.write_bytes(image.read_bytes() + b"longer")
    with pytest.raises(InputError, match=r"data\.t\w+ is '\d+ images of .* now and '\d+ images"):
        fit(run, resume=True)
