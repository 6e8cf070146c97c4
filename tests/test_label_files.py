"""Files of label distributions: .npy, and tables with one row per vote or per image."""

import pickle

import numpy as np
import pytest
from fuzzing import EDITS, FEW_EXAMPLES, check_read_or_rejected, mutated
from hypothesis import given
from hypothesis import strategies as st
from small_data import write_image_folder

from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.image_names import ImageNames, image_names
from mixmo_fastai.data.label_distributions import read_label_distributions
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.errors import InputError

CLASSES = ("cat", "dog", "eel")
NUMBERED = ImageNames(("test/0", "test/1", "test/2", "test/3"), "test set", "test", has_order=True)
FILES = ImageNames(
    ("test/cat/1.png", "test/cat/2.png", "test/dog/1.png", "test/dog/3.png"), "test set", "test"
)
COUNTS = np.array([[3, 1, 0], [0, 0, 2], [1, 1, 2], [0, 5, 0]])
PER_IMAGE = "image,dog,cat,eel\n3,5,0,0\n1,0,0,2\n2,1,1,2\ntest/0,1,3,0\n"


def read(path, content, images=NUMBERED, classes=CLASSES):
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return read_label_distributions(path, images, classes)


def check(found, counts, indices, num_votes):
    assert found.indices.tolist() == indices
    np.testing.assert_allclose(found.probabilities, counts / counts.sum(1, keepdims=True))
    assert found.num_votes == num_votes


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_counts_of_an_array_are_read(tmp_path, dtype, order):
    found = read(tmp_path / "a.npy", np.asarray(COUNTS, dtype=dtype, order=order))
    check(found, COUNTS, [0, 1, 2, 3], 15)


def test_probabilities_are_read_and_may_be_rounded(tmp_path):
    probabilities = COUNTS / COUNTS.sum(axis=1, keepdims=True)
    check(read(tmp_path / "a.npy", probabilities), COUNTS, [0, 1, 2, 3], None)
    thirds = np.full((4, 3), 0.333)
    check(read(tmp_path / "a.npy", thirds), np.ones((4, 3)), [0, 1, 2, 3], None)


def test_one_row_per_image_is_matched_by_image_and_class(tmp_path):
    check(read(tmp_path / "a.csv", PER_IMAGE), COUNTS, [0, 1, 2, 3], 15)
    shares = "Filename;cat;dog;eel\ntest/1;0.5;0.25;0.25\n"
    found = read(tmp_path / "a.csv", shares)
    check(found, np.array([[2, 1, 1]]), [1], None)
    assert found.layout == "one row per image"


VOTES = [(0, "cat"), (3, "dog"), (0, "dog"), (0, "cat"), (2, "eel")]
VOTE_COUNTS = np.array([[2, 1, 0], [0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize(
    "line", ["{},{}\n", "test/{},{}\r\n", '"{}","{}"\n', " {} , {} \n", "\n{},{}\n,\n"]
)
def test_one_row_per_vote_is_counted(tmp_path, line):
    text = "image,label\n" + "".join(line.format(image, label) for image, label in VOTES)
    found = read(tmp_path / "a.csv", text)
    check(found, VOTE_COUNTS, [0, 2, 3], 5)
    assert found.layout == "one row per vote"


def test_tabs_annotators_class_indices_and_other_columns_are_read(tmp_path):
    rows = [
        (100 * n, f"w{n}", CLASSES.index(label), image) for n, (image, label) in enumerate(VOTES)
    ]
    text = "Milliseconds\tWorker_ID\tClass\tPath\n"
    text += "".join("{}\t{}\t{}\t{}\n".format(*row) for row in rows)
    check(read(tmp_path / "a.tsv", "\ufeff" + text), VOTE_COUNTS, [0, 2, 3], 5)
    check(read(tmp_path / "a.csv", text), VOTE_COUNTS, [0, 2, 3], 5)


def test_names_of_classes_that_are_numbers_are_not_indices(tmp_path):
    found = read(tmp_path / "a.csv", "image,label\n0,1\n", classes=("1", "2"))
    check(found, np.array([[1, 0]]), [0], 1)
    with pytest.raises(InputError, match="'0' is not a class"):
        read(tmp_path / "a.csv", "image,label\n0,0\n", classes=("1", "2"))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("test/dog/1.png", 2),
        ("dog/1.png", 2),
        ("./test/cat/1.png", 0),
        ("cat\\1.png", 0),
        ("2.png", 1),
        ("3.png", 3),
    ],
)
def test_files_are_found_by_path_or_unique_name(tmp_path, name, index):
    check(read(tmp_path / "a.csv", f"image,label\n{name},eel\n", FILES), np.eye(3)[2:], [index], 1)


def test_names_are_compared_in_normal_form(tmp_path):
    decomposed = ImageNames(("te\u0301st/a\u0301.png",), "test set", "te\u0301st")
    text = "image,label\n\u00e1.png,\u00e9l\n"
    found = read(tmp_path / "a.csv", text, decomposed, ("e\u0301l", "cat"))
    check(found, np.array([[1, 0]]), [0], 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/cat/2.png", "the image 'train/cat/2.png' is not in the test set of 4"),
        ("1.png", "2 images are called '1.png', such as test/cat/1.png and test/dog/1.png"),
        ("0", "the image '0' is not in the test set"),
        ("other/test/dog/1.png", ".* is not in the test set"),
        ("", "the image is empty"),
    ],
)
def test_files_are_never_found_by_order_or_part_of_a_path(tmp_path, name, message):
    with pytest.raises(InputError, match="line 3: " + message):
        read(tmp_path / "a.csv", f"image,label\n2.png,cat\n{name},cat\n", FILES)
    with pytest.raises(InputError, match="no official order"):
        read(tmp_path / "a.npy", COUNTS, FILES)


NAN, INFINITE = float("nan"), float("inf")


def changed(row, column, value):
    counts = COUNTS.astype(float)
    counts[row, column] = value
    return counts


ARRAYS = [
    (changed(2, 1, NAN), r"row 2: .* got nan for the class 'dog'"),
    (changed(1, 0, INFINITE), r"row 1: .* got inf for the class 'cat'"),
    (changed(3, 2, -1), r"row 3: .* got -1 for the class 'eel'"),
    (changed(0, 0, 1e300), r"row 0: .* from 0 to 1e\+15"),
    (COUNTS * [[1], [0], [1], [0]], "row 1: the votes sum to zero; so do 1 other rows"),
    (changed(0, 0, 0.5), "row 0: the values sum to 1.5"),
    (COUNTS[:3], r"\(4, 3\); got \(3, 3\)"),
    (COUNTS[:, :2], r"\(4, 3\); got \(4, 2\)"),
    (COUNTS[0], r"got \(3,\)"),
    (COUNTS.astype(str), "must hold numbers"),
    (COUNTS.astype(complex), "must hold numbers"),
    (COUNTS > 0, "must hold numbers; got an array of bool"),
    (b"", "is not a .npy file"),
    (b"image,label\n", "is not a .npy file"),
    (pickle.dumps(COUNTS), "is not a .npy file"),
]


@pytest.mark.parametrize(("content", "message"), ARRAYS)
def test_unusable_arrays_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "a.npy", content)
    assert "a.npy" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_pickled_arrays_and_archives_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS.astype(object), allow_pickle=True)
    with pytest.raises(InputError, match=r"is not a \.npy file of numbers"):
        read_label_distributions(tmp_path / "a.npy", NUMBERED, CLASSES)
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, COUNTS)
    with pytest.raises(InputError, match="archive of arrays"):
        read_label_distributions(tmp_path / "a.npy", NUMBERED, CLASSES)
    for name in ("none.npy", "none.csv"):
        with pytest.raises(InputError, match=name):
            read_label_distributions(tmp_path / name, NUMBERED, CLASSES)


TABLES = [
    ("image,label\n0,cat\n1,cta\n", r"line 3: 'cta' is not a class.*Did you mean 'cat'"),
    ("image,label\n0,3\n", "line 2: '3' is not a class"),
    ("image,label\n0,\n", "line 2: the label is empty"),
    ("image,label\n4,cat\n", "line 2: the image '4' is not in the test set"),
    ("image,label\n-1,cat\n", "line 2: the image '-1' is not"),
    ("image,label\n0,cat,1\n", "line 2: 3 fields; the header has 2"),
    ("image,annotator,label\n0,a,cat\n1,a,cat\n0,a,dog\n", "line 4: .*'a' already voted .* line 2"),
    ("image,annotator,label\n0,,cat\n", "line 2: the annotator is empty"),
    ("image,cat,dog,eel\n0,1,0,0\n1,1,0,0\ntest/0,1,0,0\n", "line 4: .* already in line 2"),
    ("image,cat,dog,eel\n0,1,0,0\n1,nan,0,0\n", "line 3: .* got nan for the class 'cat'"),
    ("image,cat,dog,eel\n0,1,-2,0\n", "line 2: .* got -2 for the class 'dog'"),
    ("image,cat,dog,eel\n0,1,0,0\n2,0,0,0\n", "line 3: the votes sum to zero"),
    ("image,cat,dog,eel\n0,0.5,0.2,0\n", "line 2: the values sum to 0.7"),
    ("image,cat,dog,eel\n0,1,x,0\n", "line 2: the number for 'dog' is 'x'"),
    ("image,cat,dog,eel\n0,1,,0\n", "line 2: the number for 'dog' is empty"),
    ("image,cat,dgo,eel\n0,1,1,0\n", r"line 1: the column 'dgo' is not a class.*mean 'dog'"),
    ("image,cat,eel\n0,1,0\n", "line 1: no column for 1 of the classes: dog"),
    ("image,cat,dog,dog\n0,1,0,0\n", "line 1: the column 'dog' occurs 2 times"),
    ("cat,dog,eel\n1,0,0\n", "no column 'image'; rows are not matched by their order"),
    ("label\ncat\n", "no column 'image'"),
    ("image,time\n0,1\n", "columns image, time, but no label and no class"),
    ("image,label\n", "has no rows"),
    ("", "has no rows"),
    ('image,label\n0,"cat\n1,dog\n2,eel\n', "line 2: a quote opens here and is not closed"),
    ('image,label\n0,"cat\n1,"dog\n', "line 3: ',' expected after.*a quote opens in line 2"),
    (b"image,label\n0,\xff\n", "is not text in UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), TABLES)
def test_unusable_tables_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "a.csv", text)
    assert "a.csv" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.npy, \.csv or \.tsv"):
        read(tmp_path / "a.txt", PER_IMAGE)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_label_distributions(tmp_path / "folder.csv", NUMBERED, CLASSES)
    with pytest.raises(InputError, match="several classes are called 'cat'"):
        read(tmp_path / "a.csv", "image,label\n0,cat\n", classes=("cat", "cat", "dog"))


def test_named_data_sets_have_an_order_and_folders_have_none(tmp_path):
    digits = load_source("digits")
    names = image_names(digits, digits.test, "test")
    assert names.has_order
    assert names.find("17", "here") == names.find("test/17", "here") == 17
    assert not image_names(digits, digits.train, "valid").has_order
    folder = write_image_folder(tmp_path / "pets", size=(8, 8))
    source = read_image_folder(folder, tmp_path / "data")
    names = image_names(source, source.test, "test")
    assert not names.has_order
    assert names.find("dog/001.png", "here") == names.find("test/dog/001.png", "here") == 3
    (tmp_path / "drawn").mkdir()
    (folder / "train").rename(tmp_path / "drawn/pets")
    source = read_image_folder(tmp_path / "drawn/pets", tmp_path / "data", test_split=0.25)
    names = image_names(source, source.test, "test")
    for index in range(len(source.test)):
        assert names.find(source.test.name(index), "here") == index


def test_skipped_images_leave_no_order():
    names = tuple(f"val/images/val_{number}.JPEG" for number in (0, 1, 3))

    class Images:
        name = staticmethod(names.__getitem__)
        __len__ = staticmethod(names.__len__)

    class Source:
        parts = None

    class Full(Images):
        name = staticmethod(lambda index: f"val/images/val_{index}.JPEG")

    assert not image_names(Source(), Images(), "test").has_order
    assert image_names(Source(), Full(), "test").has_order


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npy", ".csv"])
@FEW_EXAMPLES
@given(content=st.binary(max_size=200), edits=EDITS)
def test_any_content_is_read_or_rejected(tmp_path, suffix, content, edits):
    path = tmp_path / f"a{suffix}"
    np.save(tmp_path / "a.npy", COUNTS)
    original = (tmp_path / "a.npy").read_bytes() if suffix == ".npy" else PER_IMAGE.encode()
    in_header = [(position % 128, value) for position, value in edits]
    for new in (content, mutated(original, edits), mutated(original, in_header)):
        path.write_bytes(new)
        check_read_or_rejected(lambda: read_label_distributions(path, NUMBERED, CLASSES))
