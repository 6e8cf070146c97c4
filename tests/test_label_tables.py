"""Tables of labels: which image has which label, split and group, and what is refused."""

import csv
import re
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mixmo_fastai.data.cache import CACHE_LIMIT
from mixmo_fastai.data.class_files import group_indices
from mixmo_fastai.data.fingerprint import fingerprint
from mixmo_fastai.data.image_folder import read_image_table
from mixmo_fastai.data.label_tables import TableColumns, is_table, read_label_table
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.splits import split_calibration, split_validation
from mixmo_fastai.data.table_images import choose_table_images, reopen_table_images
from mixmo_fastai.errors import InputError

LABELS = ("cat", "dog", "eel")


def write_images(folder, names):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(path)


def write_table(path, header, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def folder(tmp_path):
    """Images photos/00.png … photos/23.png, whose first channel is their number."""
    write_images(tmp_path, [f"photos/{index:02d}.png" for index in range(24)])
    return tmp_path


def simple_rows(count=24):
    return [[f"photos/{index:02d}.png", LABELS[index % 3]] for index in range(count)]


def files_of(table, split="train"):
    return {label: set(files) for label, files in table.parts[split].items()}


EXPECTED = {
    label: {f"photos/{i:02d}.png" for i in range(k, 24, 3)} for k, label in enumerate(LABELS)
}


@pytest.mark.parametrize(
    ("header", "change"),
    [
        (["path", "label"], lambda path, label: [path, label]),
        (["Label", "FileName"], lambda path, label: [label, path]),
        (["image_id", "dx"], lambda path, label: [Path(path).stem, label]),
        (["id", "breed"], lambda path, label: [Path(path).name, label]),
        (["picture of", "what it shows"], lambda path, label: [f" {path} ", f"{label} "]),
        (["name", "age", "class"], lambda path, label: [f"./{path}", "7", label]),
        (["label", "image", "id"], lambda path, label: [label, path.replace("/", "\\"), path[7:9]]),
    ],
)
def test_columns_and_files_are_found(folder, header, change):
    rows = [change(*row) for row in simple_rows()]
    for delimiter in ",;\t":
        table = read_label_table(write_table(folder / "a.csv", header, rows, delimiter))
        assert files_of(table) == EXPECTED
        assert table.groups == {}
        assert table.columns.split == table.columns.group == "none"
    ((label, text),) = table.notes
    assert label == "Table"
    assert text.startswith("24 rows; ")
    assert f"paths in {table.columns.path!r}, labels in {table.columns.label!r}" in text


def test_paths_may_be_absolute_or_in_another_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [[str(folder / path), label] for path, label in simple_rows()]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert files_of(table) == EXPECTED  # below the folder of the table
    table = read_label_table(write_table(elsewhere / "a.csv", ["path", "label"], rows))
    assert files_of(table)["cat"] == {str(folder / path) for path in EXPECTED["cat"]}
    path = write_table(elsewhere / "b.csv", ["path", "label"], simple_rows())
    given = TableColumns(folder=str(folder))
    assert files_of(read_label_table(path, given)) == EXPECTED
    (elsewhere / "link").symlink_to(folder)
    assert files_of(read_label_table(path, TableColumns(folder="link"))) == EXPECTED


def test_given_columns_have_priority(folder):
    rows = [[path, "wrong", label, "g"] for path, label in simple_rows()]
    path = write_table(folder / "a.csv", ["path", "label", "truth", "group"], rows)
    table = read_label_table(path, TableColumns(label="truth", group="none"))
    assert files_of(table) == EXPECTED
    assert table.groups == {}
    for columns, message in (
        (TableColumns(label="turth"), "has no column 'turth'. Did you mean 'truth'?"),
        (TableColumns(split="when"), "data.split_column"),
        (TableColumns(folder="nowhere"), "data.image_folder: there is no folder"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            read_label_table(path, columns)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ("train", "val", "test")),
        ("Subset", ("Training", "validation", "Testing")),
        ("set", ("train", "valid", "test")),
        ("is_valid", ("False", "True", "False")),
        ("is_valid", ("0", "1", "0")),
    ],
)
def test_splits_are_read(folder, column, values):
    split = [values[0]] * 12 + [values[1]] * 6 + [values[2]] * 6
    rows = [[*row, value] for row, value in zip(simple_rows(), split, strict=True)]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label", column], rows))
    numbers = {
        name: sorted(int(file[7:9]) for files in part.values() for file in files)
        for name, part in table.parts.items()
    }
    if column == "is_valid":
        assert numbers == {"train": [*range(12), *range(18, 24)], "valid": [*range(12, 18)]}
    else:
        expected = {"train": [*range(12)], "valid": [*range(12, 18)], "test": [*range(18, 24)]}
        assert numbers == expected
    assert table.columns.split == column


def test_column_that_holds_no_splits_is_not_guessed(folder):
    rows = [[*row, "AB"[i % 2]] for i, row in enumerate(simple_rows())]
    path = write_table(folder / "a.csv", ["path", "label", "set"], rows)
    table = read_label_table(path)
    assert table.columns.split == "none"
    text = "column 'set', which holds no splits such as train, but 'A'"
    assert table.notes[1] == ("Not used", text)
    with pytest.raises(InputError, match=r"line 2: 'A' is not a split\.\nSplits are train, valid"):
        read_label_table(path, TableColumns(split="set"))


@pytest.mark.parametrize(("column", "value"), [("split", "eval"), ("set", "1"), ("is_valid", "2")])
def test_value_that_is_no_split_is_refused_beside_splits(folder, column, value):
    first = "0" if column == "is_valid" else "train"
    rows = [[*row, first if i < 20 else value] for i, row in enumerate(simple_rows())]
    path = write_table(folder / "a.csv", ["path", "label", column], rows)
    with pytest.raises(InputError, match=f"line 22: '{value}' is not a split"):
        read_label_table(path)


def test_drawn_images_depend_on_no_names_of_groups_and_no_order_of_rows(folder, tmp_path):
    rows = [[*row, f"p{index // 2}"] for index, row in enumerate(simple_rows())]
    found = []
    for change in (lambda each: each, lambda each: [*each[:2], f"x{99 - int(each[2][1:])}"]):
        for order in (rows, rows[::-1]):
            path = write_table(folder / "a.csv", ["path", "label", "patient"], map(change, order))
            source = read_image_table(path, tmp_path / "home", test_split=0.25)
            train, valid = split_validation(source.train, 0.25)
            parts = (train, valid, source.test)
            found.append([[part.name(i) for i in range(len(part))] for part in parts])
            prints = fingerprint(source)
    assert found[1:] == found[:3]
    regrouped = [[*row[:2], f"p{index // 3}"] for index, row in enumerate(rows)]
    path = write_table(folder / "b.csv", ["path", "label", "patient"], regrouped)
    other = read_image_table(path, tmp_path / "home", test_split=0.25)
    same_names = replace(other, train=source.train.files, test=source.test)
    assert fingerprint(replace(same_names, train=replace(source.train, groups=None))) != prints


def test_numbers_are_classes_in_their_order(folder):
    rows = [[path, 10 * index % 30] for index, (path, _) in enumerate(simple_rows())]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert [*table.parts["train"]] == ["0", "10", "20"]
    rows = [[path, (2, 10, 1)[index % 3]] for index, (path, _) in enumerate(simple_rows())]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert [*table.parts["train"]] == ["1", "2", "10"]


def test_labels_seen_once_are_named(folder):
    rows = simple_rows()
    rows[4][1] = "dgo"
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert table.notes[1] == ("Seen once", "'dgo' in line 6 (did you mean 'dog'?)")


def altered(row, **values):
    return lambda rows: rows[row].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (altered(3, label=" "), "line 5: the label is empty."),
        (altered(3, path=""), "line 5: the path is empty."),
        (altered(5, split=""), "line 7: the split is empty."),
        (altered(5, patient=""), "line 7: the group is empty."),
        (altered(5, path="photos/77.png"), "line 7: there is no image 'photos/77.png'.\nPaths are"),
        (altered(5, path="photos/77"), "line 7: there is no image 'photos/77'.\nPaths are"),
        (altered(5, path="/photos/05.png"), "line 7: there is no image '/photos/05.png'."),
        (altered(5, path="photos"), "line 7: there is no image 'photos'."),
        (
            altered(5, path="./photos/02.png"),
            "line 7: the image './photos/02.png' is already in line 4.\nKeep one row per image.",
        ),
        (
            altered(5, path="photos/../photos/02.png"),
            "line 7: the image 'photos/../photos/02.png' is already in line 4.",
        ),
        (altered(5, path="link/02.png"), "line 7: the image 'link/02.png' is already in line 4."),
        (altered(5, path="x" * 400), "line 7: there is no image 'xxx"),
        (altered(20, label="fox"), "line 22: no training image has the label 'fox'."),
        (altered(20, label="dgo"), "line 22: no training image has the label 'dgo'. Did you mean"),
        (
            altered(20, patient="p3"),
            "line 22: patient 'p3' is in test, but in train in line 5.\nKeep each group in one",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(folder, change, message):
    rows = [
        {"path": path, "label": label, "split": "test" if i >= 18 else "train", "patient": f"p{i}"}
        for i, (path, label) in enumerate(simple_rows())
    ]
    change(rows)
    (folder / "link").symlink_to("photos")
    path = write_table(folder / "a.csv", [*rows[0]], [row.values() for row in rows])
    with pytest.raises(InputError) as caught:
        read_label_table(path)
    assert f"{path}, {message}" in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_several_rows_without_images_are_counted(folder):
    rows = [[f"x{path}", label] for path, label in simple_rows()]
    rows[0][0] = "photos/00.png"
    with pytest.raises(InputError, match=r"line 3: .*'xphotos/01.png' \(23 of 24 rows have none"):
        read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            ["path", "label"],
            [["photos/00.png", "cat"], ["photos/01.png", "cat"]],
            "the label 'cat'",
        ),
        (["a", "b", "c"], [["photos/00.png", "cat", "dog"]], "which column holds the labels?"),
        (["a", "b"], [["x", "cat"], ["y", "dog"]], "which column holds the paths?"),
        (["path", "label"], [], "has no rows.\nUse one row per image"),
        (["path", "path"], [["a", "b"]], "the column 'path' occurs 2 times"),
        (["path", "label"], [["photos/00.png"]], "line 2: 1 fields; the header has 2"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(folder, header, rows, message):
    path = write_table(folder / "a.csv", header, rows)
    with pytest.raises(InputError) as caught:
        read_label_table(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_several_files_of_one_name_are_refused(folder):
    write_images(folder, ["more/05.png"])
    rows = [[path[7:], label] for path, label in simple_rows()]
    with pytest.raises(InputError, match=r"line 7: 2 images are called '05.png', such as more/05"):
        read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    rows[5][0] = "photos/05"  # enough of the path
    assert files_of(read_label_table(write_table(folder / "b.csv", ["path", "label"], rows)))


def test_parquet_is_read_like_text(folder):
    rows = simple_rows()
    columns = {"path": [path for path, _ in rows], "label": [i % 3 for i in range(24)]}
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    table = read_label_table(path)
    assert [*table.parts["train"]] == ["0", "1", "2"]
    assert files_of(table)["1"] == EXPECTED["dog"]
    columns["label"][4] = None  # makes the column floats in pandas, nulls in arrow
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(InputError, match=r"a.parquet, row 5: the label is empty"):
        read_label_table(path)
    path.write_bytes(b"no table")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_label_table(path)


def test_parquet_with_images_is_refused_with_advice(folder):
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table({"image": [{"bytes": b"x"}] * 2, "label": [0, 1]}), path)
    with pytest.raises(InputError, match=f"'image' does not hold text.\nIf .*pass hf:{path}"):
        read_label_table(path)


def test_long_texts_beside_paths_are_no_paths(folder):
    rows = [["long text " * 50, path, label] for path, label in simple_rows()]
    table = read_label_table(write_table(folder / "a.csv", ["caption", "where", "label"], rows))
    assert table.columns.path == "where"


def test_missing_image_that_was_left_out_is_known_by_its_short_name(folder):
    rows = [[Path(path).stem, label] for path, label in simple_rows()]
    path = write_table(folder / "a.csv", ["id", "label"], rows)
    (folder / "photos/03.png").unlink()
    with pytest.raises(InputError, match="there is no image '03'"):
        read_label_table(path)
    table = read_label_table(path, left_out=["photos/03.png"])
    assert sum(map(len, table.parts["train"].values())) == 23


def test_names_of_tables():
    assert all(map(is_table, ("a.csv", "b/A.CSV", Path("c.tsv"), "x.parquet")))
    assert not any(map(is_table, ("digits", "csv", "a.csv/images", "a.xlsx")))


class TestSource:
    """The data source of a table."""

    @pytest.fixture
    def grouped(self, folder):
        rows = [[*row, f"p{index // 2}"] for index, row in enumerate(simple_rows())]
        return write_table(folder / "a.csv", ["path", "label", "patient"], rows)

    @pytest.mark.parametrize("limit", [0, CACHE_LIMIT])
    def test_images_have_their_labels(self, folder, grouped, tmp_path, limit):
        source = read_image_table(grouped, tmp_path / "home", cache_limit=limit)
        assert source.name == "a"
        assert source.classes == LABELS
        numbers = {}
        for name in ("train", "test"):
            images = getattr(source, name)
            numbers[name] = images.tensor()[:, 0, 0, 0].tolist()
            assert images.labels.tolist() == [number % 3 for number in numbers[name]]
            assert [images.name(i) for i in range(len(images))] == [
                f"photos/{number:02d}.png" for number in numbers[name]
            ]
        assert sorted(numbers["train"] + numbers["test"]) == [*range(24)]
        assert not {n // 2 for n in numbers["train"]} & {n // 2 for n in numbers["test"]}

    def test_groups_stay_together_in_every_split(self, grouped, tmp_path):
        source = read_image_table(grouped, tmp_path / "home", test_split=0.25)
        train, valid = split_validation(source.train, 0.25)
        valid, calibration = split_calibration(valid, 0.5)
        parts = [train, valid, calibration, source.test]
        groups = [{int(part.name(i)[7:9]) // 2 for i in range(len(part))} for part in parts]
        assert sum(map(len, groups)) == len(set().union(*groups)) == 12
        assert sum(map(len, parts)) == 24
        assert all(groups)

    def test_earlier_split_is_read_again(self, folder, grouped):
        root, chosen = choose_table_images(grouped, TableColumns(), 0.25)
        assert root == folder
        stored = replace(chosen.parts)
        assert stored.columns["group"] == "patient"
        rows = [*csv.reader(grouped.read_text().splitlines())]
        write_images(folder, ["photos/new.png"])
        write_table(grouped, [*rows[0], "label_name"], [
            *([*row, "x"] for row in reversed(rows[1:])), ["photos/new.png", "cat", "p0", "x"],
        ])  # fmt: skip
        _, again = reopen_table_images(grouped, stored, LABELS)
        assert {k: {*v} for k, v in again.train.items()} == {
            k: {*v} for k, v in chosen.train.items()
        }
        assert {k: {*v} for k, v in again.test.items()} == {k: {*v} for k, v in chosen.test.items()}
        assert (
            "Left out",
            "1 image added after the split was drawn: photos/new.png",
        ) in again.notes
        write_table(grouped, rows[0], rows[2:])
        with pytest.raises(InputError, match=r"1 of the run's 24 images is no longer in .*a.csv"):
            reopen_table_images(grouped, stored, LABELS)
        _, again = reopen_table_images(grouped, stored, LABELS, left_out=["photos/00.png"])
        assert sum(map(len, again.train.values())) + sum(map(len, again.test.values())) == 23

    def test_parts_survive_the_run_folder(self, grouped):
        _, chosen = choose_table_images(grouped, TableColumns())
        assert DataParts.from_mapping(asdict(chosen.parts), grouped) == chosen.parts

    def test_test_split_is_refused_if_there_is_one(self, folder):
        rows = [[*row, "test" if i > 17 else "train"] for i, row in enumerate(simple_rows())]
        path = write_table(folder / "a.csv", ["path", "label", "split"], rows)
        with pytest.raises(InputError, match="--test-split is for data without test images"):
            choose_table_images(path, TableColumns(), 0.2)
        _, chosen = choose_table_images(path, TableColumns())
        assert chosen.parts.drawn is None
        assert ("Splits", "testing as in 'split'") in chosen.notes
        _, chosen = choose_table_images(path, TableColumns(split="none"), 0.5)
        assert len(chosen.parts.drawn.test) == 12

    def test_columns_are_for_tables_only(self):
        with pytest.raises(InputError, match=r"are for tables of labels; 'digits' is none"):
            load_source("digits", columns=TableColumns(label="x"))

    def test_missing_table_is_reported(self, tmp_path):
        with pytest.raises(InputError, match="There is no table"):
            load_source(str(tmp_path / "a.csv"))


def test_groups_are_numbered():
    assert group_indices(["a", "b"], {}) is None
    groups = {"a": "y", "b": "x", "c": "y"}
    assert group_indices(["a", "b", "c"], groups).tolist() == [0, 1, 0]
    assert group_indices([], groups).dtype == torch.int64
