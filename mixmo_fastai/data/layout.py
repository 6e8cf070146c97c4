"""Layout of image folders: find the training, validation and test folders.

Splits are recognised by folder names, ignoring case: train/ or training/; val/, valid/ or
validation/; test/ or testing/; each also with the suffix _set, _data or _images. Without a training
folder, every folder is a class. If the only content is one folder of folders, as after unpacking an
archive into a folder of the same name, that inner folder is read instead.
"""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mixmo_fastai.config.choices import HUB_PREFIX, is_table
from mixmo_fastai.data.listing import Skipped, count_images, scan
from mixmo_fastai.errors import InputError, nearest

WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
"""Names of each split; messages suggest the first."""
_SUFFIXES = ("", "set", "data", "images")
_ROLES = {
    word + suffix: role for role, words in WORDS.items() for word in words for suffix in _SUFFIXES
}
LAYOUT = (
    "An image folder must hold one folder per class, or train/<class>/ and optionally "
    "valid/<class>/ and test/<class>/."
)


@dataclass(frozen=True)
class SplitFolders:
    """Folders of the splits, relative to the image folder; "." is the image folder itself.

    Attributes:
        train: folder of the training images, or of all images if there are no splits.
        valid, test: folders of the validation and test images; None if missing.
        others: other folders next to these, which are not read.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    others: tuple[str, ...] = ()


def find_split_folders(folder: Path) -> SplitFolders:
    """Find the folders of the splits in an image folder.

    Raises:
        InputError: the folder has no supported layout, or two folders match the same split.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"Image folder {folder} {problem}.\n{LAYOUT}")
    if is_saved_dataset(folder):
        raise InputError(
            f"{folder} was written by save_to_disk of the library datasets.\n"
            f"To read it so, pass {HUB_PREFIX}{folder}"
        )
    inner, folders, images = _descend(folder)
    root = folder / inner
    roles = _by_role(root, folders)
    if "train" not in roles:
        _check_class_folders(root, folders, roles)
    elif not _is_class(root, folders, roles):
        _check_spelling(root, folders, roles)
        others = tuple(f"{name}/" for name in folders if name not in roles.values())
        parts = {role: join_path(inner, name) for role, name in roles.items()}
        return SplitFolders(parts["train"], parts.get("valid"), parts.get("test"), others)
    if not folders:
        holds = f"holds {count_images(len(images))} and no folders" if images else "is empty"
        raise InputError(
            f"Image folder {root} {holds}: it has no class folders.\n{layout_advice(root)}"
        )
    return SplitFolders(inner)


_LABELLED = ("train", "label", "truth", "annotation")
"""Parts of the names of tables that probably hold labels."""


def layout_advice(*folders: Path) -> str:
    """Return advice for images without class folders: the layout, or how to read a table.

    Args:
        folders: folders in which to look for a table of labels.
    """
    paths = [folder / name for folder in folders for name in sorted(os.listdir(folder))]
    tables = [path for path in paths if is_table(path.name) and path.name[0] != "."]
    tables.sort(key=lambda path: not any(word in path.name.lower() for word in _LABELLED))
    if not tables:
        return LAYOUT
    command = shlex.join(["mixmo", "fit", str(tables[0])])
    return f"If {tables[0].name} holds the labels, pass it instead of the folder: {command}"


def evaluation_folder(folder: Path) -> Path:
    """Return the test folder of an image folder, else its validation folder, else the folder."""
    roles = _by_role(folder, scan(folder, Skipped())[0])
    name = roles.get("test") or roles.get("valid")
    return folder / name if name else folder


def is_saved_dataset(folder: Path) -> bool:
    """Check whether `save_to_disk` of the library datasets wrote a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def role_of(name: str) -> str | None:
    """Return the split that a folder name stands for: "train", "valid", "test" or None."""
    return _ROLES.get(re.sub(r"[-_ ]", "", name.lower()))


def _descend(folder: Path) -> tuple[str, list[str], list[str]]:
    """Descend through folders whose only content is one folder of folders.

    Returns:
        the inner folder, relative to `folder`, and the names of its folders and images.
    """
    inner = "."
    folders, images = scan(folder, Skipped())
    while len(folders) == 1 and not images and role_of(folders[0]) is None:
        below, loose = scan(folder / inner / folders[0], Skipped())
        if not below or loose:
            break
        inner, folders, images = join_path(inner, folders[0]), below, loose
    return inner, folders, images


def join_path(outer: str, name: str) -> str:
    """Join two relative paths; `outer` may be "." for the image folder."""
    return name or outer if outer == "." else f"{outer}/{name}".rstrip("/")


def _by_role(root: Path, folders: list[str]) -> dict[str, str]:
    """Find the folder of each split.

    Raises:
        InputError: two folders match the same split.
    """
    found: dict[str, list[str]] = {}
    for name in folders:
        if (role := role_of(name)) is not None:
            found.setdefault(role, []).append(name)
    for role, names in found.items():
        full = [name for name in names if any(scan(root / name, Skipped()))] or names[:1]
        if len(full) > 1:
            shown = " and ".join(f"{name}/" for name in full)
            raise InputError(
                f"Image folder {root} has {shown}, but only one of them can hold the "
                f"{_SPLIT_NAMES[role]} images.\n"
                f"Move the other elsewhere, or rename it, for example to {full[-1]}-unused/."
            )
        found[role] = full
    return {role: names[0] for role, names in found.items()}


_SPLIT_NAMES = {"train": "training", "valid": "validation", "test": "test"}


def _is_class(root: Path, folders: list[str], roles: dict[str, str]) -> bool:
    """Check whether train/ is a class of that name: it holds images, next to other classes."""
    if len(roles) > 1 or len(folders) == 1:
        return False
    below, images = scan(root / roles["train"], Skipped())
    return bool(images and not below)


def _check_class_folders(root: Path, folders: list[str], roles: dict[str, str]) -> None:
    """Raise InputError if the training folder is missing or seems to have another name."""
    similar = {role: [name for name in folders if _contains_word(name, role)] for role in WORDS}
    if not roles and sum(map(bool, similar.values())) < 2:
        return  # the folders are classes
    rest = [name for name in folders if name not in roles.values()]
    near = [name for name in rest if name in similar["train"] or nearest(name, WORDS["train"])]
    found = ", ".join(f"{name}/" for name in [*roles.values(), *rest][:6])
    advice = f"Move the training images into {root / 'train'}, one folder per class."
    if rest:
        classes = ", ".join(f"{name}/" for name in rest[:3]) + (", …" if len(rest) > 3 else "")
        advice = f"If {classes} are the classes of the training images, move them into train/."
    if near:
        renamed = ", ".join(
            f"{names[0]}/ to {role}/"
            for role, names in {**similar, "train": near}.items()
            if names and role not in roles
        )
        advice = f"If these are the splits, rename {renamed}."
    raise InputError(f"Image folder {root} has no train/. It has {found}.\n{advice}")


def _check_spelling(root: Path, folders: list[str], roles: dict[str, str]) -> None:
    """Raise InputError if a folder seems to be a misspelled validation or test folder."""
    rest = [name for name in folders if name not in roles.values()]
    for role in ("test", "valid"):
        near = [name for name in rest if _contains_word(name, role) or _is_misspelled(name, role)]
        if role not in roles and near:
            raise InputError(
                f"Image folder {root} has no {role}/, but {near[0]}/.\n"
                f"If it holds the {_SPLIT_NAMES[role]} images, rename it to {role}/; otherwise "
                "move it elsewhere."
            )


def _is_misspelled(name: str, role: str) -> bool:
    """Check for a misspelled split name; strict, since the words are short."""
    is_anagram = any(sorted(name.lower()) == sorted(word) for word in WORDS[role])
    return is_anagram or nearest(name, WORDS[role], cutoff=0.8) is not None


def _contains_word(name: str, role: str) -> bool:
    """Check whether a name contains a word of a split, as in seg_train and val2017."""
    return any(word in WORDS[role] for word in re.split(r"[^a-z]+", name.lower()))
