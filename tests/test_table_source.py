"""The data source of a table of labels: images, splits, groups, and later commands."""

import csv
from dataclasses import asdict, replace

import pytest
import torch
from label_tables import folder, simple_rows, write_images, write_table

from mixmo_fastai.data.cache import CACHE_LIMIT
from mixmo_fastai.data.class_files import group_indices
from mixmo_fastai.data.fingerprint import fingerprint
from mixmo_fastai.data.image_folder import read_image_table
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.splits import split_calibration, split_validation
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.data.table_images import choose_table_images, reopen_table_images
from mixmo_fastai.errors import InputError

__all__ = ["folder"]  # fixtures
LABELS = ("cat", "dog", "eel")


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


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("label", ["", "nan"])
def test_split_that_is_labelled_later_does_not_change_a_run(folder, split, label):
    rows = [[*row, split if i >= 18 else "train"] for i, row in enumerate(simple_rows())]
    later = [[*row] for row in rows]
    for row in rows[18:]:
        row[1] = label
    header = ["path", "label", "split"]
    _, chosen = choose_table_images(
        write_table(folder / "a.csv", header, rows), TableColumns(), 0.25
    )
    assert (chosen.parts.valid, chosen.parts.test) == (None, None)
    drawn = [file for files in chosen.test.values() for file in files]
    assert len(drawn) == 6
    assert max(drawn) < "photos/18.png"  # of the images with a label
    path = write_table(folder / "a.csv", header, later)
    _, again = reopen_table_images(path, chosen.parts, LABELS)
    assert (again.train, again.test) == (chosen.train, chosen.test)
    assert again.valid is None
    assert any(name == "Test set" for name, _ in again.notes)
    assert not any(name == "Splits" for name, _ in again.notes)


def test_cached_statistics_are_those_of_the_split(folder, tmp_path):
    """The same files in the same order, but fewer of them for training."""
    means = []
    for number in (8, 20):
        split = ["train"] * number + ["test"] * (24 - number)
        rows = [
            [path, f"{label},x", part]
            for (path, label), part in zip(simple_rows(), split, strict=True)
        ]
        path = write_table(folder / "a.csv", ["path", "labels", "split"], rows)
        cached, empty = (
            read_image_table(path, tmp_path / home, columns=TableColumns(delimiter=","))
            for home in ("home", f"other{number}")
        )
        assert (cached.mean, cached.std) == (empty.mean, empty.std)
        means.append(cached.mean)
    assert means[0] != means[1]


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
