import unicodedata

import pytest

from mixmo_fastai.data.listing import Skipped, count_hidden, images_below, scan
from mixmo_fastai.errors import InputError

SYSTEM_FILES = (
    "._a.jpg",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".ipynb_checkpoints/a-checkpoint.jpg",
    "__MACOSX/._a.jpg",
    "__MACOSX/b.jpg",
    "inner/@eaDir/thumbnail.jpg",
    "notes.txt",
)


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_images_are_listed_without_system_files(tmp_path):
    write(tmp_path, *SYSTEM_FILES, "b.JPG", "a.jpg", "inner/c.png", "inner/deeper/d.png")
    skipped = Skipped()
    assert images_below(tmp_path, skipped) == [
        "a.jpg",
        "b.JPG",
        "inner/c.png",
        "inner/deeper/d.png",
    ]
    assert skipped.describe() == (
        "3 hidden or system folders (.ipynb_checkpoints/, @eaDir/, __MACOSX/), "
        "2 hidden files (.DS_Store, ._a.jpg), "
        "3 files that are not images (Thumbs.db, desktop.ini, notes.txt)"
    )


def test_description_is_empty_if_no_file_was_skipped(tmp_path):
    skipped = Skipped()
    images_below(write(tmp_path, "a.jpg"), skipped)
    assert skipped.describe() == ""


def test_description_names_three_skipped_files(tmp_path):
    skipped = Skipped()
    images_below(write(tmp_path, *(f"{number}.txt" for number in range(5))), skipped)
    assert skipped.describe() == "5 files that are not images (0.txt, 1.txt, 2.txt, …)"


def test_description_names_a_repeated_file_name_once(tmp_path):
    skipped = Skipped()
    images_below(write(tmp_path, "a/Thumbs.db", "b/Thumbs.db"), skipped)
    assert skipped.describe() == "2 files that are not images (Thumbs.db)"


def test_links_are_followed_except_for_loops(tmp_path):
    root = write(tmp_path / "root", "a.jpg")
    elsewhere = write(tmp_path / "elsewhere", "b.jpg")
    (root / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    assert images_below(root, Skipped()) == ["a.jpg", "again/b.jpg", "link/b.jpg"]


def test_root_folder_may_be_hidden(tmp_path):
    root = write(tmp_path / ".cache" / ".images", "a.jpg")
    assert images_below(root, Skipped()) == ["a.jpg"]


def test_folders_and_images_are_sorted(tmp_path):
    write(tmp_path, "b/x.jpg", "a/x.jpg", "2.png", "1.png")
    assert scan(tmp_path, Skipped()) == (["a", "b"], ["1.png", "2.png"])


def test_error_names_an_unreadable_folder(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("mixmo_fastai.data.listing.os.scandir", refuse)
    with pytest.raises(InputError, match=f"{tmp_path.name}: Permission denied"):
        images_below(tmp_path, Skipped())


def test_unicode_names_are_not_normalised(tmp_path):
    name = unicodedata.normalize("NFD", "é.jpg")
    assert images_below(write(tmp_path, name), Skipped()) == [name]


def test_hidden_folders_beside_the_training_images_are_counted(tmp_path):
    for name in ("x/train/cat", "__MACOSX/x", "x/.git", "x/notes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("x/._train", "x/train/.DS_Store", "x/README.txt"):
        (tmp_path / name).touch()
    skipped = Skipped()
    count_hidden(tmp_path, "x/train", skipped)
    assert (
        skipped.describe()
        == "2 hidden or system folders (.git/, __MACOSX/), 1 hidden file (._train)"
    )
    nothing = Skipped()
    count_hidden(tmp_path, ".", nothing)
    assert nothing.describe() == ""
