"""Find the image files that a table names, also by names without folder or suffix."""

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from mixmo_fastai.data.listing import Skipped, images_below
from mixmo_fastai.errors import InputError


def is_named(name: str, files: Collection[str]) -> bool:
    """Check whether a name is that of one of some files."""
    path = PurePosixPath(name)
    return any(_ends_with(PurePosixPath(file), path) for file in files)


class FileFinder:
    """Find the image files that a table names.

    Args:
        root: folder to which names are relative.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[str]] | None = None

    def is_image(self, name: str) -> bool:
        """Check whether a name is that of an image."""
        try:
            return bool(name.strip()) and self.find(name.strip(), "") is not None
        except InputError:  # several
            return True

    def find(self, name: str, where: str) -> str | None:
        """Return the path of an image relative to the root, or an absolute one; None if missing.

        Args:
            name: path relative to the root, absolute path, or the last parts of a path, also
                without suffix.
            where: position of the name, for messages.

        Raises:
            InputError: several images have this name.
        """
        path = PurePosixPath(name if "/" in name else name.replace("\\", "/"))
        if os.path.isfile(self.root / path):  # also False for what is no path at all
            return self._relative(path)
        if path.is_absolute() or not path.name:
            return None
        index = self._index()
        found = [file for file in index.get(path.name, []) if _ends_with(PurePosixPath(file), path)]
        if len(found) > 1:
            raise InputError(
                f"{where}: {len(found)} images are called {name!r}, such as {found[0]} and "
                f"{found[1]}.\nWrite their paths."
            )
        return found[0] if found else None

    def similar(self, name: str) -> str | None:
        """Return the image whose name differs only in case or suffix; None without or with several.

        One in the same folder is preferred.
        """
        parts = _spelling(name)
        files = {file for files in self._index().values() for file in files}
        found = [file for file in files if _spelling(file)[-1:] == parts[-1:]]
        near = [file for file in found if _spelling(file)[-len(parts) :] == parts] or found
        return near[0] if len(near) == 1 else None

    def _relative(self, path: PurePosixPath) -> str:
        if path.is_absolute() and path.is_relative_to(self.root):
            return str(path.relative_to(self.root))
        return str(path)

    def _index(self) -> dict[str, list[str]]:
        """Return the images below the root by file name, with and without suffix."""
        if self._by_name is None:
            self._by_name = {}
            for file in images_below(self.root, Skipped()):
                path = PurePosixPath(file)
                for key in {path.name, path.stem}:
                    self._by_name.setdefault(key, []).append(file)
        return self._by_name


def _spelling(name: str) -> tuple[str, ...]:
    """Return the parts of a path without suffix, in lower case."""
    path = PurePosixPath(name.replace("\\", "/").lower())
    return (*path.parts[:-1], path.stem)


def _ends_with(file: PurePosixPath, name: PurePosixPath) -> bool:
    """Check whether the last parts of a path are those of a name with or without suffix."""
    size = len(name.parts)
    return name.parts in (file.parts[-size:], file.with_suffix("").parts[-size:])
