"""Files by class: draw a test set, compare them with those of a run, and rename their classes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import compress
from pathlib import Path
from unicodedata import normalize

import torch

from mixmo_fastai.data.class_folders import FilesByClass
from mixmo_fastai.data.listing import count_images
from mixmo_fastai.data.parts import DrawnTest
from mixmo_fastai.data.splits import draw_test
from mixmo_fastai.errors import InputError

Note = tuple[str, str]
"""A label and a text, one line in the plan of a run."""


def draw_files(
    files: FilesByClass,
    fraction: float,
    groups: Mapping[str, str] | None = None,
    targets: Callable[[Sequence[str]], torch.Tensor] | None = None,
) -> DrawnTest | None:
    """Draw a fraction of each class as test images.

    Args:
        files: the training images.
        fraction: in [0, 1).
        groups: group of each file, to draw whole groups; None or empty without groups.
        targets: returns the labels (N, K) of files that may have several; None for one class each.
    """
    if fraction == 0:
        return None
    counts = torch.tensor([len(class_files) for class_files in files.values()])
    labels = torch.arange(len(files)).repeat_interleave(counts)
    all_files = [file for class_files in files.values() for file in class_files]
    if targets is not None:
        labels = targets(all_files)
    is_test = draw_test(labels, fraction, group_indices(all_files, groups or {}))
    train, test = compress(all_files, ~is_test), compress(all_files, is_test)
    return DrawnTest(fraction, tuple(train), tuple(test))


def group_indices(files: Sequence[str], groups: Mapping[str, str]) -> torch.Tensor | None:
    """Number the groups of files in the order of their first files: (N,) int64; None without.

    Their names have no influence, so that a draw stays the same if they are renamed.
    """
    if not groups:
        return None
    numbers = {name: index for index, name in enumerate(dict.fromkeys(groups[f] for f in files))}
    return torch.tensor([numbers[groups[file]] for file in files], dtype=torch.int64)


def split_files(files: FilesByClass, drawn: DrawnTest | None) -> tuple[FilesByClass, FilesByClass]:
    """Split the images into training images and drawn test images."""
    if drawn is None:
        return files, {}
    train, test = frozenset(drawn.train), frozenset(drawn.test)
    kept = {name: [f for f in class_files if f in train] for name, class_files in files.items()}
    kept = {name: class_files for name, class_files in kept.items() if class_files}
    return kept, {name: [file for file in files[name] if file in test] for name in kept}


def check_drawn(
    folder: Path, drawn: DrawnTest, files: FilesByClass, left_out: Collection[str]
) -> list[Note]:
    """Compare a drawn split with the files that exist now.

    Raises:
        InputError: a file of the split is missing.
    """
    present = {file for class_files in files.values() for file in class_files}
    known = {*drawn.train, *drawn.test}
    if missing := sorted(known - present - {*left_out}):
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise InputError(
            f"{len(missing):,} of the run's {len(known):,} images {verb} no longer in {folder}: "
            f"{examples(missing)}.\nRestore {them}, or start a new run."
        )
    if new := sorted(present - known):
        text = f"{count_images(len(new))} added after the split was drawn: {examples(new)}"
        return [("Left out", text)]
    return []


def run_spelling(
    folder: Path, files: FilesByClass, classes: Sequence[str] | None
) -> dict[str, str]:
    """Map class names to the spelling and order of a run.

    Raises:
        InputError: a class is new or has no training images.
    """
    spelling = {normalize("NFC", name): name for name in (files if classes is None else classes)}
    if changed := sorted(spelling.keys() ^ files.keys()):
        state = "is new" if changed[0] in files else "no longer has training images"
        raise InputError(
            f"The classes in {folder} are not those of the run: {changed[0]!r} {state}.\n"
            "Undo the change, or start a new run."
        )
    return spelling


def renamed(files: FilesByClass, names: dict[str, str]) -> FilesByClass:
    """Rename classes and put them into the order of `names`."""
    return {new: files[name] for name, new in names.items() if name in files}


def drawn_text(drawn: DrawnTest | None) -> str:
    """Describe the test set of a folder without test images."""
    if drawn is None:
        return "none, so validation gives the final metrics (--test-split 0.2 draws one)"
    if not drawn.test:
        return "none: nothing can be held out that leaves each class an image"
    fraction = f"{100 * drawn.test_split:g} % of each class"
    return f"{fraction}, drawn once and stored with the run (--test-split)"


def missing_classes(role: str, images: Mapping[str, Sequence[str] | int]) -> list[Note]:
    """List the classes without images in the validation split or the test set.

    Args:
        role: "valid" or "test".
        images: the images of each class, or their number.
    """
    missing = [name for name, of_class in images.items() if not of_class]
    if not missing:
        return []
    part = {"valid": "validation", "test": "test"}[role]
    text = f"{part} images of {len(missing):,} of {len(images):,} classes: {examples(missing)}"
    return [("Missing", text)]


def examples(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
