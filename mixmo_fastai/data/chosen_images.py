"""Choose the training, validation and test images of a folder, with notes on the choice."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixmo_fastai.data.class_files import (
    Note,
    check_drawn,
    draw_files,
    drawn_text,
    examples,
    missing_classes,
    renamed,
    run_spelling,
    split_files,
)
from mixmo_fastai.data.class_folders import (
    FilesByClass,
    ListedPart,
    check_no_inner_splits,
    is_labelled,
    labelled_files,
    list_part,
    training_files,
)
from mixmo_fastai.data.layout import SplitFolders, find_split_folders, role_of
from mixmo_fastai.data.listing import Skipped, count_hidden, count_images, scan
from mixmo_fastai.data.multi_labels import MultiLabels
from mixmo_fastai.data.parts import DataParts
from mixmo_fastai.data.splits import DEFAULT_TEST_SPLIT
from mixmo_fastai.errors import InputError


def moved_advice(setting: str) -> str:
    """Return what to do if images of a run are not where a setting of it says."""
    return f"Restore it, or write its new path into recipe.toml of the run, as {setting}."


@dataclass(frozen=True)
class ChosenImages:
    """The files of each split by class, in the order of the classes.

    Attributes:
        train: training images; every class has some.
        valid: validation images; None if they are drawn from the training images.
        test: test images; empty if there are no labelled test images.
        parts: origin of the splits, to read the same images again.
        notes: notes on how the folder was read and what was skipped.
        groups: group of each file, for images that belong together; empty without groups.
        multi: the labels of images that may have several, which are all listed in the class
            `multi_labels.ALL`; None if each has one.
    """

    train: FilesByClass
    valid: FilesByClass | None
    test: FilesByClass
    parts: DataParts
    notes: tuple[Note, ...]
    groups: Mapping[str, str] = field(default_factory=dict)
    multi: MultiLabels | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
        return tuple(self.train) if self.multi is None else self.multi.classes


def choose_images(folder: Path, test_split: float | None = None) -> ChosenImages:
    """Find the splits of an image folder, and draw a test set if it has none.

    Args:
        folder: the image folder.
        test_split: fraction of each class to draw; None for `DEFAULT_TEST_SPLIT` if there are
            neither labelled test nor validation images, and for no test set otherwise.

    Raises:
        InputError: the folder has no supported layout, or `test_split` was given for a folder with
            test images.
    """
    split_folders, skipped = find_split_folders(folder), Skipped()
    count_hidden(folder, split_folders.train, skipped)
    listed = list_part(folder, split_folders.train, skipped)
    check_no_inner_splits(folder, listed)
    train = training_files(folder, listed, skipped)
    notes: list[Note] = []
    unlabelled: dict[str, str] = {}
    labelled: dict[str, FilesByClass] = {}
    for role, subfolder in (("valid", split_folders.valid), ("test", split_folders.test)):
        if subfolder is None:
            continue
        part = list_part(folder, subfolder, skipped, train)
        check_no_inner_splits(folder, part)
        if is_labelled(folder, part, listed):
            labelled[role] = labelled_files(part, list(train), skipped)
            notes += missing_classes(role, labelled[role])
        else:
            unlabelled[role] = _describe_unlabelled(folder, part)
    if "test" in labelled and test_split is not None:
        raise InputError(
            f"--test-split is for folders without test images, but {folder} has "
            f"{split_folders.test}/.\nRemove --test-split, or move that folder elsewhere."
        )
    valid = labelled.get("valid")
    if test_split is None:
        test_split = 0.0 if labelled else DEFAULT_TEST_SPLIT
    parts = DataParts(
        split_folders.train,
        valid=split_folders.valid if "valid" in labelled else None,
        test=split_folders.test if "test" in labelled else None,
        drawn=draw_files(train, test_split),
    )
    train, drawn = split_files(train, parts.drawn)
    notes += _missing_drawn(drawn)
    notes = [
        *_folder_notes(folder, split_folders, parts, unlabelled),
        *notes,
        *_skipped_notes(skipped),
        *_others_notes(split_folders.others),
    ]
    return ChosenImages(train, valid, labelled.get("test", drawn), parts, tuple(notes))


def _missing_drawn(drawn: FilesByClass) -> list[Note]:
    """List the classes without images in a drawn test set, if there is one."""
    return missing_classes("test", drawn) if any(drawn.values()) else []


def reopen_images(
    folder: Path,
    parts: DataParts,
    classes: Sequence[str] | None = None,
    left_out: Collection[str] = (),
) -> ChosenImages:
    """Find the images of an earlier run.

    Args:
        folder: the image folder.
        parts: the splits stored with the run.
        classes: class names of the run, in the order of its labels.
        left_out: files skipped by the run; they may be missing.

    Raises:
        InputError: a part, a class or a file of a drawn split is missing, or a class is new.
    """
    if not folder.is_dir():
        raise InputError(f"Image folder {folder} does not exist.\n{moved_advice('data.dataset')}")
    for subfolder in (parts.train, parts.valid, parts.test):
        if subfolder is not None and not (folder / subfolder).is_dir():
            raise InputError(
                f"There is no folder {folder / subfolder}, which the run was trained with.\n"
                "Restore it at this path."
            )
    skipped, notes = Skipped(), list[Note]()
    count_hidden(folder, parts.train, skipped)
    files = training_files(folder, list_part(folder, parts.train, skipped), skipped)
    if parts.drawn is not None:
        notes += check_drawn(folder, parts.drawn, files, left_out)
    train, drawn = split_files(files, parts.drawn)
    spelling = run_spelling(folder, train, classes)
    labelled: dict[str, FilesByClass] = {}
    for role, subfolder in (("valid", parts.valid), ("test", parts.test)):
        if subfolder is not None:
            part = list_part(folder, subfolder, skipped, train)
            labelled[role] = labelled_files(part, list(train), skipped)
            notes += missing_classes(role, labelled[role])
    notes += _missing_drawn(drawn)
    valid = labelled.get("valid")
    return ChosenImages(
        renamed(train, spelling),
        None if valid is None else renamed(valid, spelling),
        renamed(labelled.get("test", drawn), spelling),
        parts,
        (*_part_notes(parts), *notes, *_skipped_notes(skipped)),
    )


def _folder_notes(
    folder: Path, split_folders: SplitFolders, parts: DataParts, unlabelled: Mapping[str, str]
) -> list[Note]:
    """Describe the use of each folder, and splits next to the image folder that are not used.

    Args:
        folder: the image folder.
        split_folders: the folders found in it.
        parts: origin of the splits.
        unlabelled: descriptions of the "valid" and "test" folders without labels.
    """
    notes = _part_notes(parts, unlabelled.get("test"))
    if "valid" in unlabelled:
        notes.append(("Validation", unlabelled["valid"]))
    if role_of(folder.resolve().name) == "train" and split_folders.train == ".":
        parent = folder.resolve().parent
        siblings = scan(parent, Skipped())[0]
        unused = [name for name in siblings if role_of(name) in ("valid", "test")]
        if unused:
            notes.append(("Not used", f"{parent / unused[0]}/; to use it, pass {parent}"))
    return notes


def _part_notes(parts: DataParts, unlabelled_test: str | None = None) -> list[Note]:
    """Describe the use of each folder.

    Args:
        parts: origin of the splits.
        unlabelled_test: a description of the test folder, if it has no labels.
    """
    subfolder = f"{parts.train}/"
    if role_of(Path(parts.train).name) is None:
        where = "" if parts.train == "." else f" in {subfolder}"
        folders = f"one per class{where}, without train/ and test/"
    else:
        uses = ["training", "validation"] if parts.valid is None else ["training"]
        uses += ["testing"] if parts.drawn is not None else []
        joined_uses = " and ".join(uses) if len(uses) < 3 else "training, validation and testing"
        folders = f"{subfolder} for {joined_uses}"
        if parts.valid is not None:
            folders += f", {parts.valid}/ for validation (valid_split is not used)"
        if parts.test is not None:
            folders += f", {parts.test}/ for testing"
    notes = [("Folders", folders)]
    if parts.test is None:
        texts = [drawn_text(parts.drawn)]
        texts += [] if unlabelled_test is None else [unlabelled_test]
        notes.append(("Test set", "; ".join(texts)))
    return notes


def _describe_unlabelled(folder: Path, part: ListedPart) -> str:
    """Describe a validation or test folder without labels, and how to predict its images."""
    if not part.num_images:
        return f"{part.subfolder}/ has no images"
    command = shlex.join(["mixmo", "predict", "RUN", str(folder / part.subfolder)])
    return f"{part.subfolder}/ has {count_images(part.num_images)} without labels: {command}"


def _others_notes(others: Sequence[str]) -> list[Note]:
    """List the folders next to the splits, with the reason why they are not read."""
    empty = [name for name in others if role_of(name.rstrip("/")) is not None]
    unknown = [name for name in others if name not in empty]
    texts = [f"{examples(empty)} (no images)"] if empty else []
    if unknown:
        texts.append(f"{examples(unknown)} (next to train/, only valid/ and test/ are read)")
    return [("Not read", ", ".join(texts))] if texts else []


def _skipped_notes(skipped: Skipped) -> list[Note]:
    text = skipped.describe()
    return [("Skipped", text)] if text else []
