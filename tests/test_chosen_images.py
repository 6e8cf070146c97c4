from collections import Counter
from unicodedata import normalize

import pytest
from image_paths import counts, find_note, images, stored_parts, write

from mixmo_fastai.data.chosen_images import choose_images, reopen_images
from mixmo_fastai.data.parts import DataParts, DrawnTest
from mixmo_fastai.errors import InputError


def test_validation_folder_is_used_for_validation(tmp_path):
    for part in ("train", "valid", "test"):
        write(tmp_path, *images(part, cat=2, dog=1))
    chosen = choose_images(tmp_path)
    assert chosen.train == {
        "cat": ["train/cat/0.jpg", "train/cat/1.jpg"],
        "dog": ["train/dog/0.jpg"],
    }
    assert chosen.valid["dog"] == ["valid/dog/0.jpg"]
    assert chosen.test["dog"] == ["test/dog/0.jpg"]
    assert chosen.parts == DataParts("train", "valid", "test")
    assert find_note(chosen, "Folders") == (
        "train/ for training, valid/ for validation (valid_split is not used), test/ for testing"
    )
    assert len(chosen.notes) == 1


def test_class_folders_without_parts_are_split_within_each_class(tmp_path):
    write(tmp_path, *images("", cat=20, dog=10, eel=2, fox=1))
    chosen = choose_images(tmp_path)
    assert counts(chosen.test) == {"cat": 4, "dog": 2, "eel": 1, "fox": 0}
    assert counts(chosen.train) == {"cat": 16, "dog": 8, "eel": 1, "fox": 1}
    assert chosen.valid is None
    for name, paths in chosen.train.items():
        assert not set(paths) & set(chosen.test[name])
        assert paths == sorted(paths)
    assert chosen.parts.drawn.test_split == 0.2
    assert "20 % of each class" in find_note(chosen, "Test set")
    assert choose_images(tmp_path) == chosen
    half = choose_images(tmp_path, 0.5)
    assert counts(half.test) == {"cat": 10, "dog": 5, "eel": 1, "fox": 0}


def test_test_images_are_drawn_randomly_within_each_class(tmp_path):
    write(tmp_path, *images("", cat=30, dog=30))
    test = choose_images(tmp_path).test
    numbers = [[int(file.split("/")[1].split(".")[0]) for file in paths] for paths in test.values()]
    assert numbers[0] != numbers[1]
    assert all(max(drawn) - min(drawn) > len(drawn) for drawn in numbers)


def test_train_folder_without_other_parts_is_split(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5))
    chosen = choose_images(tmp_path)
    assert counts(chosen.test) == {"cat": 1, "dog": 1}
    assert chosen.parts.train == "train"
    assert find_note(chosen, "Folders") == "train/ for training, validation and testing"


def test_with_a_validation_folder_a_test_set_is_drawn_only_on_request(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("val", cat=1, dog=1))
    chosen = choose_images(tmp_path)
    assert chosen.test == {}
    assert find_note(chosen, "Test set") == (
        "none, so validation gives the final metrics (--test-split 0.2 draws one)"
    )
    chosen = choose_images(tmp_path, 0.4)
    assert counts(chosen.test) == {"cat": 2, "dog": 2}
    assert counts(chosen.train) == {"cat": 3, "dog": 3}
    assert counts(chosen.valid) == {"cat": 1, "dog": 1}


def test_test_split_is_refused_if_there_is_a_test_folder(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("test", cat=1, dog=1))
    with pytest.raises(InputError, match=r"--test-split is for .* has test/"):
        choose_images(tmp_path, 0.2)


UNLABELLED = {
    "loose": ["test/1.jpg", "test/2.jpg"],
    "in a folder": ["test/unknown/1.jpg", "test/unknown/2.jpg"],
    "in images": ["test/images/1.jpg", "test/images/2.jpg"],
    "doubled": ["test/test/1.jpg", "test/test/2.jpg"],
}


@pytest.mark.parametrize("case", UNLABELLED)
@pytest.mark.parametrize("part", ["train", "valid"])
def test_unlabelled_test_images_are_not_used(tmp_path, case, part):
    """A test set is drawn unless there is a validation folder."""
    write(tmp_path, *images("train", cat=5, dog=5), *UNLABELLED[case])
    write(tmp_path, *images(part, cat=5, dog=5))
    chosen = choose_images(tmp_path)
    (text,) = (text for label, text in chosen.notes if label == "Test set")
    assert text.endswith(
        f"; test/ has 2 images without labels: mixmo predict RUN {tmp_path / 'test'}"
    )
    assert len(text) - len(str(tmp_path)) < 140
    assert ("none, " if part == "valid" else "20 % of each class, ") in text
    assert counts(chosen.test) == ({"cat": 1, "dog": 1} if part == "train" else {})
    assert (chosen.valid is None) == (part == "train")


def test_empty_test_folder_is_reported(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("valid", cat=1, dog=1), "test/cat/")
    assert "test/ has no images" in find_note(choose_images(tmp_path), "Test set")


def test_classes_without_test_images_are_reported(tmp_path):
    write(tmp_path, *images("train", cat=2, dog=2, eel=2), *images("test", cat=1, eel=1))
    (tmp_path / "test" / "dog").mkdir()
    chosen = choose_images(tmp_path)
    assert list(chosen.train) == list(chosen.test) == ["cat", "dog", "eel"]
    assert counts(chosen.test) == {"cat": 1, "dog": 0, "eel": 1}
    assert find_note(chosen, "Missing") == "test images of 1 of 3 classes: dog"
    assert find_note(reopen_images(tmp_path, chosen.parts), "Missing") == find_note(
        chosen, "Missing"
    )


def test_classes_without_validation_images_are_reported(tmp_path):
    write(tmp_path, *images("train", cat=2, dog=2, eel=2), *images("val", cat=1))
    chosen = choose_images(tmp_path)
    assert find_note(chosen, "Missing") == "validation images of 2 of 3 classes: dog, eel"
    assert find_note(reopen_images(tmp_path, chosen.parts), "Missing") == find_note(
        chosen, "Missing"
    )


def test_folders_that_are_not_read_are_reported_with_a_reason(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("valid", cat=1), "masks/1.jpg", "val/")
    assert find_note(choose_images(tmp_path), "Not read") == (
        "val/ (no images), masks/ (next to train/, only valid/ and test/ are read)"
    )


def test_empty_class_folders_are_skipped(tmp_path):
    write(
        tmp_path, *images("train", cat=2, dog=2), *images("test", cat=1), "train/eel/", "test/eel/"
    )
    chosen = choose_images(tmp_path)
    assert list(chosen.train) == ["cat", "dog"]
    assert find_note(chosen, "Skipped") == "2 empty class folders (test/eel/, train/eel/)"


def test_skipped_class_folder_is_reported_without_a_part(tmp_path):
    write(tmp_path, *images("", cat=2, dog=2), "eel/")
    assert find_note(choose_images(tmp_path), "Skipped") == "1 empty class folder (eel/)"


def test_images_outside_of_class_folders_are_counted(tmp_path):
    write(
        tmp_path,
        *images("train", cat=2, dog=2),
        *images("test", cat=1),
        "train/x.jpg",
        "test/y.jpg",
    )
    text = find_note(choose_images(tmp_path), "Skipped")
    assert text == "2 images outside of class folders (test/y.jpg, train/x.jpg)"


def test_images_may_be_in_nested_folders_of_a_class(tmp_path):
    write(tmp_path, "cat/1.jpg", "cat/old/2.jpg", "cat/old/older/3.jpg", "dog/images/1.jpg")
    chosen = choose_images(tmp_path, 0)
    assert chosen.train == {
        "cat": ["cat/1.jpg", "cat/old/2.jpg", "cat/old/older/3.jpg"],
        "dog": ["dog/images/1.jpg"],
    }


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = normalize("NFC", "niño"), normalize("NFD", "niño")
    write(tmp_path, f"train/{decomposed}/1.jpg", "train/oso/1.jpg", f"test/{composed}/1.jpg")
    chosen = choose_images(tmp_path)
    assert list(chosen.train) == [composed, "oso"]
    assert chosen.train[composed] == [f"train/{decomposed}/1.jpg"]
    assert chosen.test[composed] == [f"test/{composed}/1.jpg"]


def test_nested_folder_with_the_name_of_its_part_is_read(tmp_path):
    write(tmp_path, *images("train/train", cat=2, dog=2), *images("test/test", cat=1, dog=1))
    chosen = choose_images(tmp_path)
    assert chosen.train["cat"] == ["train/train/cat/0.jpg", "train/train/cat/1.jpg"]
    assert chosen.test["dog"] == ["test/test/dog/0.jpg"]


def test_official_labels_of_tiny_imagenet_are_read(tmp_path):
    write(tmp_path, "train/n1/images/1.jpg", "train/n2/images/1.jpg", "val/images/a.jpg")
    write(tmp_path, "val/images/b.jpg", "test/images/c.jpg")
    (tmp_path / "val" / "val_annotations.txt").write_text("a.jpg\tn2\t0\t0\t9\t9\nb.jpg\tn1\t0\n")
    chosen = choose_images(tmp_path)
    assert chosen.valid == {"n1": ["val/images/b.jpg"], "n2": ["val/images/a.jpg"]}


def test_parent_folder_is_reported_if_the_path_is_its_train_folder(tmp_path):
    write(tmp_path, *images("train", cat=5, dog=5), *images("test", cat=1, dog=1))
    chosen = choose_images(tmp_path / "train")
    assert find_note(chosen, "Not used") == f"{tmp_path / 'test'}/; to use it, pass {tmp_path}"


CSV = {
    "beside images": (["images/1.jpg", "images/2.jpg", "labels.csv"], "labels.csv"),
    "beside loose images": (["1.jpg", "2.jpg", "labels.CSV"], "labels.CSV"),
    "beside parts": (["train/1.jpg", "test/1.jpg", "train.csv"], "train.csv"),
    "in a part": (["train/images/1.jpg", "train/labels.tsv"], "labels.tsv"),
    "in a doubled folder": (["x/images/1.jpg", "x/labels.csv"], "labels.csv"),
}


@pytest.mark.parametrize("case", CSV)
def test_folder_with_a_table_names_the_command_that_reads_it(tmp_path, case):
    names, found = CSV[case]
    write(tmp_path, *names)
    with pytest.raises(InputError) as caught:
        choose_images(tmp_path)
    message = str(caught.value)
    (path,) = tmp_path.rglob(found)
    assert message.endswith(f"pass it instead of the folder: mixmo fit {path}")
    assert len(message.splitlines()) == 2


def test_csv_file_next_to_class_folders_is_skipped(tmp_path):
    write(tmp_path, *images("", cat=5, dog=5), "labels.csv")
    chosen = choose_images(tmp_path)
    assert find_note(chosen, "Skipped") == "1 file that is not an image (labels.csv)"


INNER = {
    "train, test": (("train", "test"), 2, "cat/train/, cat/test/"),
    "one class": (("train", "Validation"), 1, "cat/train/, cat/Validation/"),
    "other names": (("Training", "Testing"), 2, "cat/Training/, cat/Testing/"),
    "deeper": (("images/train", "images/val"), 2, "cat/images/train/, cat/images/val/"),
    "three": (("test", "val", "train"), 2, "cat/train/, cat/val/, cat/test/"),
}


@pytest.mark.parametrize("case", INNER)
@pytest.mark.parametrize("part", ["", "train/"])
def test_parts_inside_class_folders_are_refused(tmp_path, case, part):
    names, num_classes, found = INNER[case]
    write(tmp_path, f"{part}cat/0.jpg", f"{part}dog/0.jpg")
    for label in ("cat", "dog")[:num_classes]:
        write(tmp_path, *(f"{part}{label}/{name}/1.jpg" for name in names))
    with pytest.raises(InputError) as caught:
        choose_images(tmp_path)
    message = str(caught.value)
    assert f"inside {num_classes} of 2 class folders" in message
    assert found.replace("cat/", f"{part}cat/") in message
    assert "train/cat/, " in message.splitlines()[1]
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("name", ["train", "test"])
def test_single_part_name_inside_class_folders_is_a_nested_folder(tmp_path, name):
    write(tmp_path, *images("", cat=5, dog=5), f"cat/{name}/1.jpg", f"dog/{name}/1.jpg")
    assert counts(choose_images(tmp_path, 0).train) == {"cat": 6, "dog": 6}


REFUSED = {
    "new class": (images("test", cat=1, fox=1), ("class 'fox', which", "move it elsewhere")),
    "misspelt": (images("test", cat=1, dogs=1), ("If it is the class 'dog'", "rename it")),
    "capital": (images("test", Cat=1), ("the class 'Cat'", "no labels", "mixmo predict")),
    "others": (images("test", katze=1, hund=1), ("'hund'", "no labels", "mixmo predict")),
    "untrained": (
        [*images("test", cat=1, eel=1), "train/eel/"],
        ("test has images of the class 'eel'", "train has none", "Add training images"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_test_classes_that_do_not_match_are_refused(tmp_path, case):
    names, text = REFUSED[case]
    write(tmp_path, *images("train", cat=2, dog=2), *names)
    with pytest.raises(InputError) as caught:
        choose_images(tmp_path)
    assert all(part in str(caught.value) for part in text)
    assert "elete" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_links_to_the_data_set_are_not_followed(tmp_path):
    write(tmp_path, *images("train", cat=2, dog=2), *images("test", cat=1, dog=1))
    (tmp_path / "train" / "loop").symlink_to(tmp_path)
    (tmp_path / "train" / "again").symlink_to(tmp_path / "train")
    assert counts(choose_images(tmp_path).train) == {"cat": 2, "dog": 2}


def test_no_test_set_is_drawn_from_single_images(tmp_path):
    write(tmp_path, *images("", cat=1, dog=1))
    assert find_note(choose_images(tmp_path), "Test set").startswith(
        "none: nothing can be held out that leaves each class an image"
    )


def test_classes_may_be_in_a_folder_named_images(tmp_path):
    write(tmp_path, *images("train/images", cat=2, dog=2), *images("test/images", cat=1, dog=1))
    chosen = choose_images(tmp_path)
    assert chosen.train["cat"] == ["train/images/cat/0.jpg", "train/images/cat/1.jpg"]
    assert counts(chosen.test) == {"cat": 1, "dog": 1}
    assert reopen_images(tmp_path, stored_parts(chosen)).train == chosen.train


def test_unlabelled_images_may_be_in_folders_that_are_not_classes(tmp_path):
    write(tmp_path, *images("train", cat=2, dog=2), *images("test/images", monday=1, tuesday=1))
    text = find_note(choose_images(tmp_path), "Test set")
    assert "test/ has 2 images without labels" in text


def test_drawn_split_contains_each_image_once(tmp_path):
    write(tmp_path, *images("", cat=7, dog=4))
    drawn = choose_images(tmp_path, 0.3).parts.drawn
    assert isinstance(drawn, DrawnTest)
    assert set(Counter([*drawn.train, *drawn.test]).values()) == {1}
    assert len(drawn.train) + len(drawn.test) == 11
