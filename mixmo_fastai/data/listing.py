"""List image files in a folder like torchvision and fastai: recursively, following links.

Hidden files and folders (.DS_Store, ._x.jpg, .ipynb_checkpoints), system folders (__MACOSX) and
files that are not images (Thumbs.db) are skipped.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mixmo_fastai.data.decoding import is_image, is_unsupported
from mixmo_fastai.errors import InputError

SYSTEM_FOLDERS = frozenset(
    {"__macosx", "$recycle.bin", "system volume information", "@eadir", "lost+found"}
)
"""Folders, in lower case, with copies, previews or deleted files, never with a data set."""

HIDDEN_FILE = ("hidden file", "hidden files")
HIDDEN_FOLDER = ("hidden or system folder", "hidden or system folders")
UNSUPPORTED_FILE = (
    "photograph in a format that cannot be read; convert it to JPEG",
    "photographs in a format that cannot be read; convert them to JPEG",
)
OTHER_FILE = ("file that is not an image", "files that are not images")
OUTSIDE = ("image outside of class folders", "images outside of class folders")
EMPTY_CLASS = ("empty class folder", "empty class folders")
KINDS = (UNSUPPORTED_FILE, HIDDEN_FOLDER, HIDDEN_FILE, OTHER_FILE, OUTSIDE, EMPTY_CLASS)
NUM_EXAMPLES = 3


@dataclass
class Skipped:
    """Files and folders that were skipped, by kind."""

    names: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, kind: tuple[str, str], name: str) -> None:
        """Record a skipped file or folder.

        Args:
            kind: singular and plural, as `HIDDEN_FILE`.
            name: name of the file or folder.
        """
        self.names.setdefault(kind, []).append(name)

    def describe(self) -> str:
        """Return one line with counts and examples; empty when nothing was skipped."""
        found = [(kind, sorted(self.names[kind])) for kind in KINDS if kind in self.names]
        return ", ".join(
            f"{len(names):,} {kind[len(names) > 1]} ({_examples(names)})" for kind, names in found
        )


def count_images(count: int) -> str:
    """Return "1 image", "2 images" and so on."""
    return f"{count:,} image{'s' * (count != 1)}"


def _examples(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = ", …" if len(unique) > NUM_EXAMPLES else ""
    return ", ".join(unique[:NUM_EXAMPLES]) + more


def scan(folder: Path, skipped: Skipped) -> tuple[list[str], list[str]]:
    """List the names of the folders and images directly in a folder, both sorted.

    Links are followed. A broken link counts as an image if it has an image's name, so that reading
    it raises an error that names it.

    Args:
        folder: the folder to list.
        skipped: collects everything else.

    Raises:
        InputError: the folder cannot be listed.
    """
    folders, images = [], []
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"Cannot list the folder {folder}: {error.strerror}.\n"
            "Grant read permission, or remove the folder."
        ) from error
    for entry in entries:
        name, is_folder = entry.name, entry.is_dir()
        if is_folder and (name.startswith(".") or name.lower() in SYSTEM_FOLDERS):
            skipped.add(HIDDEN_FOLDER, f"{name}/")
        elif is_folder:
            folders.append(name)
        elif name.startswith("."):
            skipped.add(HIDDEN_FILE, name)
        elif is_image(name) and (entry.is_file() or entry.is_symlink()):
            images.append(name)
        else:
            skipped.add(UNSUPPORTED_FILE if is_unsupported(name) else OTHER_FILE, name)
    return folders, images


def count_hidden(folder: Path, subfolder: str, skipped: Skipped) -> None:
    """Count the hidden files and folders beside a subfolder and beside its parents.

    Args:
        folder: the folder of a data set.
        subfolder: path relative to it, such as "train"; nothing is counted for ".".
        skipped: receives them.
    """
    for parent in Path(subfolder).parents:
        beside = Skipped()
        scan(folder / parent, beside)
        for kind in (HIDDEN_FOLDER, HIDDEN_FILE):
            for name in beside.names.get(kind, []):
                skipped.add(kind, name)


def images_below(folder: Path, skipped: Skipped, above: Iterable[Path] = ()) -> list[str]:
    """List all images in a folder and its subfolders: relative paths with forward slashes, sorted.

    Args:
        folder: the folder to list; its own name is not checked.
        skipped: collects everything else.
        above: parent folders; links to them are not followed.

    Raises:
        InputError: a folder cannot be listed.
    """
    return sorted(_walk(folder, "", skipped, frozenset(map(os.path.realpath, above))))


def _walk(folder: Path, prefix: str, skipped: Skipped, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a parent folder
        return
    folders, images = scan(folder, skipped)
    yield from (f"{prefix}{name}" for name in images)
    for name in folders:
        yield from _walk(folder / name, f"{prefix}{name}/", skipped, above | {real})
