"""Cache of decoded image folders.

    <data folder>/mixmo-cache/<name>-<fingerprint>/train.npy  valid.npy  test.npy  facts.json

The fingerprint covers the real path of the folder, and path, size and times (in nanoseconds) of
every file, so a changed folder is decoded again and no two folders share an entry. For a folder
with damaged images, the entry holds their names instead. The folder `mixmo-cache` may be deleted at
any time. If the cache cannot be written, images are decoded each time.
"""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mixmo_fastai.data.damage import DamagedImagesError, damaged_images, find_damaged
from mixmo_fastai.data.decoding import UndecodableError
from mixmo_fastai.data.image_sets import ArrayImages, FileImages, ImageSet

CACHE_LIMIT = 8 * 2**30
"""Bytes of decoded images above which a folder is decoded at each access instead."""

_FORMAT = 2  # increment when the same files would be decoded to different pixels


@dataclass(frozen=True)
class CacheEntry:
    """Cache entry of an image folder in one state.

    Attributes:
        folder: folder of the entry.
        root: the image folder, or a `hub_dataset.DatasetRoot`.
        files: all image files, relative to `root`.
    """

    folder: Path
    root: Any
    files: tuple[str, ...]

    def fact(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a cached value that JSON can represent, computing it if it is missing.

        Raises:
            DamagedImagesError: images are damaged; the error lists all of them.
        """
        facts = self._facts()
        if name not in facts:
            with self._reporting_all_damage():
                facts[name] = compute()
            self._write_facts(facts)
        return facts[name]

    def decoded(
        self, parts: Mapping[str, FileImages], limit: int = CACHE_LIMIT
    ) -> Mapping[str, ImageSet]:
        """Decode all splits through the cache; above the limit return them undecoded.

        Above the limit, every image is decoded once as a check, and the result is cached.

        Args:
            parts: image sets by the name of their cache file.
            limit: maximum size of the decoded images in bytes.

        Raises:
            DamagedImagesError: images cannot be decoded; the error lists all of them.
        """
        if sum(images.num_bytes for images in parts.values()) > limit:
            self.fact("damaged", self._find_damaged)
            return parts
        with self._reporting_all_damage():
            return {part: self._decoded(part, images) for part, images in parts.items()}

    def check(self) -> None:
        """Check the images that the cache lists as damaged.

        Raises:
            DamagedImagesError: they still cannot be decoded; the error lists all of them.
        """
        facts = self._facts()
        known = facts.get("damaged")
        if not known or not isinstance(known, dict) or not known.keys() <= set(self.files):
            return
        # They may be readable now, for example after a network failure or by another user.
        if find_damaged(self.root, [*known]).keys() == known.keys():
            raise self._damage_error(known)
        del facts["damaged"]
        self._write_facts(facts)

    @contextmanager
    def _reporting_all_damage(self) -> Iterator[None]:
        """Search for all damaged images if one is found in a with block."""
        try:
            yield
        except UndecodableError:
            self._find_damaged()
            raise  # the image can be decoded, but not to the requested size

    def _find_damaged(self) -> dict[str, str]:
        """Search for damaged images, and cache the result.

        Raises:
            DamagedImagesError: images are damaged.
        """
        found = find_damaged(self.root, self.files)
        if found:
            self._write_facts({**self._facts(), "damaged": found})
            raise self._damage_error(found)
        return found

    def _damage_error(self, reasons: dict[str, str]) -> DamagedImagesError:
        return damaged_images(self.root, reasons, len(self.files), self.folder)

    def _write_facts(self, facts: dict[str, Any]) -> None:
        with suppress(OSError), _replacing(self.folder / "facts.json") as file:
            file.write(json.dumps(facts, indent=1).encode())

    def _decoded(self, part: str, images: FileImages) -> ArrayImages:
        path = self.folder / f"{part}.npy"
        pixels = _map(path, images)
        if pixels is None and _write(path, images):
            pixels = _map(path, images)
        if pixels is None:
            pixels = images.tensor()
        return ArrayImages(pixels, images.labels, images.names, images, images.groups)

    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads((self.folder / "facts.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}


def cache_entry(
    home: Path, name: str, root: Any, files: Sequence[str], image_size: int | tuple[int, ...] | None
) -> CacheEntry:
    """Return the cache entry of a folder in its current state.

    Args:
        home: the data folder.
        name: name of the data set; the first part of the entry's name.
        root: the folder to which the files are relative, or a `hub_dataset.DatasetRoot`.
        files: all files that are read, in order.
        image_size: the requested size, or a height and width that were chosen for other images;
            None for a size chosen from these.

    Raises:
        DamagedImagesError: the cache lists damaged images; the error lists all of them.
    """
    is_folder = isinstance(root, Path)
    name_of_root = os.path.realpath(root) if is_folder else str(root)
    digest = hashlib.sha256(f"{_FORMAT} {image_size}\n{name_of_root}\n".encode(*_NAMES))
    real_folders: dict[str, str] = {}
    for file in files:
        state = _state(root, file, real_folders) if is_folder else root.state(file)
        digest.update(f"{file}\0{state}\n".encode(*_NAMES))
    folder = home / "mixmo-cache" / f"{name}-{digest.hexdigest()[:16]}"
    entry = CacheEntry(folder, root, tuple(files))
    entry.check()
    return entry


_NAMES = ("utf-8", "surrogateescape")  # file names may be any bytes


def _state(root: Path, file: str, real_folders: dict[str, str]) -> str:
    """Describe a file by its real path, size and times; real paths of folders are looked up once.

    The time of the last status change (ctime) detects files that replace others of equal size and
    modification time, as when an archive is unpacked.
    """
    path = os.path.join(root, file)
    folder, name = os.path.split(path)
    try:
        state = os.lstat(path)
        if stat.S_ISLNK(state.st_mode):
            real, state = os.path.realpath(path), os.stat(path)
        else:
            if folder not in real_folders:
                real_folders[folder] = os.path.realpath(folder)
            real = os.path.join(real_folders[folder], name)
    except OSError as error:  # reading the file will report it
        return f"missing: {error.errno}"
    return f"{real}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}"


def _map(path: Path, images: FileImages) -> Tensor | None:
    """Memory-map a cached array; return None if it is missing, damaged or of other images."""
    try:
        # Copy-on-write mode, since PyTorch warns about read-only arrays.
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError):
        return None
    if array.shape != (len(images), *images.image_shape) or array.dtype != np.uint8:
        return None
    return torch.from_numpy(array)


def _write(path: Path, images: FileImages) -> bool:
    """Decode images to an array file, batch by batch; return False if it cannot be written."""
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
    """Open a temporary file that is renamed to `path` when it is written completely."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
