"""`mixmo predict` for images that a table names, and with the probability of each class."""

import csv
import json
import shutil

import numpy as np
import oracle_metrics as oracle
import pyarrow
import pytest
from exports import train_small_run
from pyarrow import parquet
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation import predict as module
from mixmo_fastai.evaluation.decisions import Decisions
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.evaluation.predict import predict_images
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.scaling import Scaling
from mixmo_fastai.runs.weights import load_network

CLASSES = ("0010", "image", "with, comma")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(
        tmp_path_factory.mktemp("images") / "pets", classes=CLASSES, num_train=12, num_test=5
    )


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return train_small_run(images, tmp_path_factory.mktemp("runs") / "mixmo")


@pytest.fixture
def competition(images, tmp_path):
    """A folder like those of competitions: images by number, and tables of their ids."""
    files = sorted((images / "test").rglob("*.png"))
    for number, file in enumerate(files):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / f"pictures/{number:05}.png")
    return tmp_path


def write_ids(path, ids, header="image_id"):
    path.write_text("\n".join([f"{header},sex", *(f"{each},m" for each in ids)]) + "\n")
    return path


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(run, *arguments):
    return program(["predict", str(run.path), "--raw", *map(str, arguments)])


def test_table_is_predicted_in_the_order_of_its_rows(run, competition, tmp_path, monkeypatch):
    ids = ["00007", "00002", "00011", "00007", "00000"]  # one twice
    table = write_ids(competition / "test.csv", ids)
    out = tmp_path / "p.csv"
    assert predict(run, table, "--out", out) == 0
    rows = read_csv(out)
    assert [row["image"] for row in rows] == ids
    alone, _ = predict_images(run, [competition / f"pictures/{each}.png" for each in ids])
    assert [row["label"] for row in rows] == [each.label for each in alone]
    for row, prediction in zip(rows, alone, strict=True):
        assert float(row["probability"]) == pytest.approx(prediction.probability, rel=1e-5)
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 2)  # the result does not depend on the chunks
    (competition / "pictures/00013.png").write_bytes(b"damaged")
    table = write_ids(table, ["00007", "nothing", "00013", "00002", "00011", "00007", "00000"])
    in_chunks, unreadable = predict_images(run, [table])
    assert [each.image for each in in_chunks] == ids
    assert [str(name) for name in unreadable] == ["nothing", "00013"]  # as the table calls them
    for first, second in zip(in_chunks, alone, strict=True):
        assert (first.label, first.votes) == (second.label, second.votes)
        assert first.probability == pytest.approx(second.probability, abs=1e-6)
        assert first.entropy == pytest.approx(second.entropy, abs=1e-6)


def test_images_that_are_given_twice_are_predicted_twice(run, competition):
    first, second = (competition / f"pictures/0000{number}.png" for number in (1, 2))
    predictions, _ = predict_images(run, [first, second, first])
    assert [each.image for each in predictions] == [str(first), str(second), str(first)]
    assert predictions[0] == predictions[2]


def test_missing_images_of_a_table_are_reported_and_others_predicted(
    run, competition, tmp_path, capsys
):
    table = write_ids(competition / "test.csv", ["00003", "nothing", "00004"])
    (competition / "pictures/00004.png").write_bytes(b"damaged")
    out = tmp_path / "p.csv"
    assert predict(run, table, "--out", out) == 1
    assert [row["image"] for row in read_csv(out)] == ["00003"]
    assert "2 of 3 images could not be read: nothing, " in capsys.readouterr().err
    assert predict(run, table, "--json") == 1
    reasons = json.loads(capsys.readouterr().out)["unreadable"]
    assert reasons["nothing"] == "There is no image 'nothing'."
    assert [*reasons] == ["nothing", "00004"]


def test_nothing_is_written_if_no_image_can_be_read(run, competition, tmp_path, capsys):
    table = write_ids(competition / "test.csv", ["nothing"])
    for suffix in (".csv", ".json"):
        out = tmp_path / f"p{suffix}"
        assert predict(run, table, "--out", out) == 1
        assert not out.exists()
        assert "There is no image 'nothing'" in capsys.readouterr().err
        assert predict(run, table, "--out", out, "--json") == 1
        assert not out.exists()
        shown = json.loads(capsys.readouterr().out)
        assert shown["predictions"] is None
        assert shown["unreadable"] == {"nothing": "There is no image 'nothing'."}
    assert predict(run, table, "--probabilities") == 1
    header = next(csv.reader(capsys.readouterr().out.splitlines()))
    assert header[-3:] == [f"p:{name}" for name in CLASSES]


def test_images_may_be_in_another_folder(run, competition, tmp_path, capsys):
    (competition / "tables").mkdir()
    table = write_ids(competition / "tables/test.csv", ["00003", "00004"])
    assert predict(run, table) == 1
    assert "2 of 2 images could not be read" in capsys.readouterr().err
    out = tmp_path / "p.csv"
    folder = competition / "pictures"
    assert predict(run, table, "--image-folder", folder, "--out", out) == 0
    assert [row["image"] for row in read_csv(out)] == ["00003", "00004"]
    assert predict(run, table, "--image-folder", competition / "none") == 2
    assert "There is no folder" in capsys.readouterr().err
    assert predict(run, folder, "--image-folder", folder) == 2
    assert "--image-folder has no effect without a table" in capsys.readouterr().err


def test_column_of_paths_is_that_of_the_run_or_found(run, competition, tmp_path, capsys):
    odd = write_ids(competition / "odd.csv", ["00003", "00004"], header="picture number")
    assert predict(run, odd) == 0  # an image has this name
    capsys.readouterr()
    both = competition / "both.csv"
    both.write_text("image_id,scan\n00001,00002\n00002,00003\n")
    assert [each.image for each in predict_images(run, [both])[0]] == ["00001", "00002"]
    other = type(run)(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    text = (other.path / "recipe.toml").read_text()
    (other.path / "recipe.toml").write_text(
        text.replace('path_column = ""', 'path_column = "scan"')
    )
    assert other.recipe().data.path_column == "scan"
    assert [each.image for each in predict_images(other, [both])[0]] == ["00002", "00003"]
    missing = competition / "missing.csv"
    missing.write_text("scan,sex\nnothing,m\n00002,f\n")  # the first row names no image
    predictions, unreadable = predict_images(other, [missing])
    assert [each.image for each in predictions] == ["00002"]
    assert [str(name) for name in unreadable] == ["nothing"]
    unknown = write_ids(competition / "unknown.csv", ["x", "y"], header="number")
    with pytest.raises(InputError, match="which column holds the paths"):
        predict_images(run, [unknown])
    empty = write_ids(competition / "empty.csv", ["00001", " "])
    with pytest.raises(InputError, match="line 3: the path is empty"):
        predict_images(run, [empty])


def test_a_list_of_files_needs_a_first_line(run, competition):
    table = competition / "test.csv"
    table.write_text("00000.png\n00001.png\n00002.png\n")
    with pytest.raises(InputError, match=r"names the image '00000.png' instead of the columns"):
        predict_images(run, [table])
    table.write_text("path\n00000.png\n00001.png\n")
    assert len(predict_images(run, [table])[0]) == 2


def test_an_empty_folder_beside_images_is_no_error(run, competition):
    (competition / "empty").mkdir()
    folders = [competition / "empty", competition / "pictures"]
    assert len(predict_images(run, folders)[0]) == 15
    for paths in ([competition / "empty"], []):
        with pytest.raises(InputError, match="No image was found"):
            predict_images(run, paths)


def test_images_within_a_parquet_table_are_explained(run, tmp_path):
    images = pyarrow.array([{"bytes": b"x", "path": "a.png"}] * 2)
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="If it holds images, save them as files"):
        predict_images(run, [tmp_path / "a.parquet"])


def test_a_second_run_is_not_a_folder_of_images(run, images, capsys):
    assert predict(run, run.path, images / "test") == 2
    error = capsys.readouterr().err
    assert "is a run, not a folder of images" in error
    assert "--probabilities" in error


def test_probabilities_of_all_classes_equal_the_oracle(run, images, tmp_path, capsys):
    _, test, _ = open_finished(run).loaders()
    logits, _ = collect_member_logits(load_network(run), test)
    expected = [oracle.softmax(row.mean(0)) for row in logits.double().numpy()]
    out = tmp_path / "p.csv"
    assert predict(run, images / "test", "--probabilities", "--out", out) == 0
    rows = read_csv(out)
    assert len(rows) == len(expected) == 15
    for row, p in zip(rows, expected, strict=True):
        shown = [float(row[f"p:{name}"]) for name in CLASSES]
        assert shown == pytest.approx(p.tolist(), abs=1e-5)
        assert row["label"] == CLASSES[int(np.argmax(shown))]
        assert row["probability"] == row[f"p:{row['label']}"]
        assert row["image"].endswith(".png")  # a class is called like the column
    assert predict(run, images / "test", "--probabilities", "--json") == 0
    table = json.loads(capsys.readouterr().out.partition("\n")[2])
    for row, p in zip(table["predictions"], expected, strict=True):
        assert [*row["probabilities"]] == [*CLASSES]
        assert [*row["probabilities"].values()] == pytest.approx(p.tolist(), abs=1e-5)
    assert predict(run, images / "test", "--json") == 0
    assert "probabilities" not in json.loads(capsys.readouterr().out)["predictions"][0]


def test_probabilities_are_calibrated_like_the_shown_one(run, images):
    plain, _ = predict_images(run, [images / "test"], all_probabilities=True)
    decisions = Decisions(scaling=Scaling("temperature", (4.0,)))
    scaled, _ = predict_images(run, [images / "test"], decisions=decisions, all_probabilities=True)
    for before, after in zip(plain, scaled, strict=True):
        powers = np.array([*before.probabilities.values()]) ** 4
        assert [*after.probabilities.values()] == pytest.approx(powers / powers.sum(), abs=1e-9)
        assert after.probability == max(after.probabilities.values())
        assert after.probability > before.probability
