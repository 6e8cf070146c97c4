"""Rows of tables of labels: without a label, labelled by numbers, or without their image."""

import re

import pytest
from label_tables import folder, simple_rows, write_table

from mixmo_fastai.data.label_tables import read_label_table
from mixmo_fastai.errors import InputError

__all__ = ["folder"]  # fixtures


def test_numbers_have_no_likely_spelling(folder):
    rows = [[path, ["0010", "0020"][i % 2]] for i, (path, _) in enumerate(simple_rows())]
    rows[4][1] = "0011"
    path = write_table(folder / "a.csv", ["path", "label"], rows)
    assert read_label_table(path).notes[1] == ("Seen once", "'0011' in line 6")
    split = [[*row, "test" if i == 4 else "train"] for i, row in enumerate(rows)]
    path = write_table(folder / "a.csv", ["path", "label", "split"], split)
    with pytest.raises(InputError, match=r"no training image has the label '0011'\.$"):
        read_label_table(path)


@pytest.mark.parametrize("text", ["nan", "NaN", "<NA>", " ", ""])
def test_rows_without_a_label_are_counted(folder, text):
    rows = simple_rows()
    for index in (3, 7, 9):
        rows[index][1] = text
    path = write_table(folder / "a.csv", ["path", "label"], rows)
    shown = repr(text) if text.strip() else "empty"
    message = f"a.csv, line 5: the label is {shown} (3 of 24 rows have none).\nRemove rows without"
    with pytest.raises(InputError, match=re.escape(message)):
        read_label_table(path)
    for row in rows[3:]:
        row[1] = text
    path = write_table(folder / "a.csv", ["path", "label"], rows)
    with pytest.raises(InputError, match="21 of 24 rows have none"):
        read_label_table(path)


@pytest.mark.parametrize("text", ["nan", ""])
def test_test_images_may_be_without_labels(folder, text):
    rows = [[*row, "test" if i >= 18 else "train"] for i, row in enumerate(simple_rows())]
    for row in rows[18:]:
        row[1] = text
    table = read_label_table(write_table(folder / "a.csv", ["path", "label", "split"], rows))
    assert ("Not read", "split test: its images have no labels") in table.notes
    assert {part: sum(map(len, files.values())) for part, files in table.parts.items()} == {
        "train": 18
    }
    rows[19][0] = "missing.png"  # nothing else of these rows is read
    read_label_table(write_table(folder / "a.csv", ["path", "label", "split"], rows))
    grouped = [[*row, "p1"] for row in rows]
    header = ["path", "label", "split", "patient"]
    read_label_table(write_table(folder / "a.csv", header, grouped))
    rows[20][1] = "cat"
    with pytest.raises(InputError, match=r"line 20: the label is .* \(5 of 24 rows have none\)"):
        read_label_table(write_table(folder / "b.csv", ["path", "label", "split"], rows))


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("photos/04.PNG", "photos/04.png"),
        ("04.jpg", "photos/04.png"),
        ("a\\b.png", "deep/B.jpeg"),
        ("deep/01.gif", "deep/01.bmp"),  # not photos/01.png
    ],
)
def test_similar_image_is_named_for_a_missing_one(folder, name, guess):
    (folder / "deep").mkdir()
    (folder / "photos/09.png").rename(folder / "deep/B.jpeg")
    rows = [row for row in simple_rows() if "09" not in row[0]]
    (folder / "deep/01.bmp").write_bytes((folder / "photos/01.png").read_bytes())
    rows[4][0] = name
    path = write_table(folder / "a.csv", ["path", "label"], rows)
    expected = f"line 6: there is no image {name!r}. Did you mean {guess!r}?\nPaths are"
    with pytest.raises(InputError, match=re.escape(expected)):
        read_label_table(path)
    rows[4][0] = "other/01.tif"  # two images are called so
    path = write_table(folder / "a.csv", ["path", "label"], rows)
    with pytest.raises(InputError, match=r"there is no image 'other/01.tif'\.\nPaths are"):
        read_label_table(path)
