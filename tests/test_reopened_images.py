"""The images of an existing run: its stored split, classes and folders."""

from unicodedata import normalize

import pytest
from image_paths import counts, find_note, images, stored_parts, write

from mixmo_fastai.data.chosen_images import choose_images, reopen_images
from mixmo_fastai.data.parts import DataParts, parts_before_split_json
from mixmo_fastai.errors import InputError


def test_existing_run_on_parts_inside_class_folders_is_opened(tmp_path):
    write(tmp_path, *images("cat", train=2, test=2), *images("dog", train=2, test=2))
    assert counts(reopen_images(tmp_path, DataParts(".")).train) == {"cat": 4, "dog": 4}


def test_drawn_split_does_not_change_when_images_are_added(tmp_path):
    write(tmp_path, *images("", cat=10, dog=10))
    before = choose_images(tmp_path)
    write(tmp_path, "cat/new.jpg", "eel/0.jpg", "eel/1.jpg")
    after = reopen_images(tmp_path, stored_parts(before), ("cat", "dog"))
    assert (after.train, after.test, after.parts) == (before.train, before.test, before.parts)
    assert find_note(after, "Left out").startswith("3 images")
    assert counts(choose_images(tmp_path).train) == {"cat": 9, "dog": 8, "eel": 1}


def test_missing_image_of_a_drawn_split_is_named(tmp_path):
    write(tmp_path, *images("", cat=10, dog=10))
    before = choose_images(tmp_path)
    (tmp_path / before.test["dog"][0]).unlink()
    text = f"1 of the run's 20 images is no longer in .*{before.test['dog'][0]}.\nRestore it"
    with pytest.raises(InputError, match=text):
        reopen_images(tmp_path, stored_parts(before), ("cat", "dog"))
    (tmp_path / before.test["dog"][1]).unlink()
    with pytest.raises(InputError, match=r"2 of the run's 20 images are .*\nRestore them"):
        reopen_images(tmp_path, stored_parts(before), ("cat", "dog"))


def test_skipped_image_may_be_removed(tmp_path):
    """The message on damaged images advises to remove them."""
    write(tmp_path, *images("", cat=10, dog=10))
    before = choose_images(tmp_path)
    damaged = before.train["cat"][0]
    (tmp_path / damaged).unlink()
    after = reopen_images(
        tmp_path, stored_parts(before), ("cat", "dog"), {damaged: "it is damaged"}
    )
    assert counts(after.train) == {"cat": len(before.train["cat"]) - 1, "dog": 8}


def test_new_class_with_test_images_is_named(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("test", cat=1, dog=1))
    before = choose_images(tmp_path)
    write(tmp_path, *images("test", ship=5))
    with pytest.raises(InputError, match=r"test/ship/ is not a class of the run, but has 5 images"):
        reopen_images(tmp_path, stored_parts(before))


def test_parts_do_not_change_when_folders_are_added(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("valid", cat=1, dog=1))
    before = choose_images(tmp_path)
    write(tmp_path, *images("test", cat=1, dog=1))
    after = reopen_images(tmp_path, stored_parts(before))
    assert after == before
    assert choose_images(tmp_path).test != before.test


def test_missing_part_is_named(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("valid", cat=1, dog=1))
    before = choose_images(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"no folder .*valid, which the run"):
        reopen_images(tmp_path, stored_parts(before))


@pytest.mark.parametrize("odd", ["eel", "dog"])
def test_classes_that_differ_from_the_run_are_named(tmp_path, odd):
    write(tmp_path, *images("train", cat=5, dog=5, eel=5))
    (tmp_path / "test").mkdir()
    parts, classes = DataParts("train"), [name for name in ("cat", "dog", "eel") if name != odd]
    with pytest.raises(InputError, match=f"{odd!r} is new"):
        reopen_images(tmp_path, parts, classes)
    (tmp_path / "train" / odd).rename(tmp_path / "away")
    with pytest.raises(InputError, match=f"{odd!r} no longer has training images"):
        reopen_images(tmp_path, parts, ("cat", "dog", "eel"))


def test_run_keeps_the_spelling_and_order_of_its_classes(tmp_path):
    decomposed = normalize("NFD", "ñu")
    write(tmp_path, f"train/{decomposed}/1.jpg", "train/oso/1.jpg", "train/o/1.jpg")
    chosen = reopen_images(tmp_path, DataParts("train"), ("o", decomposed, "oso"))
    assert list(chosen.train) == ["o", decomposed, "oso"]


@pytest.mark.parametrize(
    ("folders", "test"),
    [(("test", "val"), "test"), (("val", "valid"), "val"), (("valid",), "valid"), ((), None)],
)
def test_runs_of_version_0_1_0_use_the_first_of_three_test_folders(tmp_path, folders, test):
    for name in folders:
        (tmp_path / name).mkdir()
    assert parts_before_split_json(tmp_path) == DataParts("train", test=test)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train": "train", "valid": None, "test": None},
        {"train": "train", "valid": None, "test": None, "drawn": {"test_split": "x"}},
        {"train": "train", "valid": None, "test": None, "drawn": 3},
    ],
)
def test_damaged_split_is_refused(values):
    with pytest.raises(InputError, match=r"split\.json is damaged"):
        DataParts.from_mapping(values, "split.json")
