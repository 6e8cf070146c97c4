"""Tables of labels: which image has which label, split and group, and what is refused."""

import re
from pathlib import Path

import pyarrow
import pytest
from label_tables import LABELS, folder, simple_rows, write_images, write_table
from pyarrow import parquet

from mixmo_fastai.config.choices import is_table
from mixmo_fastai.data.label_tables import read_label_table
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.errors import InputError

__all__ = ["folder"]  # fixtures


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


@pytest.mark.parametrize(
    ("column", "of_0", "of_1"),
    [
        ("is_train", "valid", "train"),
        ("Is_Training", "valid", "train"),
        ("is_test", "train", "test"),
    ],
)
def test_named_column_of_booleans_means_what_it_says(folder, column, of_0, of_1):
    split = ["0"] * 12 + ["1"] * 12
    rows = [[*row, value] for row, value in zip(simple_rows(), split, strict=True)]
    path = write_table(folder / "a.csv", ["path", "label", column], rows)
    parts = read_label_table(path, TableColumns(split=column)).parts
    for part, number in ((of_0, 0), (of_1, 12)):
        files = sorted(file for files in parts[part].values() for file in files)
        assert files == sorted(row[0] for row in rows[number : number + 12])


@pytest.mark.parametrize("name", ["filename", "Image"])
def test_named_column_of_paths_may_lack_the_first_image(folder, name):
    """The labels are names of images without suffix, by chance."""
    rows = [[f"{index + 1:02d}.png", f"{index % 3 + 1:02d}"] for index in range(24)]
    path = write_table(folder / "a.csv", [name, "label"], rows[::-1])  # 24.png is missing
    columns = TableColumns(folder="photos")
    with pytest.raises(InputError, match=r"line 2: there is no image '24\.png'"):
        read_label_table(path, columns)
    table = read_label_table(write_table(folder / "a.csv", [name, "label"], rows[:23]), columns)
    assert (table.columns.path, table.columns.label) == (name, "label")


def test_home_folder_of_images_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "tables").mkdir()
    rows = [[path.removeprefix("photos/"), label] for path, label in simple_rows()]
    path = write_table(folder / "tables" / "a.csv", ["path", "label"], rows)
    table = read_label_table(path, TableColumns(folder="~/photos"))
    assert sum(map(len, table.parts["train"].values())) == 24


def test_other_column_of_booleans_is_no_split(folder):
    rows = [[*row, "01"[i % 2]] for i, row in enumerate(simple_rows())]
    path = write_table(folder / "a.csv", ["path", "label", "is_old"], rows)
    with pytest.raises(InputError, match="line 2: '0' is not a split"):
        read_label_table(path, TableColumns(split="is_old"))


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


def test_numbers_are_classes_in_their_order(folder):
    rows = [[path, 10 * index % 30] for index, (path, _) in enumerate(simple_rows())]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert [*table.parts["train"]] == ["0", "10", "20"]
    rows = [[path, (2, 10, 1)[index % 3]] for index, (path, _) in enumerate(simple_rows())]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert [*table.parts["train"]] == ["1", "2", "10"]


def test_whole_numbers_with_decimals_are_whole_numbers(folder):
    """As pandas writes them."""
    labels = ("2.0", "10.0", "1")
    rows = [[path, labels[index % 3]] for index, (path, _) in enumerate(simple_rows())]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert [*table.parts["train"]] == ["1", "2", "10"]
    assert ("Numbers", "labels such as 10.0 are read as 10") in table.notes
    several = [[path, f"{label}|3.0"] for path, label in rows]
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], several))
    assert table.multi.classes == ("1", "2", "3", "10")
    rows[0][1] = "0.5"
    table = read_label_table(write_table(folder / "a.csv", ["path", "label"], rows))
    assert [*table.parts["train"]] == ["0.5", "1", "10.0", "2.0"]


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
        (
            altered(5, patient=""),
            "line 7: the group is empty.\nFill it in, or ignore groups: --set data.group_column=",
        ),
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
