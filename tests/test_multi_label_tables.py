"""Tables with several labels per image: delimiters, targets, splits, and what is refused."""

import re

import pyarrow
import pytest
import torch
from label_tables import folder, write_table
from pyarrow import parquet

from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_folder import read_image_table
from mixmo_fastai.data.image_sets import ArrayImages
from mixmo_fastai.data.label_tables import read_label_table
from mixmo_fastai.data.multi_labels import ALL, find_delimiter
from mixmo_fastai.data.splits import draw_groups, draw_test, limit_images, split_calibration
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.data.table_images import choose_table_images
from mixmo_fastai.errors import InputError

__all__ = ["folder"]  # fixtures

TAGS = [("cat",), ("cat", "dog"), (), ("dog", "eel"), ("eel",), ("cat", "dog", "eel")] * 4


def rows(delimiter):
    return [[f"photos/{i:02d}.png", delimiter.join(tags)] for i, tags in enumerate(TAGS)]


@pytest.mark.parametrize(
    ("column", "delimiter"),
    [("label", "|"), ("label", ";"), ("tags", " "), ("Finding Labels", "|"), ("labels", ", ")],
)
def test_delimiters_are_found(folder, column, delimiter):
    path = write_table(folder / "a.csv", ["path", column], rows(delimiter))
    table = read_label_table(path)
    assert table.columns.delimiter == delimiter[0]
    assert table.multi.classes == ("cat", "dog", "eel")
    assert {tuple(sorted(table.multi.of[f"photos/{i:02d}.png"])) for i in (5, 11)} == {TAGS[5]}
    assert [tuple(table.multi.of[f"photos/{i:02d}.png"]) for i in range(24)] == TAGS
    (_, text), (label, counts) = table.notes
    assert f"labels in {column!r} separated by {delimiter[0]!r}" in text
    assert (label, counts) == (
        "Labels",
        "several per image: 0 to 3, 1.5 on average; 4 images without any; for one per image: "
        "--set data.label_delimiter=none",
    )


@pytest.mark.parametrize("delimiter", ["", ","])
@pytest.mark.parametrize("names", [{}, {"cat": "cat|tom", "dog": "dog; hound"}])
def test_lists_of_parquet_are_several_labels(folder, delimiter, names):
    """As `hf:` reads them; no character of a label divides it."""
    tags = [[names.get(name, name) for name in each] for each in TAGS]
    columns = {"path": [path for path, _ in rows("")], "labels": tags, "box": [[1.0, 2.0]] * 24}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    table = read_label_table(folder / "a.parquet", TableColumns(delimiter=delimiter))
    assert [[*table.multi.of[f"photos/{i:02d}.png"]] for i in range(24)] == tags
    (_, text), (_, counts) = table.notes
    assert "labels in the lists of 'labels'" in text
    assert "label_delimiter" not in counts
    columns["labels"] = [each[:1] for each in tags]  # one or none in each list
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    assert len(read_label_table(folder / "a.parquet").multi.classes) == 3


def test_lists_of_0_and_1_are_refused(folder):
    columns = {"path": [path for path, _ in rows("")], "labels": [[0, 1, 1], [1, 0, 0]] * 12}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    with pytest.raises(InputError, match="the lists of 'labels' hold only 0 and 1"):
        read_label_table(folder / "a.parquet")
    columns["names"], columns["codes"] = TAGS, columns.pop("labels")
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    assert read_label_table(folder / "a.parquet", TableColumns(label="names")).multi is not None


def test_lists_that_cannot_be_joined_are_refused(folder):
    columns = {"path": ["photos/00.png"], "labels": [["a|b", "c;d", "e,f"]]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    with pytest.raises(InputError, match=r"lists of 'labels' hold text with each of \| ; ,"):
        read_label_table(folder / "a.parquet")
    parquet.write_table(pyarrow.table(columns | {"labels": [[["a"]]]}), folder / "a.parquet")
    with pytest.raises(InputError, match="'labels' does not hold text"):
        read_label_table(folder / "a.parquet")


@pytest.mark.parametrize(
    ("column", "fields"),
    [
        ("label", ["polar bear", "brown bear", "tabby cat"]),
        ("label", ["a, b", "a", "b"]),
        ("labels", ["polar bear", "brown bear", "tabby cat"]),
        ("labels", ["cat", "dog"]),
        ("breed", ["x y", "x", "y", "y x"]),
    ],
)
def test_one_label_per_image_is_recognised(column, fields):
    assert find_delimiter(column, fields) == "none"


@pytest.mark.parametrize("delimiter", [" ", ","])
def test_several_labels_in_a_singular_column_are_suspected(folder, delimiter):
    tags = ["a", "b", "c", "a b", "a c", "b c", "a b c", "c a"] * 3
    fields = [tag.replace(" ", delimiter) for tag in tags]
    names = [[f"photos/{i:02d}.png", field] for i, field in enumerate(fields)]
    path = write_table(folder / "a.csv", ["path", "target"], names)
    table = read_label_table(path)
    assert table.multi is None
    option = f"'data.label_delimiter={delimiter}'" if delimiter == " " else "data.label_delimiter=,"
    assert ("Labels", f"one per image, 8 combinations of 3 words; if they are several labels: "
            f"--set {option}") in table.notes  # fmt: skip
    given = read_label_table(path, TableColumns(delimiter="none"))
    assert not any(name == "Labels" for name, _ in given.notes)
    assert read_label_table(path, TableColumns(delimiter=delimiter)).multi.classes == (*"abc",)
    words = ["polar bear", "brown bear", "red fox", "grey fox", "dog", "cat"] * 4
    names = [[file, word] for (file, _), word in zip(names, words, strict=True)]
    table = read_label_table(write_table(folder / "a.csv", ["path", "target"], names))
    assert not any(name == "Labels" for name, _ in table.notes)


def test_nan_is_no_label(folder):
    fields = [field or "nan" for _, field in rows("|")]
    names = [[f"photos/{i:02d}.png", field] for i, field in enumerate(fields)]
    table = read_label_table(write_table(folder / "a.csv", ["path", "labels"], names))
    assert table.multi.classes == ("cat", "dog", "eel")
    assert [tuple(table.multi.of[f"photos/{i:02d}.png"]) for i in range(24)] == TAGS


def test_delimiter_may_be_given(folder):
    path = write_table(folder / "a.csv", ["path", "labels"], rows("+"))
    with pytest.raises(InputError, match="the label is empty"):
        read_label_table(path)
    assert read_label_table(path, TableColumns(delimiter="+")).multi.classes[0] == "cat"
    single = [[path, f"{label} x"] for path, label in rows("|") if label]
    path = write_table(folder / "b.csv", ["path", "labels"], single)
    table = read_label_table(path, TableColumns(delimiter="none"))
    assert table.multi is None
    assert "cat|dog x" in table.parts["train"]


def test_targets_follow_the_files(folder):
    source = read_image_table(
        write_table(folder / "a.csv", ["path", "tags"], rows(" ")), folder / "home", test_split=0
    )
    assert source.is_multi_label
    assert source.classes == ("cat", "dog", "eel")
    assert source.train.labels.dtype == torch.uint8
    for index in range(24):
        number = int(source.train.tensor()[index, 0, 0, 0])
        expected = [int(name in TAGS[number]) for name in source.classes]
        assert source.train.labels[index].tolist() == expected
    dls = make_dataloaders(source, batch_size=4, valid_split=0, device="cpu")
    seen = {}
    for images, targets in dls.train:
        assert targets.dtype == torch.float32
        for image, target in zip(images, targets, strict=True):
            red = round(float(image[0].max() * source.std[0] + source.mean[0]) * 255)
            seen[red] = target.tolist()
    assert seen == {i: [float(n in TAGS[i]) for n in source.classes] for i in range(24)}
    image, target = dls.train.dataset[0]
    assert image.shape == (8, 8)
    assert target.tolist() == source.train.labels[0].tolist()


def drawn_fractions(labels, drawn):
    return (labels[drawn].double().sum(dim=0) / labels.double().sum(dim=0)).tolist()


def test_test_images_are_stratified_by_label():
    random = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.02, 0.1, 0.3, 0.5])
    labels = (torch.rand(1000, 4, generator=random) < shares).to(torch.uint8)
    drawn = draw_test(labels, 0.2)
    assert drawn_fractions(labels, drawn) == pytest.approx([0.2] * 4, abs=0.03)
    without = labels.sum(dim=1) == 0
    assert float(drawn[without].double().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(drawn, draw_test(labels, 0.2))
    groups = torch.arange(1000) // 4
    drawn = draw_test(labels, 0.2, groups)
    assert drawn_fractions(labels, drawn) == pytest.approx([0.2] * 4, abs=0.06)
    assert all(len(set(part.tolist())) == 1 for part in drawn.view(-1, 4))


def test_single_labels_as_columns_are_drawn_like_groups():
    labels = torch.arange(60) % 3
    columns = torch.nn.functional.one_hot(labels).to(torch.uint8)
    expected = draw_groups(labels, torch.arange(60), 0.25, "test split")
    assert torch.equal(draw_test(columns, 0.25), expected)


def test_every_label_keeps_a_training_image():
    labels = torch.zeros(40, 3, dtype=torch.uint8)
    labels[:, 0], labels[7, 1], labels[[3, 9], 2] = 1, 1, 1
    drawn = draw_test(labels, 0.9)
    assert not drawn[7]
    assert int(drawn[[3, 9]].sum()) <= 1


def images_with(labels):
    pixels = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    return ArrayImages(pixels, labels, tuple(map(str, range(len(labels)))))


def test_limit_keeps_rare_labels():
    labels = torch.zeros(300, 3, dtype=torch.uint8)
    labels[:, 0], labels[::60, 1], labels[::100, 2] = 1, 1, 1
    chosen = limit_images(images_with(labels), 12)
    assert len(chosen) == 12
    assert chosen.labels.sum(dim=0).tolist()[1:] == [5, 3]
    assert len(limit_images(images_with(labels), 0)) == 300


def test_calibration_images_are_stratified():
    random = torch.Generator().manual_seed(1)
    labels = (torch.rand(400, 3, generator=random) < 0.3).to(torch.uint8)
    rest, chosen = split_calibration(images_with(labels), 0.5)
    assert len(rest) + len(chosen) == 400
    assert chosen.labels.double().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.05)
    assert len(chosen) == pytest.approx(200, abs=15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: [[p, ""] for p, _ in table], "no training image has a label"),
        (lambda table: [[p, "cat|"] for p, _ in table], "all training images have the label 'cat'"),
        (lambda table: [["nowhere.png", "cat|dog"], *table], "line 2: there is no image"),
        (lambda table: [table[0], *table], "line 3: the image 'photos/00.png' is already"),
    ],
)
def test_bad_tables_are_refused(folder, change, message):
    path = write_table(folder / "a.csv", ["path", "label"], change(rows("|")))
    with pytest.raises(InputError, match=message):
        read_label_table(path, TableColumns(delimiter="|"))


def test_label_without_training_images_is_named(folder):
    split = ["train"] * 20 + ["test"] * 4
    table = [[*row, part] for row, part in zip(rows("|"), split, strict=True)]
    table[-1][1] = "cat|dgo"
    path = write_table(folder / "a.csv", ["path", "label", "split"], table)
    message = "line 25: no training image has the label 'dgo'. Did you mean 'dog'?"
    with pytest.raises(InputError, match=re.escape(message)):
        read_label_table(path)


def test_label_seen_once_is_noted(folder):
    table = rows("|")
    table[0][1] = "cat|eeel"
    notes = read_label_table(write_table(folder / "a.csv", ["path", "label"], table)).notes
    assert ("Seen once", "'eeel' in line 2 (did you mean 'eel'?)") in notes


def test_labels_that_a_split_lacks_are_noted(folder):
    split = ["train"] * 20 + ["test"] * 4
    table = [[*row, part] for row, part in zip(rows("|"), split, strict=True)]
    for row in table[20:]:
        row[1] = "cat"
    path = write_table(folder / "a.csv", ["path", "label", "split"], table)
    source = read_image_table(path, folder / "home")
    assert ("Missing", "no test image has 2 of 3 labels: dog, eel") in source.notes


def test_labels_that_a_drawn_test_set_lacks_are_noted(folder):
    note = "Missing", "no test image has 1 of 3 labels: eel"
    once = [[path, "cat|dog"] for path, _ in rows("|")]
    once[0][1] = "cat|eel"
    for table, is_missing in ((once, True), (rows("|"), False)):
        path = write_table(folder / "a.csv", ["path", "label"], table)
        _, chosen = choose_table_images(path, TableColumns())
        eels = {path for path, tags in table if "eel" in tags}
        assert eels.isdisjoint(chosen.test[ALL]) == is_missing
        assert (note in chosen.notes) == is_missing


def test_reopened_table_keeps_split_and_order(folder):
    path = write_table(folder / "a.csv", ["path", "tags"], rows(" "))
    first = read_image_table(path, folder / "home", test_split=0.25)
    again = read_image_table(path, folder / "home", parts=first.parts, classes=first.classes[::-1])
    assert again.classes == first.classes[::-1]
    assert torch.equal(again.train.labels, first.train.labels.flip(1))
    assert [again.test.name(i) for i in range(len(again.test))] == [
        first.test.name(i) for i in range(len(first.test))
    ]
    changed = [[p, label.replace("eel", "fox")] for p, label in rows(" ")]
    write_table(folder / "a.csv", ["path", "tags"], changed)
    with pytest.raises(InputError, match=r"labels in .* are not those of the run: 'eel' no longer"):
        read_image_table(path, folder / "home", parts=first.parts, classes=first.classes)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_split_without_labels_is_not_read(folder, part):
    split = ["train"] * 20 + [part] * 4
    table = [[*row, name] for row, name in zip(rows("|"), split, strict=True)]
    for row in table[20:]:
        row[1] = ""
    path = write_table(folder / "a.csv", ["path", "label", "split"], table)
    found = read_label_table(path)
    assert part not in found.parts
    assert ("Not read", f"split {part}: its images have no labels") in found.notes
