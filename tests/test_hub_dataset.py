"""Data sets of the library Hugging Face datasets, made here; without network."""

import io
import json
import re

import datasets
import huggingface_hub
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as PillowImage

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.cache import CACHE_LIMIT
from mixmo_fastai.data.image_folder import read_image_table
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.table_columns import TableColumns
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.study.execute import check_one_label_per_image
from mixmo_fastai.study.plan import read_study

NAMES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))


def encoded(number):
    """Return an image whose first channel is a number."""
    content = io.BytesIO()
    PillowImage.new("RGB", (8, 8), (number, 10, 20)).save(content, "png")
    return {"bytes": content.getvalue(), "path": None}


CLASSES = ClassLabel(names=NAMES)


def make(start, count, label=CLASSES, **more):
    """Return a split whose images have the numbers from start on, and the label number % 3."""
    numbers = range(start, start + count)
    is_text = isinstance(label, Value) and label.dtype == "string"
    labels = [NAMES[n % 3] if is_text else n % 3 for n in numbers]
    columns = {"when": [*numbers], "img": [encoded(n) for n in numbers], "label": labels}
    kinds = {"when": Value("int64"), "img": Image(), "label": label}
    for name, (kind, function) in more.items():
        columns[name], kinds[name] = [function(n) for n in numbers], kind
    return Dataset.from_dict(columns, features=Features(kinds))


def save(path, **splits):
    DatasetDict(splits).save_to_disk(str(path))
    return f"hf:{path}"


def numbers_and_labels(images):
    return [
        (int(image[0, 0, 0]), int(label))
        for image, label in zip(images.tensor(), images.labels, strict=True)
    ]


@pytest.mark.parametrize("limit", [0, CACHE_LIMIT])
@pytest.mark.parametrize("label", [CLASSES, Value("string"), Value("int32")], ids=str)
def test_splits_and_labels_are_read(tmp_path, limit, label):
    name = save(
        tmp_path / "pets", train=make(0, 30, label), validation=make(30, 6, label),
        test=make(36, 9, label), extra=make(60, 3, label),
    )  # fmt: skip
    source = read_image_table(name, tmp_path / "home", cache_limit=limit)
    assert source.name == "pets"
    is_numbers = isinstance(label, Value) and label.dtype == "int32"
    assert source.classes == (("0", "1", "2") if is_numbers else tuple(NAMES))
    for images, start, count in (
        (source.train, 0, 30),
        (source.valid, 30, 6),
        (source.test, 36, 9),
    ):
        expected = [(n, n % 3) for n in range(start, start + count)]
        assert sorted(numbers_and_labels(images)) == expected
    assert source.train.name(0) == "train/0"
    assert source.train.sizes()[0] == len(encoded(0)["bytes"])
    notes = dict(source.notes)
    assert notes["Columns"].startswith("images in 'img', labels in 'label'; change with")
    assert notes["Not read"] == "splits extra"
    assert notes["Splits"] == "validation and testing: those of the data set"


@pytest.mark.parametrize("kind", ["saved", "parquet file", "parquet folder"])
def test_one_split_is_divided(tmp_path, kind):
    split = make(0, 60, breed=(ClassLabel(names=["x", "y"]), lambda n: n % 2))
    path = tmp_path / "pets"
    if kind == "saved":
        split.save_to_disk(str(path))
    elif kind == "parquet file":
        path = path.with_suffix(".parquet")
        split.to_parquet(str(path))
    else:
        path.mkdir()
        split.to_parquet(str(path / "train-00000-of-00001.parquet"))
    source = load_source(f"hf:{path}", test_split=0.25)
    assert (len(source.train), len(source.test)) == (45, 15)
    found = numbers_and_labels(source.train) + numbers_and_labels(source.test)
    assert sorted(found) == [(n, n % 3) for n in range(60)]
    again = load_source(f"hf:{path}", test_split=0.25, columns=TableColumns(label="breed"))
    assert again.classes == ("x", "y")


def test_groups_stay_together(tmp_path):
    name = save(tmp_path / "pets", train=make(0, 60, patient=(Value("int64"), lambda n: n // 4)))
    source = load_source(name)
    train, test = ({n // 4 for n, _ in numbers_and_labels(p)} for p in (source.train, source.test))
    assert train | test == {*range(15)}
    assert not train & test
    assert source.train.groups is not None
    ungrouped = load_source(name, columns=TableColumns(group="none"))
    assert ungrouped.train.groups is None


def test_unlabelled_test_split_is_not_read(tmp_path):
    test = make(0, 6, Value("int64")).map(lambda row: {"label": -1})
    train = make(10, 30, Value("int64"))
    source = load_source(save(tmp_path / "pets", train=train, test=test))
    assert ("Not read", "split test: its images have no labels") in source.notes
    assert len(source.test) == 6  # drawn


def test_damaged_images_are_named_or_skipped(tmp_path):
    split = make(0, 30)
    rows = split.cast_column("img", Image(decode=False)).to_dict()
    rows["img"][7]["bytes"] = b"nothing"
    rows["img"][8] = None
    name = save(tmp_path / "pets", train=Dataset.from_dict(rows, features=split.features))
    with pytest.raises(InputError) as caught:
        load_source(name)
    message = str(caught.value)
    assert message.startswith(f"2 of 30 images below {name} cannot be decoded: train/7, train/8")
    assert len(message.splitlines()) <= 3
    source = load_source(name, skip_damaged=True)
    assert len(source.train) + len(source.test) == 28
    assert source.left_out.keys() == {"train/7", "train/8"}


def without_label_4(row):
    return {"label": None if row["when"] == 4 else row["label"]}


TEXTS = Value("string")
CASES = {
    "no training split": (
        lambda: {"test": make(0, 9)},
        {},
        "has no split train; its splits are test",
    ),
    "one class": (
        lambda: {"train": make(0, 9).filter(lambda row: row["label"] == 0)},
        {},
        "the training images have one class only, 'cat'",
    ),
    "no images": (
        lambda: {"train": make(0, 9).remove_columns("img")},
        {},
        "has no column of images; its columns",
    ),
    "no such column": (lambda: {"train": make(0, 9)}, {"label": "lable"}, "Did you mean 'label'?"),
    "images elsewhere": (
        lambda: {"train": make(0, 9)},
        {"path": "when"},
        "has no column of images 'when'",
    ),
    "no labels": (
        lambda: {"train": make(0, 9, Value("int64")).rename_column("label", "foo")},
        {},
        "which column holds the labels? Columns: when, img, foo",
    ),
    "lists of lists": (
        lambda: {"train": make(0, 9, many=(Sequence(Sequence(TEXTS)), lambda n: [["a"]]))},
        {"label": "many"},
        # List from datasets 4 on, Sequence before
        f"the column 'many' holds {type(Sequence(TEXTS)).__name__}, "
        "not one class per image or a list of classes",
    ),
    "missing label": (
        lambda: {"train": make(0, 9, Value("int64")).map(without_label_4)},
        {},
        "split train, row 4: the label is None",
    ),
    "new class": (
        lambda: {"train": make(0, 2, TEXTS), "test": make(0, 9, TEXTS)},
        {},
        "split test has the class 'eel', which has no training image",
    ),
    "shared group": (
        lambda: {part: make(0, 9, patient=(TEXTS, lambda n: "one")) for part in ("train", "test")},
        {},
        "patient 'one' is in the splits train and test",
    ),
    "missing group": (
        lambda: {"train": make(0, 9, patient=(TEXTS, lambda n: None if n == 3 else "p"))},
        {},
        "split train, row 3: the group is empty",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_data_sets_that_cannot_be_used_are_refused(tmp_path, case):
    build, columns, message = CASES[case]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_source(save(tmp_path / "pets", **build()), columns=TableColumns(**columns))
    assert len(str(caught.value).splitlines()) <= 3


def test_missing_data_sets_and_library_are_reported(tmp_path, monkeypatch):
    paths = (tmp_path / "nothing", "./nothing", "data/photos/nothing", "no.parquet", "~/no.csv")
    for path in paths:
        with pytest.raises(InputError, match="There is no file or folder"):
            load_source(f"hf:{path}")
    message = "hf:someone/nothing cannot be loaded.*\nThere is no local folder 'someone/nothing' "
    with pytest.raises(InputError, match=message):
        load_source("hf:someone/nothing")
    with pytest.raises(InputError, match="'hf:' needs a name or a path"):
        load_source("hf:")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_source(f"hf:{tmp_path / 'empty'}")
    monkeypatch.setattr("mixmo_fastai.data.hub_dataset.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mixmo-fastai\[datasets\]'"):
        load_source("hf:someone/nothing")


def test_saved_folder_without_the_prefix_has_a_hint(tmp_path):
    for name, saved in (("splits", DatasetDict(train=make(0, 9))), ("one", make(0, 9))):
        saved.save_to_disk(str(tmp_path / name))
        with pytest.raises(InputError, match=rf"by save_to_disk.*\n.*pass hf:{tmp_path / name}"):
            load_source(tmp_path / name)


def test_names_and_paths_in_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve_recipe("hf:here").data.dataset == f"hf:{tmp_path / 'here'}"
    assert resolve_recipe("hf:me/pets").data.dataset == "hf:me/pets"


@pytest.mark.slow
def test_run_uses_the_same_images_in_all_commands(tmp_path, capsys):
    name = save(tmp_path / "pets", train=make(0, 90))
    flags = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "16", "--repeat", "2"]
    flags += ["--device", "cpu", "--valid-split", "0.2", "--out", str(tmp_path / "run")]
    for loader in ("streaming", "auto"):
        more = ["--set", f"data.loader={loader}"]
        if loader == "auto":
            flags[-1] = str(tmp_path / "other")
        assert program(["fit", name, *flags, *more]) == 0
        run = open_run(flags[-1])
        capsys.readouterr()
        assert program(["eval", str(run.path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["test"] == run.metrics()["test"]
    assert run.split()["columns"]["label"] == "label"
    both = [open_run(tmp_path / each) for each in ("run", "other")]
    assert both[0].weights.read_bytes() == both[1].weights.read_bytes()
    assert program(["push", str(run.path), "--to", str(tmp_path / "hub")]) == 0


def several(number):
    return [[], [0], [0, 2], [2, 1, 2]][number % 4]


@pytest.mark.parametrize(
    ("inner", "convert"),
    [(CLASSES, int), (Value("string"), lambda label: NAMES[label])],
    ids=["numbers", "names"],
)
def test_lists_of_labels_are_several_labels_per_image(tmp_path, inner, convert):
    more = {"tags": (Sequence(inner), lambda number: [*map(convert, several(number))])}
    name = save(tmp_path / "saved", train=make(0, 24, **more), test=make(24, 8, **more))
    columns = TableColumns(label="tags")
    source = load_source(name, columns=columns)
    assert source.is_multi_label
    assert source.classes == ("cat", "dog", "eel")
    for images in (source.train, source.test):
        for image, labels in zip(images.tensor(), images.labels, strict=True):
            expected = {*several(int(image[0, 0, 0]))}
            assert {*labels.nonzero()[:, 0].tolist()} == expected
    (text,) = [text for label, text in source.notes if label == "Labels"]
    assert text.startswith("several per image: 0 to 2, 1.25 on average; 8 images without any")
    again = load_source(name, parts=source.parts, classes=source.classes)
    assert again.train.labels.equal(source.train.labels)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda number: [None] if number == 3 else several(number), "row 3: a label is None"),
        (lambda number: [0], "the training images have 1 label, not several"),
        (
            lambda number: [1 if number > 23 else number % 2 * 2],
            "no training image has the label",
        ),
    ],
)
def test_bad_lists_of_labels_are_refused(tmp_path, label, message):
    more = {"tags": (Sequence(CLASSES), label)}
    name = save(tmp_path / "saved", train=make(0, 24, **more), test=make(24, 8, **more))
    with pytest.raises(InputError, match=message):
        load_source(name, columns=TableColumns(label="tags"))


def test_studies_refuse_lists_of_labels_before_training(tmp_path):
    name = save(tmp_path / "pets", train=make(0, 30, tags=(Sequence(CLASSES), several)))
    file = tmp_path / "study.toml"
    for column in ("label", "tags"):
        file.write_text(
            f'images_seen = [8]\nset = ["data.label_column={column}"]\n'
            '[methods.plain]\nrecipe = "small-cifar10/vanilla"\n'
        )
        runs = read_study(file, name).runs
        if column == "tags":
            with pytest.raises(InputError, match=r"is for one label per image"):
                check_one_label_per_image(runs, tmp_path / "out")
        else:
            check_one_label_per_image(runs, tmp_path / "out")


def test_split_with_empty_lists_is_not_read(tmp_path):
    more = {"tags": (Sequence(CLASSES), lambda number: several(number) if number < 24 else [])}
    name = save(tmp_path / "saved", train=make(0, 24, **more), test=make(24, 8, **more))
    source = load_source(name, columns=TableColumns(label="tags"))
    assert ("Not read", "split test: its images have no labels") in source.notes


def test_missing_lists_and_delimiters_are_refused(tmp_path):
    more = {"tags": (Sequence(CLASSES), lambda number: None if number == 4 else several(number))}
    name = save(tmp_path / "saved", train=make(0, 24, **more))
    with pytest.raises(InputError, match="row 4: the labels are missing; for none, use"):
        load_source(name, columns=TableColumns(label="tags"))
    with pytest.raises(InputError, match=r"data.label_delimiter is for tables of labels"):
        load_source(name, columns=TableColumns(delimiter="|"))


@pytest.mark.parametrize("name", ["split", "folder"])
def test_settings_of_tables_are_refused(tmp_path, name):
    dataset = save(tmp_path / "saved", train=make(0, 24))
    setting = {"split": "split_column", "folder": "image_folder"}[name]
    with pytest.raises(InputError, match=rf"data\.{setting} is for tables of labels"):
        load_source(dataset, columns=TableColumns(**{name: "other"}))


def test_class_names_are_checked(tmp_path):
    decimals = make(0, 24, target=(Value("float32"), lambda n: 0.37 * n))
    with pytest.raises(InputError, match="labels are 24 different decimals"):
        read_image_table(
            save(tmp_path / "a", train=decimals), tmp_path, columns=TableColumns(label="target")
        )
    spelled = make(0, 24, name=(Value("string"), lambda n: ("Cat", "cat", "dog")[n % 3]))
    source = read_image_table(
        save(tmp_path / "b", train=spelled), tmp_path, columns=TableColumns(label="name")
    )
    assert ("Warning", "classes that differ only in case: 'Cat' and 'cat'") in source.notes
