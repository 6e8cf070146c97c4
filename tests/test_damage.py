import json
import os

import pytest
import torch
from PIL import Image
from small_data import write_image_folder, write_tiny_imagenet

from mixmo_fastai.cli import run as program
from mixmo_fastai.data import cache
from mixmo_fastai.data.damage import DamagedImagesError
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.tiny_imagenet import read_tiny_imagenet
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.runs.folder import check_same_left_out, open_run

_ARGUMENTS = "--arch wrn10_1 --epochs 1 --batch-size 16 --repeat 1 --device cpu --threads 1 --quiet"
TINY = tuple(_ARGUMENTS.split())


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data_dir"))
    return tmp_path / "data_dir"


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "pets", num_train=20, num_test=4)


def damage(folder):
    """Empty a file, truncate another and write text to a third; return their names."""
    names = ["train/cat/001.png", "train/dog/003.png", "test/dog/002.png"]
    (folder / names[0]).write_bytes(b"")
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-60])
    (folder / names[2]).write_text("<html>not found</html>")
    return names


LIMITS = {"cached": cache.CACHE_LIMIT, "decoded at each access": 0}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("size", [None, 24])
def test_damaged_images_of_all_parts_are_named_in_one_error(folder, data_dir, size, limit):
    names = damage(folder)
    for _ in range(2):  # the second pass uses the stored result
        with pytest.raises(DamagedImagesError) as caught:
            read_image_folder(folder, data_dir, image_size=size, cache_limit=limit)
        message = str(caught.value)
        assert all(name in message for name in names)
        assert "3 of 48 images" in message
        assert "--skip-damaged" in message
        assert len(message.splitlines()) <= 3
        lines = [line.split("\t") for line in caught.value.listed.read_text().splitlines()]
        assert [path for path, _ in lines] == [str(folder / name) for name in names]
        assert lines[0][1] == "the file is empty"


def test_ten_damaged_images_are_named_and_all_are_listed_in_a_file(folder, data_dir):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DamagedImagesError, match=r"cat/009\.png and 10 more") as caught:
        load_source(folder, data_dir)
    assert "010.png" not in str(caught.value)
    assert len(caught.value.listed.read_text().splitlines()) == len(caught.value.reasons) == 20


def test_single_damaged_image_is_named_with_its_reason(folder, data_dir):
    (folder / "train" / "cat" / "001.png").write_bytes(b"")
    with pytest.raises(DamagedImagesError, match=r"001\.png \(the file is empty\)"):
        load_source(folder, data_dir)


def test_broken_links_are_named_in_one_error(folder, data_dir):
    for name in ("lost", "gone"):
        (folder / "train" / "cat" / f"{name}.png").symlink_to(folder / "missing.png")
    with pytest.raises(DamagedImagesError, match=r"gone\.png, train/cat/lost\.png"):
        load_source(folder, data_dir)


def test_list_is_written_elsewhere_if_the_cache_is_not_writable(folder, data_dir):
    names = damage(folder)
    data_dir.mkdir()
    (data_dir / "mixmo-cache").touch()
    with pytest.raises(DamagedImagesError) as caught:
        load_source(folder, data_dir)
    try:
        assert len(caught.value.listed.read_text().splitlines()) == len(names)
    finally:
        caught.value.listed.unlink()


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_damaged_images_are_skipped_and_others_unchanged(tmp_path, folder, data_dir, limit):
    complete = load_source(folder, data_dir)
    names = damage(folder)
    for _ in range(2):
        source = read_image_folder(folder, data_dir, cache_limit=limit, skip_damaged=True)
        assert [*source.left_out] == names
        assert dict(source.notes)["Left out"].startswith("3 unreadable images: train/cat/001.png")
        for part in ("train", "test"):
            all_images, remaining = getattr(complete, part), getattr(source, part)
            rows = [i for i in range(len(all_images)) if all_images.name(i) not in names]
            assert [remaining.name(i) for i in range(len(remaining))] == [
                all_images.name(i) for i in rows
            ]
            assert torch.equal(remaining.labels, all_images.labels[rows])
            assert torch.equal(remaining.tensor(), all_images.tensor()[rows])


def test_damage_of_all_training_images_is_refused(folder, data_dir):
    for path in (folder / "train").glob("*/*.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"no training image can be decoded\.\nRestore .*git lfs"):
        load_source(folder, data_dir, skip_damaged=True)


def test_single_skipped_image_is_named_with_its_reason(folder, data_dir, monkeypatch):
    Image.new("RGB", (60, 60)).save(folder / "train" / "cat" / "001.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    source = load_source(folder, data_dir, skip_damaged=True)
    assert dict(source.notes)["Left out"].startswith(
        "1 unreadable image: train/cat/001.png (it has 0 megapixels, "
    )


def test_nothing_is_skipped_without_damage(folder, data_dir):
    source = load_source(folder, data_dir, skip_damaged=True)
    assert (len(source.train), source.left_out) == (40, {})
    assert "Left out" not in dict(source.notes)


def test_repaired_images_are_used_again(folder, data_dir):
    names = damage(folder)
    load_source(folder, data_dir, skip_damaged=True)
    for name in names:
        Image.new("RGB", (32, 32)).save(folder / name)
    assert len(load_source(folder, data_dir).train) == 40


def test_skipping_all_images_of_a_class_is_refused(folder, data_dir):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="No training image of the class 'cat' can"):
        load_source(folder, data_dir, skip_damaged=True)


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_errors_of_the_machine_are_not_treated_as_damage(folder, data_dir, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)):
        load_source(folder, data_dir, skip_damaged=True)


def test_tiny_imagenet_skips_damaged_images(tmp_path):
    from mixmo_fastai.data.archives import Unpacked

    archive = write_tiny_imagenet(tmp_path, packed=False)
    unpacked = Unpacked(archive, tmp_path)
    complete = read_tiny_imagenet(unpacked)
    path = sorted(unpacked.folder.glob("train/*/images/*.JPEG"))[1]
    path.write_bytes(b"")
    with pytest.raises(DamagedImagesError, match=path.name):
        read_tiny_imagenet(unpacked)
    source = read_tiny_imagenet(unpacked, skip_damaged=True)
    assert len(source.train) == len(complete.train) - 1
    assert [*source.left_out] == [path.relative_to(unpacked.folder).as_posix()]


def test_run_stores_its_skipped_images(folder, data_dir, tmp_path, capsys):
    names = damage(folder)
    run = tmp_path / "run"
    assert program(["fit", str(folder), *TINY, "--skip-damaged", "--out", str(run)]) == 0
    assert [*json.loads((run / "left-out.json").read_text())] == names
    before = open_run(run).metrics()["test"]
    for name in names:  # the run does not use repaired images
        Image.new("RGB", (32, 32)).save(folder / name)
    finished = open_finished(open_run(run))
    assert (len(finished.source.train), len(finished.source.test)) == (38, 7)
    capsys.readouterr()
    assert program(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == before
    assert program(["fit", "--resume", str(run), "--quiet"]) == 0

    (folder / "train" / "cat" / "000.png").write_bytes(b"")
    assert program(["eval", str(run)]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "train/cat/000.png" in output
    assert "restore" in output
    assert "--skip-damaged" not in output


def test_runs_with_different_skipped_images_are_not_compared(tmp_path, folder, data_dir):
    runs = [tmp_path / "first", tmp_path / "second"]
    for number, run in enumerate(runs):
        (folder / f"train/cat/{number:03}.png").write_bytes(b"")
        assert program(["fit", str(folder), *TINY, "--skip-damaged", "--out", str(run)]) == 0
    first, second = map(open_run, runs)
    check_same_left_out(first, first)
    with pytest.raises(InputError, match=r"skipped 2 unreadable images.*first 1"):
        check_same_left_out(first, second)


def test_prediction_names_unreadable_images(folder, data_dir, tmp_path, capsys):
    run = tmp_path / "run"
    assert program(["fit", str(folder), *TINY, "--out", str(run)]) == 0
    names = [name for name in damage(folder) if name.startswith("train")]
    capsys.readouterr()
    assert program(["predict", str(run), str(folder / "train")]) == 1
    output = capsys.readouterr().err.replace("\n", "")
    assert "2 of 40 images" in output
    assert all(os.path.basename(name) in output for name in names)
