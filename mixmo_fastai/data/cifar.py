"""CIFAR-10 and CIFAR-100 in their official Python format.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mixmo_fastai.data.archives import Archive, Unpacked
from mixmo_fastai.data.image_sets import ArrayImages, DataSource, named_source, numbered
from mixmo_fastai.errors import InputError

CIFAR10 = Archive(
    "cifar10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)

CIFAR100 = Archive(
    "cifar100",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)


def read_cifar10(unpacked: Unpacked) -> DataSource:
    """Read CIFAR-10 from its five training batches and its test batch.

    Raises:
        InputError: a file is missing, or differs from its checksum.
    """
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    train = _part(unpacked, "train", batches, "labels")
    test = _part(unpacked, "test", ["test_batch"], "labels")
    classes = _load(unpacked, "batches.meta", "label_names")["label_names"]
    return named_source("cifar10", tuple(classes), train, test)


def read_cifar100(unpacked: Unpacked) -> DataSource:
    """Read CIFAR-100 with its 100 fine labels.

    Raises:
        InputError: a file is missing, or differs from its checksum.
    """
    train = _part(unpacked, "train", ["train"], "fine_labels")
    test = _part(unpacked, "test", ["test"], "fine_labels")
    classes = _load(unpacked, "meta", "fine_label_names")["fine_label_names"]
    return named_source("cifar100", tuple(classes), train, test)


def _part(unpacked: Unpacked, part: str, files: Sequence[str], label_key: str) -> ArrayImages:
    batches = [_load(unpacked, name, "data", label_key) for name in files]
    rows = np.concatenate([batch["data"] for batch in batches])  # (N, 3072): red, green, blue
    labels = [label for batch in batches for label in batch[label_key]]
    pixels = torch.from_numpy(rows).view(-1, 3, 32, 32)
    return ArrayImages(pixels, torch.tensor(labels), numbered(part, len(labels)))


def _load(unpacked: Unpacked, name: str, *keys: str) -> dict[str, Any]:
    content = unpacked.read(name)
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        return {key: batch[key] for key in keys}
    except Exception as error:  # an unpickler may raise any exception on invalid content
        raise InputError(
            f"{unpacked.folder / name} is not in the official format: {error}."
        ) from error


def _dtype(spec: str, align: bool = False, copy: bool = False) -> np.dtype:
    # Python 2 pickled these flags as integers, for which NumPy now warns.
    return np.dtype(spec, align=bool(align), copy=bool(copy))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and arrays only."""

    # Looked up through NumPy, since the module of this function was renamed in NumPy 2.
    _reconstruct = np.empty(0).__reduce__()[0]
    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is not allowed")
        return self._allowed[module, name]
