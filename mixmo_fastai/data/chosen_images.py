"""Which images of a folder train, validate and test, with the reasons in words."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from unicodedata import normalize

import torch

from mixmo_fastai.data.class_folders import (
    FilesByClass,
    ListedPart,
    is_labelled,
    labelled_files,
    list_part,
    refuse_inner_parts,
    training_files,
)
from mixmo_fastai.data.layout import Places, find_places, role_of
from mixmo_fastai.data.listing import Skipped, count_images, scan
from mixmo_fastai.data.parts import DataParts, DrawnTest
from mixmo_fastai.data.splits import DEFAULT_TEST_SPLIT, draw_test
from mixmo_fastai.errors import InputError

Note = tuple[str, str]
"""A label and a text, as a line of a plan."""


@dataclass(frozen=True)
class ChosenImages:
    """The files of each part, by class, in the order of the classes.

    Attributes:
        train: every class has images.
        valid: None when the training images are split for validation.
        test: empty when there are no labelled test images.
        parts: to read the same images again.
        notes: how the folder was read, and what was left out.
    """

    train: FilesByClass
    valid: FilesByClass | None
    test: FilesByClass
    parts: DataParts
    notes: tuple[Note, ...]


def choose_images(folder: Path, test_split: float | None = None) -> ChosenImages:
    """Find the parts of an image folder, and draw a test set if it has none.

    Args:
        folder: the image folder.
        test_split: fraction of each class to draw; None for `DEFAULT_TEST_SPLIT` when there are
            neither labelled test nor validation images, and for no test set otherwise.

    Raises:
        InputError: the folder does not have the form of a data set, or `test_split` was given for
            one that has test images.
    """
    places, skipped = find_places(folder), Skipped()
    listed = list_part(folder, places.train, skipped)
    refuse_inner_parts(folder, listed)
    train = training_files(folder, listed, skipped)
    notes: list[Note] = []
    unlabelled: dict[str, str] = {}
    labelled: dict[str, FilesByClass] = {}
    for role, place in (("valid", places.valid), ("test", places.test)):
        if place is None:
            continue
        part = list_part(folder, place, skipped, train)
        refuse_inner_parts(folder, part)
        if is_labelled(folder, part, listed):
            labelled[role] = labelled_files(part, list(train), skipped)
            notes += _missing_classes(role, labelled[role])
        else:
            unlabelled[role] = _describe_unlabelled(folder, part)
    if "test" in labelled and test_split is not None:
        raise InputError(
            f"--test-split is for a folder without test images, and {folder} has {places.test}/.\n"
            "Leave --test-split out, or move that folder elsewhere."
        )
    valid = labelled.get("valid")
    if test_split is None:
        test_split = 0.0 if labelled else DEFAULT_TEST_SPLIT
    parts = DataParts(
        places.train,
        valid=places.valid if "valid" in labelled else None,
        test=places.test if "test" in labelled else None,
        drawn=_draw(train, test_split),
    )
    train, drawn = _divided(train, parts.drawn)
    notes = [
        *_folder_notes(folder, places, parts, unlabelled),
        *notes,
        *_skipped_notes(skipped),
        *_others_notes(places.others),
    ]
    return ChosenImages(train, valid, labelled.get("test", drawn), parts, tuple(notes))


def reopen_images(
    folder: Path,
    parts: DataParts,
    classes: Sequence[str] | None = None,
    left_out: Collection[str] = (),
) -> ChosenImages:
    """Find the images of an earlier run again.

    Args:
        folder: the image folder.
        parts: as the run kept them.
        classes: of the run, in the order of its labels.
        left_out: files that the run has left out, which may be gone.

    Raises:
        InputError: a part, a class or a file of a drawn split is missing, or a class is new.
    """
    if not folder.is_dir():
        raise InputError(f"Image folder {folder} does not exist.\nPut it back where it was.")
    for place in (parts.train, parts.valid, parts.test):
        if place is not None and not (folder / place).is_dir():
            raise InputError(
                f"There is no folder {folder / place}, which the run was trained with.\n"
                "Put it back where it was."
            )
    skipped, notes = Skipped(), list[Note]()
    files = training_files(folder, list_part(folder, parts.train, skipped), skipped)
    if parts.drawn is not None:
        notes += _check_drawn(folder, parts.drawn, files, left_out)
    train, drawn = _divided(files, parts.drawn)
    spelled = _spelled_as_before(folder, train, classes)
    labelled: dict[str, FilesByClass] = {}
    for role, place in (("valid", parts.valid), ("test", parts.test)):
        if place is not None:
            part = list_part(folder, place, skipped, train)
            labelled[role] = labelled_files(part, list(train), skipped)
            notes += _missing_classes(role, labelled[role])
    valid = labelled.get("valid")
    return ChosenImages(
        _renamed(train, spelled),
        None if valid is None else _renamed(valid, spelled),
        _renamed(labelled.get("test", drawn), spelled),
        parts,
        (*_part_notes(parts), *notes, *_skipped_notes(skipped)),
    )


def _draw(files: FilesByClass, fraction: float) -> DrawnTest | None:
    """Draw a fraction of each class."""
    if fraction == 0:
        return None
    counts = torch.tensor([len(own) for own in files.values()])
    is_test = draw_test(torch.arange(len(files)).repeat_interleave(counts), fraction)
    every = [file for own in files.values() for file in own]
    train, test = compress(every, ~is_test), compress(every, is_test)
    return DrawnTest(fraction, tuple(train), tuple(test))


def _divided(files: FilesByClass, drawn: DrawnTest | None) -> tuple[FilesByClass, FilesByClass]:
    """Divide training images into those that train and those that were drawn to test."""
    if drawn is None:
        return files, {}
    train, test = frozenset(drawn.train), frozenset(drawn.test)
    kept = {name: [file for file in own if file in train] for name, own in files.items()}
    kept = {name: own for name, own in kept.items() if own}
    return kept, {name: [file for file in files[name] if file in test] for name in kept}


def _check_drawn(
    folder: Path, drawn: DrawnTest, files: FilesByClass, left_out: Collection[str]
) -> list[Note]:
    """Compare a drawn split with the files that are there now."""
    there = {file for own in files.values() for file in own}
    known = {*drawn.train, *drawn.test}
    if missing := sorted(known - there - {*left_out}):
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise InputError(
            f"{len(missing):,} of the run's {len(known):,} images {verb} no longer in {folder}: "
            f"{_few(missing)}.\nPut {them} back, or start a new run."
        )
    if new := sorted(there - known):
        text = f"{count_images(len(new))} that the run was not split with: {_few(new)}"
        return [("Left out", text)]
    return []


def _spelled_as_before(
    folder: Path, files: FilesByClass, classes: Sequence[str] | None
) -> dict[str, str]:
    """Map class names to a run's own spelling and order."""
    before = {normalize("NFC", name): name for name in (files if classes is None else classes)}
    if odd := sorted(before.keys() ^ files.keys()):
        state = "is new" if odd[0] in files else "has no training images any more"
        raise InputError(
            f"The classes in {folder} are not those of the run: {odd[0]!r} {state}.\n"
            "Put back what has changed, or start a new run."
        )
    return before


def _renamed(files: FilesByClass, names: dict[str, str]) -> FilesByClass:
    return {own: files[name] for name, own in names.items() if name in files}


def _folder_notes(
    folder: Path, places: Places, parts: DataParts, unlabelled: Mapping[str, str]
) -> list[Note]:
    """Describe which folder does what, and what lies beside.

    Args:
        folder: the image folder.
        places: the folders found in it.
        parts: the images that are used.
        unlabelled: descriptions of the "valid" and "test" folders without labels.
    """
    notes = _part_notes(parts, unlabelled.get("test"))
    if "valid" in unlabelled:
        notes.append(("Validation", unlabelled["valid"]))
    if role_of(folder.resolve().name) == "train" and places.train == ".":
        parent = folder.resolve().parent
        beside = [name for name in scan(parent, Skipped())[0] if role_of(name) in ("valid", "test")]
        if beside:
            notes.append(("Not used", f"{parent / beside[0]}/; give {parent} to use it"))
    return notes


def _part_notes(parts: DataParts, unlabelled_test: str | None = None) -> list[Note]:
    """Describe which folder does what.

    Args:
        parts: the images that are used.
        unlabelled_test: a description of the test folder, if it has no labels.
    """
    place = f"{parts.train}/"
    if role_of(Path(parts.train).name) is None:
        where = "" if parts.train == "." else f" in {place}"
        folders = f"one per class{where}, without train/ and test/"
    else:
        does = ["trains", "validates"] if parts.valid is None else ["trains"]
        does += ["tests"] if parts.drawn is not None else []
        folders = (
            f"{place} {' and '.join(does) if len(does) < 3 else 'trains, validates and tests'}"
        )
        if parts.valid is not None:
            folders += f", {parts.valid}/ validates (valid_split is not used)"
        if parts.test is not None:
            folders += f", {parts.test}/ tests"
    notes = [("Folders", folders)]
    if parts.test is None:
        texts = [_drawn_text(parts.drawn)]
        texts += [] if unlabelled_test is None else [unlabelled_test]
        notes.append(("Test set", "; ".join(texts)))
    return notes


def _drawn_text(drawn: DrawnTest | None) -> str:
    """Describe the test set of a folder without one."""
    if drawn is None:
        return "none, so validation gives the final figures (--test-split 0.2 draws one)"
    if not drawn.test:
        return "none: each class has one image, and none can be set aside"
    fraction = f"{100 * drawn.test_split:g} % of each class"
    return f"{fraction}, drawn once and kept with the run (--test-split)"


def _describe_unlabelled(folder: Path, part: ListedPart) -> str:
    """Describe a validation or test folder without labels, and how to predict its images."""
    if not part.num_images:
        return f"{part.place}/ has no images"
    command = shlex.join(["mixmo", "predict", "RUN", str(folder / part.place)])
    return f"{part.place}/ has {count_images(part.num_images)} without labels: {command}"


def _missing_classes(role: str, files: FilesByClass) -> list[Note]:
    """Name the classes that a validation or test folder has no images of."""
    missing = [name for name, own in files.items() if not own]
    if not missing:
        return []
    part = {"valid": "validation", "test": "test"}[role]
    text = f"{part} images of {len(missing):,} of {len(files):,} classes: {_few(missing)}"
    return [("Missing", text)]


def _others_notes(others: Sequence[str]) -> list[Note]:
    """Name the folders beside the parts, with the reason why they are not read."""
    empty = [name for name in others if role_of(name.rstrip("/")) is not None]
    unknown = [name for name in others if name not in empty]
    texts = [f"{_few(empty)} (no images)"] if empty else []
    if unknown:
        texts.append(f"{_few(unknown)} (beside train/, only valid/ and test/ are read)")
    return [("Not read", ", ".join(texts))] if texts else []


def _skipped_notes(skipped: Skipped) -> list[Note]:
    told = skipped.describe()
    return [("Skipped", told)] if told else []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
