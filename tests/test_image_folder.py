import json
import os

import numpy as np
import pytest
import torch
from label_tables import write_images
from PIL import Image
from small_data import write_image_folder

from mixmo_fastai.data import decoding, image_folder, image_sets
from mixmo_fastai.data.image_folder import choose_image_size, read_image_folder
from mixmo_fastai.data.sources import ArrayImages, FileImages, load_source
from mixmo_fastai.data.statistics import channel_statistics
from mixmo_fastai.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "pets")


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data_dir"


@pytest.fixture
def no_decoding(monkeypatch):
    """Return a function that makes all later decoding fail."""

    def refuse(*_):
        raise AssertionError("an image was decoded")

    def forbid_decoding():
        for module in (decoding, image_sets):
            monkeypatch.setattr(module, "decode_image", refuse)
        monkeypatch.setattr(image_sets, "decode_batches", refuse)

    return forbid_decoding


def read_pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def find_cache_entry(data_dir):
    (entry,) = (data_dir / "mixmo-cache").iterdir()
    return entry


def test_images_labels_and_names_correspond(folder, data_dir):
    source = load_source(folder, data_dir)
    assert source.name == "pets"
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4
    assert source.test.labels.tolist() == [0, 0, 1, 1]
    assert source.train.labels.dtype == torch.int64
    assert source.train.name(5) == "train/dog/001.png"
    assert source.train.image_shape == (3, 32, 32)
    for images in (source.train, source.test):
        assert images.tensor().is_contiguous()
        for index in range(len(images)):
            expected = read_pixels(folder / images.name(index))
            assert torch.equal(images[index], expected)
            assert torch.equal(images.tensor()[index], expected)


def test_crop_padding_is_an_eighth_and_flip_is_on(folder, data_dir):
    source = load_source(folder, data_dir)
    assert source.crop_padding == 4
    assert source.flip is True


def test_mean_and_std_are_those_of_the_training_images(folder, data_dir):
    source = load_source(folder, data_dir)
    pixels = source.train.tensor().double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    assert source.mean == pytest.approx(mean.tolist(), abs=1e-12)
    assert source.std == pytest.approx(std.tolist(), abs=1e-12)


def test_mean_and_std_of_more_than_one_batch():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1100, 2, 3, 3), np.uint8))
    pixels[600:, 1] //= 4
    scaled = pixels.double() / 255
    mean, std = channel_statistics(pixels)
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_std_of_uniform_images_is_not_zero():
    mean, std = channel_statistics(torch.full((3, 1, 4, 4), 255, dtype=torch.uint8))
    assert mean == pytest.approx((1.0,))
    assert std == pytest.approx((1 / 255,))


def test_classes_without_a_drawn_test_image_are_noted(tmp_path, data_dir):
    names = [f"{name}/{i}.png" for name, count in (("cat", 9), ("dog", 9), ("eel", 1))
             for i in range(count)]  # fmt: skip
    write_images(tmp_path / "pets", names)
    note = "Missing", "test images of 1 of 3 classes: eel"
    source = load_source(str(tmp_path / "pets"))
    again = load_source(str(tmp_path / "pets"), parts=source.parts, classes=source.classes)
    for found in (source, again):
        assert note in found.notes
    none = load_source(str(tmp_path / "pets"), test_split=0)
    assert not [text for label, text in none.notes if label == "Missing"]


def test_hidden_and_other_files_are_ignored(folder, data_dir):
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "readme.txt").touch()
    (folder / "train" / "cat" / ".hidden.png").touch()
    (folder / "train" / "cat" / "Thumbs.db").touch()
    assert len(load_source(folder, data_dir).train) == 8


def test_image_size_setting_gives_square_images(folder, data_dir):
    source = load_source(folder, data_dir, image_size=24)
    assert source.train.image_shape == source.test.image_shape == (3, 24, 24)
    assert source.crop_padding == 3


def test_default_size_is_the_most_common_training_size(tmp_path, data_dir):
    folder = write_image_folder(tmp_path / "pets", size=(20, 28))
    Image.new("RGB", (99, 77)).save(folder / "train" / "cat" / "000.png")
    Image.new("RGB", (99, 77)).save(folder / "test" / "cat" / "000.png")
    source = load_source(folder, data_dir)
    assert source.train.image_shape == source.test.image_shape == (3, 20, 28)


def test_default_size_is_the_median_of_many_sizes(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path, size in zip(paths, [(9, 50), (9, 50), (20, 10), (30, 20), (40, 30)], strict=True):
        Image.new("RGB", size).save(path)  # (width, height)
    assert choose_image_size(paths) == (30, 20)


def test_large_images_are_scaled_down(tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    assert choose_image_size([tmp_path / "wide.png"]) == (100, 224)


def test_image_size_must_be_positive(folder, data_dir):
    with pytest.raises(InputError, match="image_size is 0"):
        load_source(folder, data_dir, image_size=0)


def remove(path):
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()


DAMAGES = {
    "does not exist": remove,
    "has no train/. It has test/": lambda pets: remove(pets / "train"),
    "train has no images": lambda pets: [remove(pets / "train" / name) for name in ("cat", "dog")],
    "only one class with images, 'dog'": lambda pets: remove(pets / "train" / "cat"),
    "test has the class 'dig'": lambda pets: (pets / "test" / "dog").rename(pets / "test" / "dig"),
    "dog/001.png": lambda pets: (pets / "train" / "dog" / "001.png").write_bytes(b"damaged"),
    "cat/000.png": lambda pets: (pets / "test" / "cat" / "000.png").write_bytes(b"damaged"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_invalid_folder_is_explained(folder, data_dir, message):
    DAMAGES[message](folder)
    with pytest.raises(InputError) as caught:
        load_source(folder, data_dir)
    assert message in str(caught.value).replace(os.sep, "/")
    assert str(folder) in str(caught.value)
    assert 2 <= len(str(caught.value).splitlines()) <= 3


def test_file_instead_of_a_folder_is_refused(tmp_path, data_dir):
    (tmp_path / "pets").touch()
    with pytest.raises(InputError, match="is not a folder"):
        load_source(tmp_path / "pets", data_dir)


def test_cached_images_are_not_decoded_again(folder, data_dir, no_decoding):
    first = load_source(folder, data_dir)
    no_decoding()
    second = load_source(folder, data_dir)
    assert torch.equal(first.train.tensor(), second.train.tensor())
    assert torch.equal(first.test.tensor(), second.test.tensor())
    assert (first.mean, first.std) == (second.mean, second.std)


def test_changed_image_is_decoded_again(tmp_path, data_dir):
    folder = write_image_folder(
        tmp_path / "pets", extension=".bmp"
    )  # the size of the file does not change
    load_source(folder, data_dir)
    Image.new("RGB", (32, 32), "red").save(folder / "train" / "cat" / "000.bmp")
    assert load_source(folder, data_dir).train[0].flatten(1)[:, 0].tolist() == [255, 0, 0]


def test_recorded_size_is_used_instead_of_a_choice(folder, data_dir):
    assert read_image_folder(folder, data_dir).train.image_shape != (3, 5, 7)
    source = read_image_folder(folder, data_dir, chosen_size=(5, 7), largest_side=4)
    assert source.train.image_shape == source.test.image_shape == (3, 5, 7)
    again = read_image_folder(folder, data_dir, chosen_size=(5, 7), image_size=6)
    assert again.train.image_shape == (3, 6, 6)
    # The cache of each size is its own.
    expected = read_image_folder(folder, data_dir / "other")
    found = read_image_folder(folder, data_dir)
    assert (found.mean, found.std) == (expected.mean, expected.std) != (source.mean, source.std)
    known = read_image_folder(folder, data_dir, chosen_size=found.train.image_shape[1:])
    assert torch.equal(known.train.tensor(), found.train.tensor())
    assert len([*(data_dir / "mixmo-cache").iterdir()]) == 3


def test_each_image_size_has_its_own_cache(folder, data_dir):
    assert load_source(folder, data_dir, image_size=8).train.image_shape == (3, 8, 8)
    assert load_source(folder, data_dir, image_size=9).train.image_shape == (3, 9, 9)
    assert len(list((data_dir / "mixmo-cache").iterdir())) == 2


def test_changing_the_tensor_does_not_change_the_cache(folder, data_dir):
    pixels = load_source(folder, data_dir).train.tensor()
    expected = pixels.clone()
    pixels.zero_()
    assert torch.equal(load_source(folder, data_dir).train.tensor(), expected)


def truncate(entry):
    content = (entry / "train.npy").read_bytes()
    (entry / "train.npy").write_bytes(content[:-1])


CACHE_DAMAGES = {
    "truncated": truncate,
    "emptied": lambda entry: (entry / "train.npy").write_bytes(b""),
    "not an array": lambda entry: (entry / "train.npy").write_bytes(b"not array" * 99),
    "other shape": lambda entry: np.save(entry / "train.npy", np.zeros((2, 3, 4, 4), np.uint8)),
    "other type": lambda entry: np.save(entry / "train.npy", np.zeros((8, 3, 32, 32), np.int8)),
    "removed": lambda entry: (entry / "train.npy").unlink(),
    "truncated facts": lambda entry: (entry / "facts.json").write_text('{"size": [3'),
    "facts of another type": lambda entry: (entry / "facts.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_damaged_cache_is_rebuilt(folder, data_dir, damage, no_decoding):
    expected = load_source(folder, data_dir)
    pixels = expected.train.tensor().clone()
    CACHE_DAMAGES[damage](find_cache_entry(data_dir))
    repaired = load_source(folder, data_dir)
    assert torch.equal(repaired.train.tensor(), pixels)
    assert repaired.mean == expected.mean
    no_decoding()
    assert torch.equal(load_source(folder, data_dir).train.tensor(), pixels)


def test_images_are_read_without_cache_if_it_is_not_writable(folder, data_dir):
    data_dir.mkdir()
    (data_dir / "mixmo-cache").touch()
    source = load_source(folder, data_dir)
    assert isinstance(source.train, ArrayImages)
    assert torch.equal(source.train[0], read_pixels(folder / "train" / "cat" / "000.png"))


def test_failed_decoding_leaves_no_partial_file(folder, data_dir):
    (folder / "train" / "dog" / "003.png").write_bytes(b"damaged")
    with pytest.raises(InputError):
        load_source(folder, data_dir, image_size=32)
    assert [path.name for path in find_cache_entry(data_dir).iterdir()] == ["facts.json"]


def test_cached_facts_are_plain_json(folder, data_dir):
    source = load_source(folder, data_dir)
    facts = json.loads((find_cache_entry(data_dir) / "facts.json").read_text())
    number, statistics = len(source.train), [list(source.mean), list(source.std)]
    assert facts == {f"size of {number}": [32, 32], f"mean, std of {number}": statistics}


def test_images_above_the_cache_limit_are_decoded_at_each_access(folder, data_dir):
    cached = read_image_folder(folder, data_dir)
    uncached = read_image_folder(folder, data_dir / "other", cache_limit=12 * 3 * 32 * 32 - 1)
    assert isinstance(uncached.train, FileImages)
    assert uncached.train.image_shape == cached.train.image_shape
    assert torch.equal(uncached.train[5], cached.train[5])
    assert torch.equal(uncached.train.tensor(), cached.train.tensor())
    assert uncached.train.name(5) == cached.train.name(5)
    assert (uncached.mean, uncached.std) == (cached.mean, cached.std)
    assert not list((data_dir / "other").rglob("*.npy"))


def test_mean_and_std_above_the_cache_limit_use_a_sample(folder, data_dir, monkeypatch):
    monkeypatch.setattr(image_folder, "_STATISTICS_SAMPLE", 3)
    source = read_image_folder(folder, data_dir, cache_limit=0)
    expected = channel_statistics(source.train.tensor()[::3])
    assert (source.mean, source.std) == expected


@pytest.mark.parametrize("case", ["links", "same name"])
def test_folders_with_equal_names_sizes_and_times_have_separate_caches(tmp_path, data_dir, case):
    red, blue = (
        write_colours(tmp_path / version / "pets", colour)
        for version, colour in (("v1", (255, 0, 0)), ("v2", (0, 0, 255)))
    )
    if case == "links":  # links in one folder point to the first, then to the second folder
        linked = tmp_path / "linked" / "pets"
        for part in ("train", "test"):
            (linked / part).mkdir(parents=True)
            for name in ("cat", "dog"):
                (linked / part / name).symlink_to(red / part / name)
        load_source(linked, data_dir)
        for link in [*linked.glob("*/*")]:
            link.unlink()
            link.symlink_to(blue / link.relative_to(linked))
        blue = linked
    load_source(red, data_dir)
    source = load_source(blue, data_dir)
    assert source.train[0][:, 0, 0].tolist() == source.test[0][:, 0, 0].tolist() == [0, 0, 255]


def test_replaced_files_of_equal_sizes_and_times_are_decoded_again(tmp_path, data_dir):
    folder = write_colours(tmp_path / "pets", (255, 0, 0))
    load_source(folder, data_dir)
    write_colours(folder, (0, 0, 255))
    assert load_source(folder, data_dir).train[0][:, 0, 0].tolist() == [0, 0, 255]


def write_colours(folder, colour):
    """Write images of one colour whose files have equal sizes and times, as from an archive."""
    write_image_folder(folder, extension=".bmp")
    for path in folder.rglob("*.bmp"):
        Image.new("RGB", (32, 32), colour).save(path)
        os.utime(path, (315532800, 315532800))
    return folder


def test_image_size_of_rotated_tiff_is_that_of_the_upright_image(tmp_path, data_dir):
    folder = write_image_folder(tmp_path / "scans")
    for path in folder.rglob("*.png"):
        Image.new("L", (40, 24)).save(path.with_suffix(".tif"), tiffinfo={0x0112: 6})
        path.unlink()
    assert load_source(folder, data_dir).train.image_shape == (3, 40, 24)


def test_broken_link_is_named(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    (folder / "train" / "cat" / "lost.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(InputError, match=r"lost\.png"):
        read_image_folder(folder, tmp_path)
