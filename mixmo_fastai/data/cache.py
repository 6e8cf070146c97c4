"""Decoded image folders, kept so that each is decoded once.

    <data folder>/mixmo-cache/<name>-<fingerprint>/train.npy  valid.npy  test.npy  facts.json

The fingerprint covers the paths, sizes and times of all files, so that a changed folder is decoded
anew. The whole of `mixmo-cache` may be deleted at any time. A cache that cannot be written is done
without.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mixmo_fastai.data.image_sets import ArrayImages, FileImages, ImageSet
from mixmo_fastai.errors import InputError

CACHE_LIMIT = 8 * 2**30
"""Bytes of decoded images above which a folder is decoded at each access instead."""

_FORMAT = 1  # to be raised when the same files would decode to other pixels


@dataclass(frozen=True)
class CacheEntry:
    """What is kept of one image folder in one state."""

    folder: Path

    def fact(self, name: str, compute: Callable[[], Any]) -> Any:
        """Give a value that JSON can hold, computed only where it is not yet kept."""
        facts = self._facts()
        if name not in facts:
            facts[name] = compute()
            with suppress(OSError), _replacing(self.folder / "facts.json") as file:
                file.write(json.dumps(facts, indent=1).encode())
        return facts[name]

    def decoded(
        self, parts: Mapping[str, FileImages], limit: int = CACHE_LIMIT
    ) -> Mapping[str, ImageSet]:
        """Decode all parts through the cache; above the limit return them as they are.

        Args:
            parts: by name, which is that of their file.
            limit: bytes.

        Raises:
            InputError: an image cannot be decoded; the message names it.
        """
        if sum(images.num_bytes for images in parts.values()) > limit:
            return parts
        return {part: self._decoded(part, images) for part, images in parts.items()}

    def _decoded(self, part: str, images: FileImages) -> ArrayImages:
        path = self.folder / f"{part}.npy"
        pixels = _map(path, images)
        if pixels is None and _write(path, images):
            pixels = _map(path, images)
        if pixels is None:
            pixels = images.tensor()
        return ArrayImages(pixels, images.labels, images.names, images)

    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads((self.folder / "facts.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}


def cache_entry(
    home: Path, name: str, root: Path, files: Iterable[str], image_size: int | None
) -> CacheEntry:
    """Find where a folder in its present state is kept.

    Args:
        home: the data folder.
        name: of the data set; the first part of the entry's name.
        root: the folder that the files are relative to.
        files: every file that is read, in order.
        image_size: the size that was asked for, None for that of the images.

    Raises:
        InputError: a file is missing.
    """
    digest = hashlib.sha256(f"{_FORMAT} {image_size}\n".encode())
    for file in files:
        try:
            state = os.stat(root / file)
        except OSError as error:
            raise InputError(
                f"Cannot read the image {root / file}: {error.strerror}.\n"
                "Put it back, or make its folder anew."
            ) from error
        digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return CacheEntry(home / "mixmo-cache" / f"{name}-{digest.hexdigest()[:16]}")


def _map(path: Path, images: FileImages) -> Tensor | None:
    """Map a kept array into memory, or None where it is missing, damaged or of other images."""
    try:
        # Copy on write: PyTorch warns of arrays that it could not write to.
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError):
        return None
    if array.shape != (len(images), *images.image_shape) or array.dtype != np.uint8:
        return None
    return torch.from_numpy(array)


def _write(path: Path, images: FileImages) -> bool:
    """Decode to an array file, batch by batch; False where it cannot be written."""
    shape = (len(images), *images.image_shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        with _replacing(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in images.batches():
                file.write(batch.numpy().data)
    except OSError:
        return False
    return True


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name only when it was written to the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
