"""Write small data sets of generated images in the official formats.

Each image has the colour of its class plus noise, so that a network learns them in a few steps.
"""

import dataclasses
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mixmo_fastai.data.archives import Archive, file_md5
from mixmo_fastai.data.cifar import CIFAR10, CIFAR100
from mixmo_fastai.data.tiny_imagenet import TINY_IMAGENET

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def class_images(labels: Sequence[int], num_classes: int, size: tuple[int, int], seed: int = 0):
    """Draw RGB images (N, H, W, 3) uint8 in the colours of their classes."""
    colours = np.random.default_rng(0).integers(40, 216, (num_classes, 3))
    noise = np.random.default_rng(seed).integers(-40, 40, (len(labels), *size, 3))
    return (colours[np.asarray(labels)][:, None, None] + noise).astype(np.uint8)


def write_image_folder(
    root: Path,
    *,
    classes: Sequence[str] = ("cat", "dog"),
    num_train: int = 4,
    num_test: int = 2,
    size: tuple[int, int] = (32, 32),
    test_name: str = "test",
    extension: str = ".png",
) -> Path:
    """Write `root/train/<class>/NNN.png` and `root/test/<class>/NNN.png`; counts are per class."""
    for seed, (part, count) in enumerate((("train", num_train), (test_name, num_test))):
        labels = np.repeat(np.arange(len(classes)), count)
        images = class_images(labels, len(classes), size, seed)
        for position, (label, image) in enumerate(zip(labels, images, strict=True)):
            folder = root / part / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{position % count:03}{extension}")
    return root


def write_cifar10(data_dir: Path, *, per_batch: int = 20, packed: bool = False) -> Archive:
    """Write CIFAR-10 to a data folder: five training batches and a test batch of equal size."""
    files = {
        name: _cifar_batch("labels", np.arange(per_batch) % 10, 10, seed)
        for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"])
    }
    files["batches.meta"] = {"num_cases_per_batch": per_batch, "label_names": CIFAR10_CLASSES}
    return _write_cifar(CIFAR10, data_dir, files, packed)


def write_cifar100(
    data_dir: Path, *, num_train: int = 200, num_test: int = 100, packed: bool = False
) -> Archive:
    """Write CIFAR-100 to a data folder."""
    files = {
        "train": _cifar_batch("fine_labels", np.arange(num_train) % 100, 100, seed=0),
        "test": _cifar_batch("fine_labels", np.arange(num_test) % 100, 100, seed=1),
        "meta": {"fine_label_names": [f"fine_{n}" for n in range(100)]},
    }
    return _write_cifar(CIFAR100, data_dir, files, packed)


def write_tiny_imagenet(
    data_dir: Path,
    *,
    num_classes: int = 4,
    num_train: int = 3,
    num_val: int = 2,
    packed: bool = False,
) -> Archive:
    """Write Tiny ImageNet to a data folder; counts are per class, first images are greyscale."""
    root = data_dir / TINY_IMAGENET.folder
    wnids = [f"n{number:08}" for number in range(num_classes)]
    _write_text(root / "wnids.txt", wnids[::-1])
    _write_text(root / "words.txt", [f"{w}\tname {w}, other name" for w in [*wnids, "n9"]])
    for wnid, images in zip(wnids, _tiny_images(num_classes, num_train), strict=True):
        for number, image in enumerate(images):
            _save(image, root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
    lines = []
    for wnid, images in zip(wnids, _tiny_images(num_classes, num_val), strict=True):
        for image in images:
            lines.append(f"val_{len(lines)}.JPEG\t{wnid}\t0\t32\t44\t62")
            _save(image, root / "val" / "images" / lines[-1].partition("\t")[0])
    _write_text(root / "val" / "val_annotations.txt", lines)
    return _pack(TINY_IMAGENET, data_dir) if packed else TINY_IMAGENET


def python2_pickle(value) -> bytes:
    """Pickle a value with the opcodes of Python 2, as in the official CIFAR files."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value) -> bytes:
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(text)) + text
    if isinstance(value, int | np.integer):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, dict):
        items = b"".join(_python2(key) + _python2(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, np.ndarray):
        return _python2_array(value)
    return b"](" + b"".join(_python2(item) for item in value) + b"e"


def _python2_array(array: np.ndarray) -> bytes:
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    minus_one = _python2(-1)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * minus_one + b"K\x00tb"
    shape = b"(" + b"".join(_python2(length) for length in array.shape) + b"t"
    return reconstruct + b"(K\x01" + shape + dtype + b"\x89" + _python2(array.tobytes()) + b"tb"


def _cifar_batch(label_key: str, labels: np.ndarray, num_classes: int, seed: int) -> dict:
    images = class_images(labels, num_classes, (32, 32), seed)
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(labels), -1)
    names = [f"image_{number}.png" for number in range(len(labels))]
    return {
        "batch_label": "generated",
        label_key: labels.tolist(),
        "data": rows,
        "filenames": names,
    }


def _write_cifar(official: Archive, data_dir: Path, files: dict, packed: bool) -> Archive:
    folder = data_dir / official.folder
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(python2_pickle(content))
    archive = with_checksums(official, data_dir)
    return _pack(archive, data_dir) if packed else archive


def with_checksums(official: Archive, data_dir: Path) -> Archive:
    """Return the archive with the checksums of the files that are in its folder now."""
    members = {name: file_md5(data_dir / official.folder / name) for name in official.members}
    return dataclasses.replace(official, members=members)


def _pack(archive: Archive, data_dir: Path) -> Archive:
    """Replace the folder by an archive file with the same content."""
    folder, file = data_dir / archive.folder, data_dir / archive.file_name
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as zipped:
            for path in sorted(folder.rglob("*")):
                zipped.write(path, path.relative_to(data_dir))
    else:
        with tarfile.open(file, "w:gz") as tarred:
            tarred.add(folder, archive.folder)
    shutil.rmtree(folder)
    return dataclasses.replace(archive, md5=file_md5(file))


def _tiny_images(num_classes: int, count: int) -> np.ndarray:
    labels = np.repeat(np.arange(num_classes), count)
    return class_images(labels, num_classes, (64, 64)).reshape(num_classes, count, 64, 64, 3)


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_first = path.stem.endswith("_0")
    Image.fromarray(image).convert("L" if is_first else "RGB").save(path)


def _write_text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
