"""A column of folds: which images are trained on, and what is refused."""

import json
from dataclasses import asdict

import pytest
from label_tables import folder, simple_rows, write_table

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.label_tables import read_label_table
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.data.table_images import choose_table_images, reopen_table_images
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import open_run

__all__ = ["folder"]  # fixtures


def rows_of(folder, header=("path", "label", "fold"), folds=("0", "1", "2")):
    """Write a table whose i-th image of each class is in the i-th fold, and so on."""
    rows = [[*row, folds[i // 3 % len(folds)]] for i, row in enumerate(simple_rows())]
    return write_table(folder / "a.csv", list(header), rows)


def splits_of(table):
    return {
        split: sorted(file for files in by_class.values() for file in files)
        for split, by_class in table.parts.items()
    }


def expected(fold, num_folds=3, paths=None):
    paths = [path for path, _ in simple_rows()] if paths is None else paths
    valid = {path for i, path in enumerate(paths) if i // 3 % num_folds == fold}
    return {"train": sorted({*paths} - valid), "valid": sorted(valid)}


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_the_fold_is_for_validation_and_the_others_for_training(folder, fold):
    table = read_label_table(rows_of(folder), TableColumns(fold=str(fold)))
    assert splits_of(table) == expected(fold)
    assert table.columns.split == "fold"
    assert "folds in 'fold'" in dict(table.notes)["Table"]


@pytest.mark.parametrize(
    ("name", "folds", "fold"),
    [
        ("K_Fold", ("0", "1", "2"), "1"),
        ("fold_id", ("0.0", "1.0", "2.0"), "1"),  # as pandas writes them with an empty field
        ("CV_fold", ("0", "1", "2"), "1.0"),
        ("Fold", ("a", "B", "c"), "b"),
    ],
)
def test_folds_are_found_by_names_and_spellings(folder, name, folds, fold):
    path = rows_of(folder, ("path", "label", name), folds)
    assert splits_of(read_label_table(path, TableColumns(fold=fold))) == expected(1)
    given = TableColumns(split=name, fold=fold)
    assert splits_of(read_label_table(path, given)) == expected(1)


def test_another_column_may_hold_the_folds_and_one_of_them_the_test_set(folder):
    path = rows_of(folder, ("path", "label", "site"), ("x", "test", "y"))
    table = read_label_table(path, TableColumns(split="site", fold="y"))
    splits = splits_of(table)
    assert splits["test"] == expected(1)["valid"]
    assert splits["valid"] == expected(2)["valid"]
    assert splits["train"] == expected(0)["valid"]
    _, chosen = choose_table_images(path, TableColumns(split="site", fold="y"))
    assert ("Splits", "validation (fold y) and testing as in 'site'") in chosen.notes


def test_the_fold_is_kept_with_the_run(folder):
    path = rows_of(folder)
    _, chosen = choose_table_images(path, TableColumns(fold="2"))
    assert chosen.parts.columns["fold"] == "2"
    assert not any(chosen.test.values())  # the fold is evaluated, and nothing is drawn
    parts = DataParts.from_mapping(asdict(chosen.parts), path)
    assert parts == chosen.parts
    _, again = reopen_table_images(path, parts)
    assert (again.train, again.valid) == (chosen.train, chosen.valid)


def test_an_unused_column_of_folds_is_named(folder):
    notes = dict(read_label_table(rows_of(folder)).notes)
    assert notes["Not used"] == "column 'fold'; to validate on one fold: --set data.fold=0"


@pytest.mark.parametrize(
    ("folds", "columns", "message"),
    [
        (
            ("0", "1"),
            {"fold": "2"},
            r"has no row of data\.fold=2\.\nIt holds 0, 1",
        ),
        (("0", "0"), {"fold": "0"}, "no fold to train on besides data"),
        (("0", "1"), {"fold": "0", "split": "folds"}, "no column 'folds'. Did you mean 'fold'"),
        (("0", ""), {"fold": "0"}, "the split is empty"),
        (("0", "holdout"), {"fold": "0"}, "no fold to train on besides data"),
    ],
)
def test_wrong_folds_are_refused(folder, folds, columns, message):
    with pytest.raises(InputError, match=message):
        read_label_table(rows_of(folder, folds=folds), TableColumns(**columns))


def test_another_column_must_not_mark_test_images(folder):
    for split, is_refused in (("test", True), ("train", False)):
        rows = [[*row, str(i // 3 % 2), split] for i, row in enumerate(simple_rows())]
        path = write_table(folder / "a.csv", ["path", "label", "fold", "split"], rows)
        if is_refused:
            with pytest.raises(InputError, match=r"'split' marks test images.*\n.*in 'fold'"):
                read_label_table(path, TableColumns(fold="1"))
        else:
            assert splits_of(read_label_table(path, TableColumns(fold="1"))) == expected(1, 2)


@pytest.mark.slow
def test_runs_of_different_folds_are_not_compared(folder, tmp_path, capsys):
    flags = ["--arch", "wrn10_1", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    path = rows_of(folder)
    runs = []
    for fold in (0, 1, 1):
        runs.append(str(tmp_path / f"run-{len(runs)}"))
        setting = ["--set", f"data.fold={fold}", "--seed", str(len(runs)), "--out", runs[-1]]
        assert program(["fit", str(path), *flags, *setting]) == 0
    assert program(["compare", *runs[:2]]) == 2
    assert "have different test images, or validation" in " ".join(capsys.readouterr().err.split())
    assert program(["compare", *runs[1:], "--json"]) == 0
    for run, compared in zip(runs[1:], json.loads(capsys.readouterr().out)["runs"], strict=True):
        assert compared["valid"]["nll"] == pytest.approx(open_run(run).metrics()["valid"]["nll"])


def test_a_missing_column_of_folds_is_asked_for(folder):
    path = rows_of(folder, ("path", "label", "part"))
    with pytest.raises(InputError, match=r"data\.fold: which column .* holds the folds\?") as error:
        read_label_table(path, TableColumns(fold="1"))
    assert "--set data.split_column=NAME" in str(error.value)


def test_groups_are_kept_together(folder):
    rows = [[*row, str(i // 3 % 2), f"p{i // 6}"] for i, row in enumerate(simple_rows())]
    path = write_table(folder / "a.csv", ["path", "label", "fold", "patient"], rows)
    with pytest.raises(InputError, match="patient 'p0' is in"):
        read_label_table(path, TableColumns(fold="1"))


def test_folds_and_columns_may_be_written_as_numbers(tmp_path):
    table = str(write_table(tmp_path / "a.csv", ["path", "12", "fold"], []))
    recipe = resolve_recipe(table, assignments=["data.fold=3", "data.label_column=12"])
    assert (recipe.data.fold, recipe.data.label_column) == ("3", "12")
    (tmp_path / "recipe.toml").write_text("[data]\nfold = 0\n")
    assert load_recipe(tmp_path / "recipe.toml").data.fold == "0"
    assert resolve_recipe(table, assignments=["data.fold=2.0"]).data.fold == "2"
    with pytest.raises(InputError, match=r"data\.fold is 1\.5; it must be a string"):
        resolve_recipe(table, assignments=["data.fold=1.5"])


def test_folds_are_for_tables(folder):
    with pytest.raises(InputError, match=r"data\.fold are for tables of labels"):
        load_source(folder / "photos", columns=TableColumns(fold="1"))
