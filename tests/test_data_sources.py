import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import (
    CIFAR10_CLASSES,
    class_images,
    with_checksums,
    write_cifar10,
    write_cifar100,
    write_tiny_imagenet,
)

from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.data.archives import Unpacked
from mixmo_fastai.data.cifar import CIFAR100, read_cifar10, read_cifar100
from mixmo_fastai.data.sources import SOURCES, data_home, load_source
from mixmo_fastai.data.statistics import channel_statistics
from mixmo_fastai.data.tiny_imagenet import TINY_IMAGENET, read_tiny_imagenet
from mixmo_fastai.errors import InputError

REAL_TINY = Path(__file__).resolve().parents[2] / "shared/data/tiny-imagenet-200-small.tar.xz"


def test_every_named_data_set_has_a_source():
    assert list(SOURCES) == list(DATASETS)


def test_digits_have_their_stated_properties():
    source = load_source("digits")
    facts = DATASETS["digits"]
    assert (len(source.train), len(source.test)) == facts.num_images
    assert source.train.image_shape == source.test.image_shape == facts.image_shape
    assert source.classes == tuple("0123456789")
    assert source.train.name(3) == "train/3"
    assert source.train.tensor().max() == 255
    mean, std = channel_statistics(source.train.tensor())
    assert source.mean == pytest.approx(mean, abs=5e-4)
    assert source.std == pytest.approx(std, abs=5e-4)


def test_digits_are_split_within_each_class():
    from sklearn.datasets import load_digits

    source, target = load_source("digits"), load_digits().target
    for label in range(10):
        count = int((target == label).sum())
        assert (source.test.labels == label).sum() == count // 5
        assert (source.train.labels == label).sum() == count - count // 5


def test_every_fifth_digit_of_a_class_is_a_test_image():
    from sklearn.datasets import load_digits

    digits = load_digits()
    zeros = np.rint(digits.images[digits.target == 0] * 255 / 16)
    source = load_source("digits")
    of_test = source.test.tensor()[source.test.labels == 0][:, 0].numpy()
    assert np.array_equal(of_test, zeros[4::5])


def test_cifar10_is_read(tmp_path):
    source = read_cifar10(Unpacked(write_cifar10(tmp_path), tmp_path))
    assert source.classes == CIFAR10_CLASSES
    assert (len(source.train), len(source.test)) == (100, 20)
    assert source.train.labels.tolist() == list(range(10)) * 10
    third = class_images(np.arange(20) % 10, 10, (32, 32), seed=2)
    pixels = source.train.tensor()
    assert np.array_equal(pixels[40:60].permute(0, 2, 3, 1).numpy(), third)
    assert torch.equal(source.train[41], pixels[41])
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert source.train.labels.dtype == torch.int64
    assert (source.mean, source.flip) == (DATASETS["cifar10"].mean, True)


def test_cifar100_is_read_with_fine_labels(tmp_path):
    source = read_cifar100(Unpacked(write_cifar100(tmp_path), tmp_path))
    assert (len(source.train), len(source.test)) == (200, 100)
    assert source.test.labels.tolist() == list(range(100))
    assert source.classes[99] == "fine_99"
    assert source.train.image_shape == DATASETS["cifar100"].image_shape


def test_cifar_pickled_by_python_3_is_read(tmp_path):
    write_cifar100(tmp_path)
    rows = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    content = pickle.dumps({"data": rows, "fine_labels": [3, 1]}, protocol=4)
    (tmp_path / "cifar-100-python" / "test").write_bytes(content)
    source = read_cifar100(Unpacked(with_checksums(CIFAR100, tmp_path), tmp_path))
    assert np.array_equal(source.test.tensor().flatten(1).numpy(), rows)


def test_changed_cifar_file_is_refused(tmp_path):
    archive = write_cifar10(tmp_path)
    path = tmp_path / archive.folder / "data_batch_3"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="'cifar10' is damaged: data_batch_3 differs") as caught:
        read_cifar10(Unpacked(archive, tmp_path))
    assert str(path.parent) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_nothing_is_unpickled_before_its_checksum_is_verified(tmp_path):
    write_cifar100(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickled_call("os", "mkdir", str(marker)))
    with pytest.raises(InputError, match="differs from its checksum"):
        load_source("cifar100", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("call", [("os", "mkdir"), ("numpy", "load"), ("builtins", "open")])
def test_pickle_with_correct_checksum_calls_no_function(tmp_path, call):
    write_cifar100(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickled_call(*call, str(marker)))
    with pytest.raises(InputError, match=rf"not in the official format.*{call[0]}\.{call[1]}"):
        read_cifar100(Unpacked(with_checksums(CIFAR100, tmp_path), tmp_path))
    assert not marker.exists()


def pickled_call(module, name, argument):
    text = argument.encode()
    return b"".join(
        (b"\x80\x02c", f"{module}\n{name}\n".encode(), b"U", bytes([len(text)]), text, b"\x85R.")
    )


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"\x80\x02].", b"text\n", b"\x80\x02}."])
def test_pickle_in_another_format_is_refused(tmp_path, content):
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "meta").write_bytes(content)
    with pytest.raises(InputError, match="meta is not in the official format"):
        read_cifar100(Unpacked(with_checksums(CIFAR100, tmp_path), tmp_path))


def test_tiny_imagenet_is_read_with_sorted_classes(tmp_path):
    source = read_tiny_imagenet(Unpacked(write_tiny_imagenet(tmp_path), tmp_path))
    assert source.classes[:2] == ("name n00000000", "name n00000001")
    assert source.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert source.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert source.train.image_shape == DATASETS["tinyimagenet"].image_shape
    assert source.train.name(4) == "train/n00000001/images/n00000001_1.JPEG"
    assert source.test.name(4) == "val/images/val_4.JPEG"
    grey = source.train[0]
    assert torch.equal(grey[0], grey[2])
    assert (tmp_path / "mixmo-cache").is_dir()


def test_missing_files_of_tiny_imagenet_are_named(tmp_path):
    root = tmp_path / write_tiny_imagenet(tmp_path).folder
    (root / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(InputError, match=r"val_3\.JPEG"):
        load_source("tinyimagenet", tmp_path)
    for image in (root / "train" / "n00000002" / "images").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=r"no images below .*n00000002"):
        load_source("tinyimagenet", tmp_path)
    (root / "wnids.txt").unlink()
    with pytest.raises(InputError, match=r"damaged: wnids\.txt is missing .* which has train, val"):
        load_source("tinyimagenet", tmp_path)


def test_unknown_class_of_tiny_imagenet_is_named(tmp_path):
    root = tmp_path / write_tiny_imagenet(tmp_path).folder
    with (root / "val" / "val_annotations.txt").open("a") as file:
        file.write("val_0.JPEG\tn77\t0\t0\t0\t0\n")
    with pytest.raises(InputError, match=r"line 9 of .*val_annotations\.txt.*'n77'"):
        load_source("tinyimagenet", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TINY.exists(), reason=f"{REAL_TINY} does not exist")
def test_official_images_of_tiny_imagenet(tmp_path):
    def is_needed(member):
        return re.match(r"[^/]+/([^/]+\.txt$|val/|train/n01)", member.name)

    with tarfile.open(REAL_TINY) as archive:
        archive.extractall(tmp_path, [m for m in archive if is_needed(m)], filter="data")
    root = tmp_path / TINY_IMAGENET.folder
    wnids = sorted(path.name for path in (root / "train").iterdir())
    annotations = (root / "val" / "val_annotations.txt").read_text().splitlines()
    kept = [line for line in annotations if line.split("\t")[1] in wnids]
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "val" / "val_annotations.txt").write_text("\n".join(kept))

    source = load_source("tinyimagenet", tmp_path)
    assert source.classes[0] == "goldfish"
    assert (len(source.train), len(source.test)) == (50 * len(wnids), 10 * len(wnids))
    assert source.train.labels.bincount().tolist() == [50] * len(wnids)
    goldfish = source.train.tensor()[source.train.labels == 0].float().mean((0, 2, 3))
    assert goldfish[0] > goldfish[2] + 30  # more red than blue


def test_unknown_name_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="Did you mean 'cifar100'") as caught:
        load_source("cifar_100")
    assert "path of a folder" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("path", ["./no-such", "no/such", "~/no-such-folder"])
def test_paths_are_distinguished_from_names(path, tmp_path):
    with pytest.raises(InputError, match=r"Image folder .* does not exist"):
        load_source(path, tmp_path)


@pytest.mark.parametrize("size", [4, 16])
def test_named_data_sets_are_resized(size):
    plain, resized = load_source("digits", image_size=8), load_source("digits", image_size=size)
    for before, after in ((plain.train, resized.train), (plain.test, resized.test)):
        assert after.image_shape == (1, size, size)
        assert torch.equal(after.labels, before.labels)
        assert [after.name(i) for i in (0, 5)] == [before.name(i) for i in (0, 5)]
        expected = torch.nn.functional.interpolate(
            before.tensor().float(), (size, size), mode="bilinear", antialias=True
        )
        torch.testing.assert_close(after.tensor().float(), expected, atol=1.0, rtol=0)
    assert (plain.crop_padding, resized.crop_padding) == (1, size // 8)
    assert torch.equal(plain.train.tensor(), load_source("digits").train.tensor())


def test_data_folder_is_chosen_by_precedence(monkeypatch, tmp_path):
    for variable in ("MIXMO_DATA_DIR", "FASTAI_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert data_home() == Path("~/.fastai/data").expanduser()
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "fastai"))
    assert data_home() == tmp_path / "fastai" / "data"
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "mixmo"))
    assert data_home() == tmp_path / "mixmo"
    assert data_home(Path("explicit")) == Path("explicit")


@pytest.mark.slow
def test_reading_data_does_not_import_fastai():
    code = (
        "import sys, mixmo_fastai.data; assert 'torch' not in sys.modules, 'torch'\n"
        "import mixmo_fastai.data.sources; assert 'fastai' not in sys.modules, 'fastai'"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
