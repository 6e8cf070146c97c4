"""Find the images of a split by the names in a user's table."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from unicodedata import normalize

from mixmo_fastai.data.image_sets import DataSource, ImageSet
from mixmo_fastai.errors import InputError


@dataclass(frozen=True, eq=False)
class ImageNames:
    """Names of the images of one split, and how else a user may refer to them.

    Attributes:
        names: name of each image, such as "test/12", or its path relative to the data folder.
        split: display name of the split, such as "test set".
        folder: folder of the split, relative to the data folder; "." for the data folder itself.
        has_order: whether images may be referred to by their index in the official order.
    """

    names: tuple[str, ...]
    split: str
    folder: str = "."
    has_order: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str, where: str) -> int:
        """Return the index of an image.

        Args:
            name: its name, its path relative to the folder of the split, its file name if no other
                image has the same, or its index if `has_order`.
            where: position of the name in a file, for messages.

        Raises:
            InputError: no image or several images have this name.
        """
        cleaned = _clean(name)
        found = self._by_path.get(cleaned, [])
        if not found:
            found = self._by_file_name.get(cleaned, [])
        if not found and self.has_order and re.fullmatch("[0-9]{1,9}", cleaned):
            found = [int(cleaned)][: int(cleaned) < len(self)]
        if len(found) == 1:
            return found[0]
        if found:
            examples = " and ".join(self.names[index] for index in found[:2])
            raise InputError(
                f"{where}: {len(found)} images are called {name!r}, such as {examples}.\n"
                "Write their paths."
            )
        raise InputError(
            f"{where}: the image {name!r} is not in the {self.split} of {len(self):,} images.\n"
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        example = self.names[-1] if self.names else ""
        if self.has_order:
            return f"Use indices from 0 to {len(self) - 1}, or names such as {example}."
        relative = example.removeprefix(f"{self.folder}/")
        shorter = f" or {relative}" if relative != example else ""
        return f"Use paths such as {example}{shorter}."

    @cached_property
    def _by_path(self) -> dict[str, list[int]]:
        """Indices by path; a path relative to the data folder has priority."""
        complete = _group((_clean(name), index) for index, name in enumerate(self.names))
        prefix = _clean(self.folder) + "/"
        relative = _group(
            (_clean(name).removeprefix(prefix), index) for index, name in enumerate(self.names)
        )
        return {**relative, **complete}

    @cached_property
    def _by_file_name(self) -> dict[str, list[int]]:
        return _group((PurePosixPath(_clean(n)).name, i) for i, n in enumerate(self.names))


def image_names(source: DataSource, images: ImageSet, split: str) -> ImageNames:
    """Return the names of the images of a split.

    Test images have an official order if their names end with their index in it, such as "test/12"
    or "val/images/val_12.JPEG". They do not if damaged images were skipped, or for image folders.

    Args:
        source: the data set.
        images: its test images, or its validation images.
        split: "test" or "valid".
    """
    names = tuple(map(images.name, range(len(images))))
    title = {"test": "test set", "valid": "validation split"}[split]
    parts = source.parts
    if parts is not None:
        own_folder = parts.test if split == "test" else parts.valid
        return ImageNames(names, title, own_folder or parts.train)
    folder = names[0].partition("/")[0] if names else "."
    is_numbered = all(_number(name) == index for index, name in enumerate(names))
    return ImageNames(names, title, folder, split == "test" and is_numbered)


def _number(name: str) -> int | None:
    """Return the number at the end of a name, before the suffix; None if there is none."""
    found = re.search("([0-9]{1,9})$", PurePosixPath(name).stem)
    return int(found[1]) if found else None


def _group(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for name, index in pairs:
        grouped.setdefault(name, []).append(index)
    return grouped


def _clean(name: str) -> str:
    """Return a path with forward slashes, without a leading ./, in Unicode normal form NFC."""
    return normalize("NFC", name.strip().replace("\\", "/").removeprefix("./"))
