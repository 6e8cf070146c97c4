import pytest
from image_paths import write

from mixmo_fastai.data.layout import SplitFolders, evaluation_folder, find_split_folders, role_of
from mixmo_fastai.errors import InputError


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "train") for name in ("train", "Training", "TRAIN", "train_set", "training-data")),
        *((name, "valid") for name in ("val", "valid", "Validation", "val_images", "validset")),
        *((name, "test") for name in ("test", "TEST", "Testing", "test set")),
        *((name, None) for name in ("trains", "cat", "seg_train", "valley", "test2", "tests", "")),
    ],
)
def test_split_folders_have_several_names_in_any_case(name, role):
    assert role_of(name) == role


SPLIT_CASES = {
    "train, valid, test": (("train", "valid", "test"), SplitFolders("train", "valid", "test")),
    "training, testing": (("Training", "Testing"), SplitFolders("Training", None, "Testing")),
    "capitals": (("TRAIN", "VAL"), SplitFolders("TRAIN", "VAL")),
    "no test": (("train", "validation"), SplitFolders("train", "validation")),
    "only train": (("train",), SplitFolders("train")),
}


@pytest.mark.parametrize("case", SPLIT_CASES)
def test_split_folders_are_found(tmp_path, case):
    names, expected = SPLIT_CASES[case]
    write(tmp_path, *(f"{name}/{label}/1.jpg" for name in names for label in ("cat", "dog")))
    assert find_split_folders(tmp_path) == expected


def test_folders_without_split_names_are_classes(tmp_path):
    write(tmp_path, "cat/1.jpg", "dog/1.jpg", "README.txt")
    assert find_split_folders(tmp_path) == SplitFolders(".")


@pytest.mark.parametrize("classes", [("bus", "train"), ("train station", "bus"), ("bullet train",)])
def test_class_may_have_the_name_of_a_split(tmp_path, classes):
    write(tmp_path, *(f"{name}/1.jpg" for name in (*classes, "car")))
    assert find_split_folders(tmp_path) == SplitFolders(".")


def test_other_folders_are_reported(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg", "masks/1.jpg", "__MACOSX/x")
    assert find_split_folders(tmp_path).others == ("masks/",)


@pytest.mark.parametrize("other", ["text", "all", "extra", "best"])
def test_short_names_are_not_treated_as_misspelt_splits(tmp_path, other):
    write(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg", f"{other}/1.jpg")
    assert find_split_folders(tmp_path) == SplitFolders("train", None, "test", (f"{other}/",))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x/cat/1.jpg", "x/dog/1.jpg"), SplitFolders("x")),
        (
            ("x/x/train/cat/1.jpg", "x/x/test/cat/1.jpg"),
            SplitFolders("x/x/train", None, "x/x/test"),
        ),
        (("x/train/cat/1.jpg", "__MACOSX/x/._1.jpg", "LICENSE"), SplitFolders("x/train")),
    ],
)
def test_nested_archive_folders_are_skipped(tmp_path, names, expected):
    assert find_split_folders(write(tmp_path, *names)) == expected


def test_empty_split_folder_is_ignored(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "val/", "valid/cat/1.jpg")
    assert find_split_folders(tmp_path).valid == "valid"


INVALID_LAYOUTS = {
    "two validation folders": (
        ("train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"),
        ("val/ and valid/", "validation"),
    ),
    "two test folders": (
        ("train/a/1.jpg", "test/a/1.jpg", "Testing/a/1.jpg"),
        ("Testing/ and test/",),
    ),
    "misspelt train": (("trian/a/1.jpg", "test/a/1.jpg"), ("no train/", "rename trian/ to train/")),
    "prefixed names": (
        ("seg_train/a/1.jpg", "seg_test/a/1.jpg", "seg_pred/1.jpg"),
        ("no train/", "seg_train/ to train/", "seg_test/ to test/"),
    ),
    "numbered names": (
        ("train2017/a/1.jpg", "val2017/a/1.jpg"),
        ("train2017/ to train/", "val2017/"),
    ),
    "misspelt test": (("train/a/1.jpg", "tset/a/1.jpg"), ("no test/, but tset/", "rename it")),
    "numbered validation": (
        ("train/a/1.jpg", "test/a/1.jpg", "val2/1.jpg"),
        ("val2/", "rename it"),
    ),
    "only test": (("test/a/1.jpg",), ("no train/", "It has test/")),
    "classes next to test": (("cat/1.jpg", "test/1.jpg"), ("no train/", "test/, cat/")),
    "two classes next to test": (
        ("cat/1.jpg", "dog/1.jpg", "test/1.jpg"),
        ("If cat/, dog/ are the classes", "move them into train/"),
    ),
    "only one image": (("1.jpg",), ("holds 1 image and no folders",)),
    "only images": (("1.jpg", "2.jpg"), ("2 images and no folders", "one folder per class")),
    "empty folder": ((), ("is empty",)),
}


@pytest.mark.parametrize("case", INVALID_LAYOUTS)
def test_invalid_layouts_are_explained(tmp_path, case):
    names, message_parts = INVALID_LAYOUTS[case]
    with pytest.raises(InputError) as caught:
        find_split_folders(write(tmp_path, *names))
    message = str(caught.value)
    assert all(part in message for part in (*message_parts, str(tmp_path)))
    assert "elete" not in message  # never suggest to delete files
    assert 2 <= len(message.splitlines()) <= 3


def test_evaluation_folder_prefers_the_test_split(tmp_path):
    write(tmp_path, "train/a/1.jpg", "Validation/a/1.jpg")
    assert evaluation_folder(tmp_path) == tmp_path / "Validation"
    write(tmp_path, "TEST/a/1.jpg")
    assert evaluation_folder(tmp_path) == tmp_path / "TEST"
    assert evaluation_folder(tmp_path / "TEST") == tmp_path / "TEST"
