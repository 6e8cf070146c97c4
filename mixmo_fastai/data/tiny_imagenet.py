"""Tiny ImageNet in its official layout: 200 ImageNet classes at 64 × 64 pixels.

    tiny-imagenet-200/wnids.txt  words.txt
                      train/<wnid>/images/*.JPEG
                      val/images/*.JPEG  val/val_annotations.txt

A wnid is the identifier of a WordNet class, such as n01443537. Labels of the official test images
are not published, so the validation split serves as the test set, as in all published results.

The common reorganized layout val/<wnid>/*.JPEG, with or without an images/ folder inside, is
supported too. Without words.txt, classes are named by their wnids.
"""

from collections.abc import Collection
from pathlib import Path

import torch

from mixmo_fastai.data.archives import Archive, Unpacked
from mixmo_fastai.data.cache import cache_entry
from mixmo_fastai.data.damage import LeftOut, read_intact
from mixmo_fastai.data.image_sets import DataSource, FileImages, named_source
from mixmo_fastai.data.listing import Skipped, images_below
from mixmo_fastai.errors import InputError

TINY_IMAGENET = Archive(
    "tinyimagenet",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "tiny-imagenet-200",
    dict.fromkeys(("wnids.txt", "train", "val")),
)

ANNOTATIONS = "val_annotations.txt"
"""File with the labels of the validation images."""
_SIZE = 64


def read_tiny_imagenet(
    unpacked: Unpacked, *, skip_damaged: bool = False, left_out: LeftOut | None = None
) -> DataSource:
    """Load Tiny ImageNet, which is decoded once and cached.

    Args:
        unpacked: the unpacked archive.
        skip_damaged: whether to skip images that cannot be decoded; otherwise an error lists all of
            them.
        left_out: images skipped by an earlier run; exactly these are skipped again.

    Raises:
        InputError: a file is missing, is not in the official format or cannot be decoded.
    """
    return read_intact(lambda files: _read(unpacked, files), skip=skip_damaged, left_out=left_out)


def _read(unpacked: Unpacked, left_out: Collection[str]) -> DataSource:
    root = unpacked.folder
    # Sorted, as in readers that list the class folders: published networks use this label order.
    wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    train, test = (
        images.without(left_out)
        for images in (_train_images(root, wnids), _val_images(root, wnids))
    )
    entry = cache_entry(unpacked.home, "tinyimagenet", root, train.names + test.names, _SIZE)
    decoded = entry.decoded({"train": train, "test": test})
    names = _class_names(root, wnids)
    return named_source("tinyimagenet", names, decoded["train"], decoded["test"])


def read_annotations(path: Path) -> list[tuple[str, str]]:
    """Read file names and wnids from tab-separated lines, which also hold four box coordinates."""
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = (line.split("\t") for line in lines)
    return [(name, rest[0] if rest else "") for name, *rest in fields]


def _train_images(root: Path, wnids: list[str]) -> FileImages:
    return _file_images(root, _by_class_folder(root, "train", wnids))


def _by_class_folder(root: Path, part: str, wnids: list[str]) -> dict[str, int]:
    """List the images in one folder per class, as labels by file name."""
    labels_by_name: dict[str, int] = {}
    for label, wnid in enumerate(wnids):
        folder = root / part / wnid
        names = images_below(folder, Skipped()) if folder.is_dir() else []
        if not names:
            raise InputError(
                f"Tiny ImageNet: no images below {folder}.\n"
                f"{part}/ needs images of every class in wnids.txt."
            )
        labels_by_name |= {f"{part}/{wnid}/{name}": label for name in names}
    return labels_by_name


def _val_images(root: Path, wnids: list[str]) -> FileImages:
    path = root / "val" / ANNOTATIONS
    if any((root / "val" / wnid).is_dir() for wnid in wnids):
        return _file_images(root, _by_class_folder(root, "val", wnids))
    if not path.is_file():
        raise InputError(
            f"Tiny ImageNet: {root / 'val'} has neither {ANNOTATIONS} nor a folder per class, such "
            f"as val/{wnids[0]}/.\nRestore {ANNOTATIONS} from {TINY_IMAGENET.file_name}."
        )
    label_by_wnid = {wnid: label for label, wnid in enumerate(wnids)}
    labels_by_name = {}
    for number, (name, wnid) in enumerate(read_annotations(path), start=1):
        if wnid not in label_by_wnid:
            raise InputError(
                f"Tiny ImageNet: line {number} of {path} has the class {wnid!r}, which is not in "
                f"wnids.txt.\nRestore that file from {TINY_IMAGENET.file_name}."
            )
        labels_by_name[f"val/images/{name}"] = label_by_wnid[wnid]
    return _file_images(root, labels_by_name)


def _file_images(root: Path, labels_by_name: dict[str, int]) -> FileImages:
    labels = torch.tensor(list(labels_by_name.values()), dtype=torch.int64)
    return FileImages(root, tuple(labels_by_name), labels, (_SIZE, _SIZE))


def _class_names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    words_file = root / "words.txt"
    text = words_file.read_text(encoding="utf-8") if words_file.is_file() else ""
    lines = text.splitlines()
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wnid, wnid).partition(",")[0] for wnid in wnids)
