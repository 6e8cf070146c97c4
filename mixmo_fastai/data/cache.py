"""Decoded image folders, kept so that each is decoded once.

    <data folder>/mixmo-cache/<name>-<fingerprint>/train.npy  valid.npy  test.npy  facts.json

The fingerprint covers the folder's real path and the path, size and times of every file, in
nanoseconds, so that a changed folder is decoded again, and no two folders share an entry. The entry
of a folder with damaged images holds their names instead. All of `mixmo-cache` may be deleted at
any time. Without a cache that can be written, images are decoded each time.
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

_FORMAT = 2  # to be raised when the same files would decode to other pixels


@dataclass(frozen=True)
class CacheEntry:
    """What is kept of one image folder in one state.

    Attributes:
        folder: where it is kept.
        root: the image folder.
        files: all image files, relative to `root`.
    """

    folder: Path
    root: Path
    files: tuple[str, ...]

    def fact(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a value that JSON can hold, computed if it is not kept yet.

        Raises:
            DamagedImagesError: it cannot be computed, as images are damaged; all are named.
        """
        facts = self._facts()
        if name not in facts:
            with self._all_damage_named():
                facts[name] = compute()
            self._keep(facts)
        return facts[name]

    def decoded(
        self, parts: Mapping[str, FileImages], limit: int = CACHE_LIMIT
    ) -> Mapping[str, ImageSet]:
        """Decode all parts through the cache; above the limit return them as they are.

        Above the limit every image is decoded once as a check, whose result is kept.

        Args:
            parts: by name, which is that of their file.
            limit: bytes.

        Raises:
            DamagedImagesError: images cannot be decoded; all are named.
        """
        if sum(images.num_bytes for images in parts.values()) > limit:
            self.fact("damaged", self._find_damaged)
            return parts
        with self._all_damage_named():
            return {part: self._decoded(part, images) for part, images in parts.items()}

    def check(self) -> None:
        """Refuse damaged images that are known from before.

        Raises:
            DamagedImagesError: images cannot be decoded; all are named.
        """
        facts = self._facts()
        known = facts.get("damaged")
        if not known or not isinstance(known, dict) or not known.keys() <= set(self.files):
            return
        # They may be readable now: to another user, or on a network that works again.
        if find_damaged(self.root, [*known]).keys() == known.keys():
            raise self._damage(known)
        del facts["damaged"]
        self._keep(facts)

    @contextmanager
    def _all_damage_named(self) -> Iterator[None]:
        """Look for all damaged images when one is met."""
        try:
            yield
        except UndecodableError:
            self._find_damaged()
            raise  # it can be decoded after all, but not to the size that was asked for

    def _find_damaged(self) -> dict[str, str]:
        """Return no damaged image, or keep and name all.

        Raises:
            DamagedImagesError: there are some.
        """
        found = find_damaged(self.root, self.files)
        if found:
            self._keep({**self._facts(), "damaged": found})
            raise self._damage(found)
        return found

    def _damage(self, reasons: dict[str, str]) -> DamagedImagesError:
        return damaged_images(self.root, reasons, len(self.files), self.folder)

    def _keep(self, facts: dict[str, Any]) -> None:
        with suppress(OSError), _replacing(self.folder / "facts.json") as file:
            file.write(json.dumps(facts, indent=1).encode())

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
    home: Path, name: str, root: Path, files: Sequence[str], image_size: int | None
) -> CacheEntry:
    """Find where a folder in its present state is kept.

    Args:
        home: the data folder.
        name: of the data set; the first part of the entry's name.
        root: the folder that the files are relative to.
        files: every file that is read, in order.
        image_size: the size that was asked for, None for that of the images.

    Raises:
        DamagedImagesError: it is known from before that images cannot be decoded; all are named.
    """
    digest = hashlib.sha256(f"{_FORMAT} {image_size}\n{os.path.realpath(root)}\n".encode(*_NAMES))
    real_folders: dict[str, str] = {}
    for file in files:
        digest.update(f"{file}\0{_state(root, file, real_folders)}\n".encode(*_NAMES))
    folder = home / "mixmo-cache" / f"{name}-{digest.hexdigest()[:16]}"
    entry = CacheEntry(folder, root, tuple(files))
    entry.check()
    return entry


_NAMES = ("utf-8", "surrogateescape")  # file names may be any bytes


def _state(root: Path, file: str, real_folders: dict[str, str]) -> str:
    """Describe a file by its real place, size and times; the places of folders are looked up once.

    The time of the last change of any kind tells files that were put in the place of others with
    their sizes and times, as archives are unpacked.
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
    except OSError as error:  # reading it will name it
        return f"missing: {error.errno}"
    return f"{real}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}"


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
