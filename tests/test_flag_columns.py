"""Tables with one column of 0 and 1 per label: columns, labels, splits, and what is refused."""

import json
import re

import pyarrow
import pytest
import torch
from label_tables import LABELS, folder, write_table
from pyarrow import parquet

from mixmo_fastai.cli.program import run as program
from mixmo_fastai.data.flag_columns import join_names, split_names
from mixmo_fastai.data.image_folder import read_image_table
from mixmo_fastai.data.label_tables import read_label_table
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import open_run

__all__ = ["folder"]  # fixtures

TAGS = [("cat",), ("cat", "dog"), (), ("dog", "eel"), ("eel",), ("cat", "dog", "eel")] * 4
ONE = [(LABELS[index % 3],) for index in range(24)]
GIVEN = TableColumns(label="cat,dog,eel")


def rows(tags=TAGS, values=("0", "1"), more=()):
    """A row per image: its path, a field per label and the fields of `more`."""
    return [
        [f"photos/{i:02d}.png", *(values[name in of] for name in LABELS), *(c[i] for c in more)]
        for i, of in enumerate(tags)
    ]


def write(folder, table, *columns, labels=LABELS):
    return write_table(folder / "a.csv", ["path", *labels, *columns], table)


def labels_of(table):
    return [table.multi.of[f"photos/{i:02d}.png"] for i in range(24)]


@pytest.mark.parametrize(
    "values", [("0", "1"), ("0.0", "1.0"), ("False", "True"), ("false", " true"), (" 0", "1 ")]
)
@pytest.mark.parametrize("columns", [TableColumns(), GIVEN])
def test_labels_are_the_columns_that_hold_1(folder, values, columns):
    table = read_label_table(write(folder, rows(values=values)), columns)
    assert table.multi.classes == LABELS
    assert labels_of(table) == TAGS
    assert table.columns.delimiter == ","
    (_, text), counts = table.notes
    assert "labels in 3 columns of 0 and 1 (cat, dog, eel);" in text
    assert counts == (
        "Labels",
        "several per image: 0 to 3, 1.5 on average; 4 images without any",
    )


def test_parquet_may_hold_flags_as_numbers_and_booleans(folder):
    columns = {"path": [row[0] for row in rows()]}
    columns |= {name: [name in of for of in TAGS] for name in ("cat", "dog")}
    columns["eel"] = [float("eel" in of) for of in TAGS]
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    assert labels_of(read_label_table(folder / "a.parquet")) == TAGS


def test_splits_and_groups_are_no_labels(folder):
    split = [["train", "valid", "test"][i // 12 + i // 18] for i in range(24)]
    groups = [f"p{i // 2}" for i in range(24)]
    is_valid = [str(int(i >= 12)) for i in range(24)]
    path = write(folder, rows(more=(split, groups)), "split", "patient")
    table = read_label_table(path)
    assert labels_of(table) == TAGS
    assert [len(table.parts[name][""]) for name in ("train", "valid", "test")] == [12, 6, 6]
    assert table.groups["photos/05.png"] == "p2"
    table = read_label_table(write(folder, rows(more=(is_valid,)), "is_valid"))
    assert table.multi.classes == LABELS
    assert len(table.parts["valid"][""]) == 12


def test_columns_are_given_beside_others(folder):
    ages = [str(20 + i) for i in range(24)]
    path = write(folder, rows(more=(ages,)), "age")
    with pytest.raises(InputError) as caught:
        read_label_table(path)
    assert "which column holds the labels?" in str(caught.value)
    assert str(caught.value).endswith("--set data.label_column=cat,dog,eel")
    assert labels_of(read_label_table(path, GIVEN)) == TAGS
    two = read_label_table(path, TableColumns(label="eel, cat"))
    assert labels_of(two) == [tuple(n for n in ("eel", "cat") if n in of) for of in TAGS]
    with pytest.raises(InputError, match=r"no column 'dgo'. Did you mean 'dog'\?"):
        read_label_table(path, TableColumns(label="cat,dgo"))


def test_column_called_label_has_priority(folder):
    path = write(folder, rows(ONE), labels=("label", "dog", "eel"))
    assert read_label_table(path).columns.label == "label"


@pytest.mark.parametrize("name", ["a, b", 'the "b"', "ä", " b "])
def test_names_may_hold_commas_and_quotes(folder, name):
    path = write(folder, rows(), labels=("cat", "dog", name))
    table = read_label_table(path)
    assert table.multi.classes == tuple(sorted(("cat", "dog", name.strip())))
    assert labels_of(read_label_table(path, table.columns)) == labels_of(table)
    assert split_names(join_names([name.strip(), "x"]), []) == (name.strip(), "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [("2", "holds '2'"), ("-1", "holds '-1'"), (" ", "is empty"), ("yes", "holds 'yes'")],
)
def test_other_values_are_refused_with_row_and_column(folder, value, message):
    table = rows()
    table[4][2] = value
    path = write(folder, table)
    with pytest.raises(InputError, match=re.escape(f"{path}, line 6: the column 'dog' {message}.")):
        read_label_table(path, GIVEN)


@pytest.mark.parametrize("more", [[], ["note"]])
def test_column_with_a_typo_is_named_instead_of_left_out(folder, more):
    table = rows(more=[["a note"] * 24 for _ in more])
    table[11][2] = "2"
    message = (
        "line 13: the column 'dog' holds '2', but 0 or 1 in most lines.\nCorrect the field. If "
        "this is no label, name the columns: --set data.label_column=cat,eel"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        read_label_table(write(folder, table, *more))


class TestOneLabelPerImage:
    """Tables in which every image has exactly one label."""

    def test_it_is_the_class(self, folder):
        table = read_label_table(write(folder, rows(ONE)))
        assert table.multi is None
        assert table.columns.delimiter == "none"
        assert {name: len(files) for name, files in table.parts["train"].items()} == dict.fromkeys(
            LABELS, 8
        )
        assert ("Labels", "one per image; to predict several: --set data.label_delimiter=,") in (
            table.notes
        )

    def test_a_delimiter_makes_it_one_of_several(self, folder):
        table = read_label_table(write(folder, rows(ONE)), TableColumns(delimiter=","))
        assert labels_of(table) == ONE

    def test_test_images_without_labels_do_not_count(self, folder):
        split = ["train"] * 18 + ["test"] * 6
        table = read_label_table(write(folder, rows([*ONE[:18], *[()] * 6], more=[split]), "split"))
        assert table.multi is None
        assert ("Not read", "split test: its images have no labels") in table.notes

    @pytest.mark.parametrize(
        ("tags", "message"),
        [((), "no column holds 1"), (("cat", "eel"), "2 columns of labels hold 1")],
    )
    def test_other_rows_are_refused(self, folder, tags, message):
        path = write(folder, rows([*ONE[:5], tags, *ONE[6:]]))
        with pytest.raises(InputError, match=f"line 7: {message}, but"):
            read_label_table(path, TableColumns(delimiter="none"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": ","}, "which column holds the labels?"),
        ({"label": "cat,owl"}, "data.label_column: .* has no column 'owl'"),
        ({"path": "path,cat"}, "data.path_column: .* has no column 'path,cat'"),
        ({"split": "cat,dog"}, "data.split_column: .* has no column 'cat,dog'"),
        ({"group": "cat,note"}, "data.group_column: .* has no column 'cat,note'"),
    ],
)
def test_only_labels_may_be_in_several_columns(folder, given, message):
    with pytest.raises(InputError, match=message):
        read_label_table(write(folder, rows()), TableColumns(**given))


@pytest.mark.parametrize("name", ["cat,", "cat,cat", " cat ,"])
def test_one_column_may_be_written_as_a_list(folder, name):
    table = read_label_table(write(folder, rows()), TableColumns(label=name))
    assert table.columns.label == "cat"
    assert table.notes


def test_column_without_images_is_named(folder):
    table = rows([tuple(name for name in of if name != "dog") for of in TAGS])
    found = read_label_table(write(folder, table))
    assert found.multi.classes == ("cat", "eel")
    assert ("Not used", "columns of labels without any 1: dog") in found.notes


def test_reopened_table_reads_the_same_columns(folder):
    first = read_image_table(write(folder, rows()), folder / "home", test_split=0.25)
    newer = write(folder, rows(more=(["1", "0"] * 12,)), "fox")
    again = read_image_table(newer, folder / "home", parts=first.parts, classes=first.classes)
    assert again.classes == LABELS
    for part in ("train", "test"):
        found, expected = getattr(again, part), getattr(first, part)
        assert torch.equal(found.labels, expected.labels)
        assert [*map(found.name, range(len(found)))] == [*map(expected.name, range(len(expected)))]


@pytest.mark.slow
@pytest.mark.parametrize("tags", [TAGS, ONE], ids=["several", "one"])
def test_commands_train_evaluate_and_predict(folder, capsys, tags):
    groups = [f"p{i // 2}" for i in range(24)]
    path, out = write(folder, rows(tags, more=(groups,)), "patient"), folder / "run"
    flags = "--arch wrn10_1 --epochs 1 --batch-size 8 --valid-split 0.25 --device cpu --threads 1"
    assert program(["fit", str(path), *flags.split(), "--quiet", "--out", str(out)]) == 0
    run = open_run(out)
    assert run.data_facts().is_multi_label == (tags is TAGS)
    assert run.data_facts().classes == LABELS
    drawn = run.split()["drawn"]
    patients = [{int(name[7:9]) // 2 for name in drawn[part]} for part in ("train", "test")]
    assert not patients[0] & patients[1]
    capsys.readouterr()
    assert program(["eval", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == run.metrics()["test"]
    assert program(["predict", str(out), str(folder / "photos/00.png"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    assert row["label" if tags is ONE else "labels"] is not None
