"""Class names of tables: spaces, case, and decimals, which are refused."""

import pytest
from label_tables import LABELS, folder, simple_rows, write_table

from mixmo_fastai.data.class_names import check_no_measurements
from mixmo_fastai.data.label_tables import read_label_table
from mixmo_fastai.errors import InputError

__all__ = ["folder"]  # fixtures


def read(folder, labels, column="label"):
    rows = [[path, label] for (path, _), label in zip(simple_rows(), labels, strict=True)]
    return read_label_table(write_table(folder / "a.csv", ["path", column], rows))


@pytest.mark.parametrize("column", ["label", "tags"])
def test_spaces_around_labels_do_not_count(folder, column):
    labels = [("{}", " {}", "{}\t")[i // 3 % 3].format(LABELS[i % 3]) for i in range(24)]
    if column == "tags":
        labels[0] = "cat ; dog"
    table = read(folder, labels, column)
    names = table.parts["train"] if column == "label" else table.multi.classes
    assert (*names,) == LABELS
    assert not {"Warning", "Seen once"} & {name for name, _ in table.notes}


def test_classes_that_differ_in_case_are_named_once(folder):
    notes = read(folder, ["cat", "Cat", "dog", "eel", "EEL", "CAT"] * 4).notes
    warnings = [text for name, text in notes if name == "Warning"]
    assert warnings == [
        "classes that differ only in case: 'CAT' and 'Cat' and 'cat', 'EEL' and 'eel'"
    ]
    several = read(folder, ["cat|Cat", "dog", "eel"] * 8).notes
    assert ("Warning", "classes that differ only in case: 'Cat' and 'cat'") in several


def test_classes_that_are_the_same_number_are_named(folder):
    notes = read(folder, ["0010", "10", "7", "007", "x", "y"] * 4).notes
    expected = "classes that are the same number: '0010' and '10', '007' and '7'"
    assert [text for name, text in notes if name == "Warning"] == [expected]
    assert not any(name == "Warning" for name, _ in read(folder, ["0", "1", "01x", "1x"] * 6).notes)


@pytest.mark.parametrize("comma", [".", ","])
def test_decimals_are_refused_as_regression(folder, comma):
    values = [f"{0.37 * i:.3f}".replace(".", comma) for i in range(24)]
    with pytest.raises(InputError, match=r"a.csv: .* 24 different decimals(.|\n)*regression"):
        read(folder, values)


@pytest.mark.parametrize(
    "labels",
    [
        [str(0.5 * (i % 10)) for i in range(24)],  # ratings
        [str(i) for i in range(24)],
        [f"{i}.0" for i in range(24)],
        [f"v1.{i}.2" for i in range(24)],
        [*(f"{i}.5" for i in range(23)), "none"],
    ],
)
def test_other_numbers_are_classes(folder, labels):
    assert len(read(folder, labels).parts["train"]) == len(set(labels))


def test_many_decimals_are_refused_for_any_number_of_images():
    labels = [f"{i}.5" for i in range(21)]
    check_no_measurements(labels[1:], 10_000, "here")
    with pytest.raises(InputError, match="here: the labels are 21 different"):
        check_no_measurements(labels, 10_000, "here")
