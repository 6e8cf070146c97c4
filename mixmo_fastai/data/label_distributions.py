"""Distributions of human labels over the classes: from NumPy arrays, or tables of votes.

Shapes: N images of a split, n of them with votes, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixmo_fastai.data.image_names import ImageNames
from mixmo_fastai.data.vote_tables import RawVotes, read_vote_table
from mixmo_fastai.errors import InputError, summarize_error

SUFFIXES = (".npy", ".csv", ".tsv")
MAX_VALUE = 1e15
"""Largest allowed count; above, sums of counts are no longer exact."""
MAX_DEVIATION = 0.01
"""Largest difference from 1 of the sum of an image's probabilities, which may be rounded."""


@dataclass(frozen=True, eq=False)
class LabelDistributions:
    """Distributions of the labels of images.

    Attributes:
        path: the file.
        layout: how it was read, such as "one row per vote".
        indices: images with votes, (n,) int64, ascending.
        probabilities: (n, K) float64; each row sums to one.
        num_votes: number of votes of all images; None if the file has probabilities.
    """

    path: Path
    layout: str
    indices: Tensor
    probabilities: Tensor
    num_votes: int | None


def read_label_distributions(
    path: Path, images: ImageNames, classes: Sequence[str]
) -> LabelDistributions:
    """Read the label distributions of the images of a split.

    Rows of whole numbers are counts of votes; other rows must sum to one, within `MAX_DEVIATION`.

    Args:
        path: a .npy file of counts or probabilities (N, K), in the official order of the images and
            classes, as in CIFAR-10H; or a .csv or .tsv file, see `vote_tables.read_vote_table`.
        images: the images of the split.
        classes: class names by label.

    Raises:
        InputError: the file cannot be read, has another shape, or refers to unknown images or
            classes; or a row is not a distribution.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} must end in .npy, .csv or .tsv.")
    if suffix == ".npy":
        raw = _read_array(path, images, classes)
    else:
        raw = read_vote_table(path, images, classes)
    _check_values(path, raw, classes)
    sums = raw.values.sum(axis=1, keepdims=True)
    has_counts = bool((raw.values == np.rint(raw.values)).all())
    if not has_counts:
        _check_sums(path, raw, sums)
    order = np.argsort(np.asarray(raw.indices, dtype=np.int64))
    return LabelDistributions(
        path,
        raw.layout,
        torch.from_numpy(np.asarray(raw.indices, dtype=np.int64)[order]),
        torch.from_numpy((raw.values / sums)[order]),
        int(sums.sum()) if has_counts else None,
    )


def _read_array(path: Path, images: ImageNames, classes: Sequence[str]) -> RawVotes:
    """Read an array (N, K) in the order of the images."""
    if not images.has_order:
        raise InputError(
            f"{path}: the rows of a .npy file have no names, and the images of this {images.split} "
            "have no official order.\nUse a .csv file with a column 'image'."
        )
    array = _load_array(path)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path} must hold numbers; got an array of {array.dtype}.")
    expected = (len(images), len(classes))
    if array.shape != expected:
        raise InputError(
            f"{path} must have one row per image of the {images.split} and one column per class, "
            f"{expected}; got {array.shape}."
        )
    rows = [f"row {row}" for row in range(len(images))]
    return RawVotes(range(len(images)), array.astype(np.float64), rows, "one row per image")


def _load_array(path: Path) -> np.ndarray:
    try:
        # Mapped, so that a damaged header cannot request more memory than the file has bytes.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        array.close()
    except FileNotFoundError as error:
        raise InputError(f"There is no file {str(path)!r}.") from error
    except Exception as error:  # the parser of the header raises various errors if it is damaged
        raise InputError(
            f"{path} is not a .npy file of numbers: {summarize_error(error)}.\n"
            "Save it with np.save(file, array), where the array has a numeric dtype."
        ) from error
    raise InputError(f"{path} is an archive of arrays (.npz).\nSave one array with np.save.")


def _check_values(path: Path, raw: RawVotes, classes: Sequence[str]) -> None:
    """Check that values are finite and not negative, and that each image has votes."""
    is_valid = (raw.values >= 0) & (raw.values <= MAX_VALUE)  # also excludes NaN
    if not is_valid.all():
        row, column = np.argwhere(~is_valid)[0]
        raise InputError(
            f"{path}, {raw.rows[row]}: counts and probabilities must be from 0 to {MAX_VALUE:g}; "
            f"got {raw.values[row, column]:g} for the class {classes[column]!r}."
        )
    is_empty = raw.values.sum(axis=1) == 0
    if is_empty.any():
        position = raw.rows[int(is_empty.argmax())]
        others = f"; so do {is_empty.sum() - 1:,} other rows" if is_empty.sum() > 1 else ""
        raise InputError(
            f"{path}, {position}: the votes sum to zero{others}.\n"
            "Images without votes can be left out of a .csv file, but not of a .npy file."
        )


def _check_sums(path: Path, raw: RawVotes, sums: np.ndarray) -> None:
    deviates = np.abs(sums[:, 0] - 1) > MAX_DEVIATION
    if deviates.any():
        row = int(deviates.argmax())
        raise InputError(
            f"{path}, {raw.rows[row]}: the values sum to {sums[row, 0]:g}; they must be whole "
            "numbers of votes, or probabilities that sum to 1."
        )
