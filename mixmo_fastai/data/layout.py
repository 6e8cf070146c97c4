"""Which folders of an image data set train, validate and test.

The parts are found by their names, in any case: train/ or training/, val/, valid/ or validation/,
test/ or testing/, each also with _set, _data or _images. Without a folder of training images, every
folder is a class. A folder that holds nothing but one folder of folders, as a doubled extraction
leaves it, is read through.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mixmo_fastai.data.listing import Skipped, count_images, scan
from mixmo_fastai.errors import InputError, nearest

WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
"""Names of each part; the first is what messages advise."""
_SUFFIXES = ("", "set", "data", "images")
_ROLES = {
    word + suffix: role for role, words in WORDS.items() for word in words for suffix in _SUFFIXES
}
_TABLES = (".csv", ".tsv")
LAYOUT = (
    "An image folder holds one folder per class, or train/<class>/ beside valid/<class>/ or "
    "test/<class>/."
)


@dataclass(frozen=True)
class Places:
    """The folders of a data set, relative to the folder that was given; "." is that folder itself.

    Attributes:
        train: the training images, or all images where there are no parts.
        valid, test: None where there is none.
        others: folders beside these, which are not read.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    others: tuple[str, ...] = ()


def find_places(folder: Path) -> Places:
    """Find the parts of a data set below a folder.

    Raises:
        InputError: the folder is not one of images, or two folders compete for one part.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"Image folder {folder} {problem}.\n{LAYOUT}")
    inner, folders, images = _descend(folder)
    root = folder / inner
    roles = _by_role(root, folders)
    if "train" not in roles:
        _refuse_missing_train(root, folders, roles)
    elif not _is_class(root, folders, roles):
        _refuse_misspelt(root, folders, roles)
        others = tuple(f"{name}/" for name in folders if name not in roles.values())
        parts = {role: joined(inner, name) for role, name in roles.items()}
        return Places(parts["train"], parts.get("valid"), parts.get("test"), others)
    if not folders:
        holds = f"holds {count_images(len(images))} and no folders" if images else "is empty"
        raise InputError(
            f"Image folder {root} {holds}: it has no class folders.\n{advise_form(root)}"
        )
    return Places(inner)


def advise_form(*folders: Path) -> str:
    """Return what to do about images without class folders: the form, or a remark on CSV files.

    Args:
        folders: where a CSV file with labels may lie.
    """
    names = [name for folder in folders for name in sorted(os.listdir(folder))]
    tables = [name for name in names if name.lower().endswith(_TABLES) and name[0] != "."]
    if not tables:
        return LAYOUT
    return (
        f"Labels in files such as {tables[0]} are not read: move the images of each class into a "
        "folder named like the class.\n"
        "Or train in Python, with ImageDataLoaders.from_csv of fastai and to_mixmo(learn)."
    )


def unseen_part(folder: Path) -> Path:
    """Return the test part of a folder, or its validation part, or all of it if it has neither."""
    roles = _by_role(folder, scan(folder, Skipped())[0])
    name = roles.get("test") or roles.get("valid")
    return folder / name if name else folder


def role_of(name: str) -> str | None:
    """Return which part a folder's name stands for: "train", "valid", "test" or None."""
    return _ROLES.get(re.sub(r"[-_ ]", "", name.lower()))


def _descend(folder: Path) -> tuple[str, list[str], list[str]]:
    """Go through folders that hold one folder of folders and nothing else.

    Returns:
        the inner folder, relative to the outer, and the names of its folders and images.
    """
    inner = "."
    folders, images = scan(folder, Skipped())
    while len(folders) == 1 and not images and role_of(folders[0]) is None:
        below, loose = scan(folder / inner / folders[0], Skipped())
        if not below or loose:
            break
        inner, folders, images = joined(inner, folders[0]), below, loose
    return inner, folders, images


def joined(outer: str, name: str) -> str:
    """Return the path of a folder below a place, which may be "." for the image folder."""
    return name or outer if outer == "." else f"{outer}/{name}".rstrip("/")


def _by_role(root: Path, folders: list[str]) -> dict[str, str]:
    """Find the folder of each part, and refuse two for one."""
    found: dict[str, list[str]] = {}
    for name in folders:
        if (role := role_of(name)) is not None:
            found.setdefault(role, []).append(name)
    for role, names in found.items():
        full = [name for name in names if any(scan(root / name, Skipped()))] or names[:1]
        if len(full) > 1:
            shown = " and ".join(f"{name}/" for name in full)
            raise InputError(
                f"Image folder {root} has {shown}, and only one of them can be the {_PARTS[role]} "
                f"part.\nRename or move the other: a folder is left out under a name such as "
                f"{full[-1]}-unused/."
            )
        found[role] = full
    return {role: names[0] for role, names in found.items()}


_PARTS = {"train": "training", "valid": "validation", "test": "test"}


def _is_class(root: Path, folders: list[str], roles: dict[str, str]) -> bool:
    """Check whether train/ is a class of that name: it holds images, with other classes beside."""
    if len(roles) > 1 or len(folders) == 1:
        return False
    below, images = scan(root / roles["train"], Skipped())
    return bool(images and not below)


def _refuse_missing_train(root: Path, folders: list[str], roles: dict[str, str]) -> None:
    """Refuse parts without training images, and folders that look like parts of another name."""
    alike = {role: [name for name in folders if _is_like(name, role)] for role in WORDS}
    if not roles and sum(map(bool, alike.values())) < 2:
        return  # the folders are classes
    rest = [name for name in folders if name not in roles.values()]
    near = [name for name in rest if name in alike["train"] or nearest(name, WORDS["train"])]
    there = ", ".join(f"{name}/" for name in [*roles.values(), *rest][:6])
    advice = f"Move the training images into {root / 'train'}, one folder per class."
    if rest:
        classes = ", ".join(f"{name}/" for name in rest[:3]) + (", …" if len(rest) > 3 else "")
        advice = f"If {classes} hold the training images of a class each, move them into train/."
    if near:
        renamed = ", ".join(
            f"{names[0]}/ to {role}/"
            for role, names in {**alike, "train": near}.items()
            if names and role not in roles
        )
        advice = f"If that is what they hold, rename {renamed}."
    raise InputError(f"Image folder {root} has no train/. It has {there}.\n{advice}")


def _refuse_misspelt(root: Path, folders: list[str], roles: dict[str, str]) -> None:
    """Refuse a folder that is probably the validation or test part, under another name."""
    rest = [name for name in folders if name not in roles.values()]
    for role in ("test", "valid"):
        near = [name for name in rest if _is_like(name, role) or _is_slip(name, role)]
        if role not in roles and near:
            raise InputError(
                f"Image folder {root} has no {role}/, but {near[0]}/.\n"
                f"If that is the {_PARTS[role]} part, rename it to {role}/; otherwise move it "
                "elsewhere."
            )


def _is_slip(name: str, role: str) -> bool:
    """Check whether a name is probably a misspelt part; words as short as these are often alike."""
    is_anagram = any(sorted(name.lower()) == sorted(word) for word in WORDS[role])
    return is_anagram or nearest(name, WORDS[role], cutoff=0.8) is not None


def _is_like(name: str, role: str) -> bool:
    """Check whether a part is one of the words of a name, as in seg_train and val2017."""
    return any(word in WORDS[role] for word in re.split(r"[^a-z]+", name.lower()))
