"""Classes of an image folder: one folder per class, with images in it or in its subfolders.

Class names are compared and shown in Unicode normal form NFC; macOS stores decomposed names.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from mixmo_fastai.data.layout import LAYOUT, WORDS, join_path, layout_advice, role_of
from mixmo_fastai.data.listing import (
    EMPTY_CLASS,
    OUTSIDE,
    UNSUPPORTED_FILE,
    Skipped,
    count_images,
    images_below,
    scan,
)
from mixmo_fastai.data.tiny_imagenet import ANNOTATIONS, read_annotations
from mixmo_fastai.errors import InputError, nearest

FilesByClass = dict[str, list[str]]
"""File names relative to the image folder, by class; both sorted."""

UNLABELLED_NAMES = frozenset({"images", "imgs", "unknown", "unlabeled", "unlabelled", "all"})
"""Common names, in lower case, of a folder of unlabelled images."""


@dataclass(frozen=True)
class ListedPart:
    """The images of one split.

    Attributes:
        subfolder: folder of the split, relative to the image folder.
        files: files by class; a class may have none.
        loose: images outside of class folders.
    """

    subfolder: str
    files: FilesByClass
    loose: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Number of images, inside and outside of class folders."""
        return sum(map(len, self.files.values())) + len(self.loose)


def list_part(
    folder: Path, subfolder: str, skipped: Skipped, known: Collection[str] | None = None
) -> ListedPart:
    """List the images of one split by class.

    Args:
        folder: the image folder.
        subfolder: folder of the split, relative to the image folder.
        skipped: collects everything that is not an image.
        known: the classes of the training images; None for the training split.

    Raises:
        InputError: a folder cannot be listed.
    """
    if (folder / subfolder / ANNOTATIONS).is_file() and (folder / subfolder / "images").is_dir():
        return _annotated_part(folder, subfolder)
    subfolder, names, loose = _descend(folder, subfolder, skipped, known)
    files: FilesByClass = {}
    for name in sorted(names, key=lambda name: (normalize("NFC", name), name)):
        found = images_below(folder / subfolder / name, skipped, above=(folder, folder / subfolder))
        class_files = files.setdefault(normalize("NFC", name), [])
        class_files += [f"{join_path(subfolder, name)}/{file}" for file in found]
    return ListedPart(subfolder, files, tuple(join_path(subfolder, name) for name in loose))


def _descend(
    folder: Path, subfolder: str, skipped: Skipped, known: Collection[str] | None
) -> tuple[str, list[str], list[str]]:
    """List the folders and images of a split.

    Descend into train/train/ or train/images/ if that is the only content. Do not descend into
    test/images/ if none of its folders is a class: its images are then unlabelled.
    """
    names, loose = scan(folder / subfolder, skipped)
    role = role_of(Path(subfolder).name)
    while role is not None and not loose and len(names) == 1:
        inner, loose_inside = scan(folder / subfolder / names[0], Skipped())
        is_repeated = role_of(names[0]) == role
        is_plain = names[0].lower() in UNLABELLED_NAMES and not loose_inside
        has_classes = known is None or any(normalize("NFC", name) in known for name in inner)
        if not inner or not (is_repeated or (is_plain and has_classes)):
            break
        subfolder, names, loose = f"{subfolder}/{names[0]}", inner, loose_inside
    return subfolder, names, loose


def _annotated_part(folder: Path, subfolder: str) -> ListedPart:
    """List the validation images of Tiny ImageNet, whose labels are in a separate file."""
    files: FilesByClass = {}
    for name, wnid in read_annotations(folder / subfolder / ANNOTATIONS):
        files.setdefault(wnid, []).append(f"{subfolder}/images/{name}")
    return ListedPart(subfolder, files, ())


def training_files(folder: Path, part: ListedPart, skipped: Skipped) -> FilesByClass:
    """Return the training images by class, without classes that have none.

    Raises:
        InputError: there are fewer than two classes.
    """
    root = folder / part.subfolder
    files = {name: class_files for name, class_files in part.files.items() if class_files}
    if not files:
        loose = f"{count_images(len(part.loose))}, but no class folders"
        if not part.loose and (names := skipped.names.get(UNSUPPORTED_FILE)):
            raise InputError(
                f"{root} has no images that can be read, but {len(names):,} in other formats, such "
                f"as {names[0]}.\nConvert them to JPEG or PNG."
            )
        holds = loose if part.loose else "no images"
        raise InputError(f"{root} has {holds}.\n{layout_advice(root, folder)}")
    if len(files) == 1:
        advice = layout_advice(root, folder)
        if advice == LAYOUT:
            advice = "Put the images of each class into a separate folder: two classes or more."
        raise InputError(f"{root} has only one class with images, {next(iter(files))!r}.\n{advice}")
    _skip_loose(part, skipped)
    for name in sorted(part.files.keys() - files.keys()):
        skipped.add(EMPTY_CLASS, f"{join_path(part.subfolder, name)}/")
    return files


def is_labelled(folder: Path, part: ListedPart, train: ListedPart) -> bool:
    """Check whether the folders of a validation or test split are classes.

    Unlabelled images are outside of folders, or in a single folder that is not a class, such as
    test/unknown/.

    Raises:
        InputError: some folders are classes and others are not, or a class has no training images.
    """
    known = {name for name, class_files in train.files.items() if class_files}
    non_empty = [name for name, class_files in part.files.items() if class_files]
    unknown = [name for name in non_empty if name not in known]
    if not unknown:
        return bool(non_empty)
    first = unknown[0]
    near = None if _is_not_class_name(first) else nearest(first, known)
    if len(non_empty) == 1 and near is None and first not in train.files:
        return False
    root, train_root = folder / part.subfolder, folder / train.subfolder
    if first in train.files:
        problem = f"{root} has images of the class {first!r}, but {train_root} has none"
        remedy = f"Add training images of {first!r}, or move its folder out of {part.subfolder}/."
    else:
        problem = f"{root} has the class {first!r}, which {train_root} does not have"
        remedy = "Rename the class folder, or move it elsewhere."
        if near is not None:
            remedy = f"If it is the class {near!r}, rename it; otherwise move it elsewhere."
    if len(unknown) == len(non_empty):
        remedy = (
            "Name its folders after the classes. If its images have no labels, move "
            f"{part.subfolder}/ elsewhere and use `mixmo predict` on it after training."
        )
    raise InputError(f"{problem}.\n{remedy}")


def _is_not_class_name(name: str) -> bool:
    return name.lower() in UNLABELLED_NAMES or role_of(name) is not None


def labelled_files(part: ListedPart, classes: list[str], skipped: Skipped) -> FilesByClass:
    """Return the images of a labelled split by class, in the order of `classes`.

    Raises:
        InputError: the split has images of another class.
    """
    _skip_loose(part, skipped)
    for name in sorted(part.files.keys() - set(classes)):
        if part.files[name]:
            raise InputError(
                f"{join_path(part.subfolder, name)}/ is not a class of the run, but has "
                f"{len(part.files[name]):,} images.\nMove it elsewhere, or start a new run."
            )
        skipped.add(EMPTY_CLASS, f"{join_path(part.subfolder, name)}/")
    return {name: part.files.get(name, []) for name in classes}


def check_no_inner_splits(folder: Path, part: ListedPart) -> None:
    """Check that no class folder contains splits, such as cat/train/ and cat/test/.

    A single one, such as cat/train/, is read like any folder inside a class.

    Raises:
        InputError: a class folder has images in folders named after two or more splits.
    """
    depth = 1 if part.subfolder == "." else 1 + len(Path(part.subfolder).parts)
    by_class = {name: _inner_splits(class_files, depth) for name, class_files in part.files.items()}
    mixed = {name: inner for name, inner in by_class.items() if len(inner) > 1}
    if not mixed:
        return
    name, inner = next(iter(mixed.items()))
    found = ", ".join(f"{subfolder}/" for subfolder in inner.values())
    expected = ", ".join(f"{role}/{name}/" for role in inner)
    raise InputError(
        f"{folder} has splits inside {len(mixed):,} of {len(part.files):,} class folders, such as "
        f"{found}: their images would be mixed.\n"
        f"Move the images so that each split holds the classes, such as {expected}. "
        "To merge the splits, rename the inner folders."
    )


def _inner_splits(files: list[str], depth: int) -> dict[str, str]:
    """Find folders inside a class folder that are named after splits.

    Args:
        files: files of the class.
        depth: number of path components up to the class folder.

    Returns:
        the first folder of each split, by split.
    """
    found: dict[str, str] = {}
    for subfolder in dict.fromkeys(file.rpartition("/")[0] for file in files):
        names = subfolder.split("/")
        for end in range(depth, len(names)):
            if (role := role_of(names[end])) is not None:
                found.setdefault(role, "/".join(names[: end + 1]))
                break
    return {role: found[role] for role in WORDS if role in found}


def _skip_loose(part: ListedPart, skipped: Skipped) -> None:
    for name in part.loose:
        skipped.add(OUTSIDE, name)
