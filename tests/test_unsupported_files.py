"""Photographs in formats that Pillow does not read, and files that are no data sets."""

import pytest
import torch
from label_tables import write_images

from mixmo_fastai.config.resolve import check_dataset
from mixmo_fastai.data.decoding import UndecodableError, decode_image, is_unsupported
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.models.pretrained import read_weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.heic", True), ("A.HEIC", True), ("b.NEF", True), ("c.jpg", False), (".d.heic", False)],
)
def test_formats_of_phones_and_cameras_are_known(name, expected):
    assert is_unsupported(name) is expected


def test_a_folder_of_unsupported_photographs_says_so(tmp_path):
    for name in ("cat/IMG_1.HEIC", "cat/IMG_2.HEIC", "dog/IMG_3.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match=r"no images that can be read, but 3 .*\.\nConvert them"):
        load_source(tmp_path)


def test_skipped_photographs_are_named_apart_from_other_files(tmp_path):
    write_images(tmp_path, [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(6)])
    (tmp_path / "cat/IMG_1.HEIC").write_bytes(b"\0")
    (tmp_path / "cat/notes.txt").write_bytes(b"\0")
    (skipped,) = [text for name, text in load_source(tmp_path).notes if name == "Skipped"]
    photograph = "1 photograph in a format that cannot be read; convert it to JPEG (IMG_1.HEIC)"
    assert skipped == f"{photograph}, 1 file that is not an image (notes.txt)"


def test_decoding_names_the_format(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UndecodableError, match=r"format \.heic is not supported\.\nConvert it"):
        decode_image(tmp_path / "a.heic")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos.zip", r"'.*photos\.zip' is an archive; unpack it\.\nPass a folder"),
        ("photos.tar.gz", "is an archive; unpack it"),
        ("photo.jpg", r"photo\.jpg' is a file, not a folder\."),
        ("none.jpg", r"There is no folder '.*none\.jpg'"),
    ],
)
def test_files_are_no_data_sets(tmp_path, name, message):
    if name != "none.jpg":
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        check_dataset(str(tmp_path / name))


def test_weights_saved_by_a_learner_need_no_optimizer(tmp_path):
    weights = {"weight": torch.ones(2)}
    torch.save(weights, tmp_path / "a.pth")
    assert torch.equal(read_weights(tmp_path / "a.pth")["weight"], torch.ones(2))
    torch.save({"model": weights, "opt": [range]}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"learn\.save\(NAME, with_opt=False\)"):
        read_weights(tmp_path / "b.pth")
