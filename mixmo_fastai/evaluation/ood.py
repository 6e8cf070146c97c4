"""Out-of-distribution images for a finished run, and how well the run detects them.

Shapes: N test images, O out-of-distribution images of C channels, H × W pixels, M members, K
classes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.resolve import check_ood
from mixmo_fastai.data.damage import damaged_images, find_damaged
from mixmo_fastai.data.layout import evaluation_folder
from mixmo_fastai.data.loose_images import Shape, convert_shape, decode_readable, find_images
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.metrics.ood import detection_metrics


def read_ood_images(
    ood: Sequence[str], dataset: str, shape: Shape, data_dir: Path | None = None
) -> list[Tensor]:
    """Read out-of-distribution images, converted to the shape of a run's images.

    Args:
        ood: names of data sets, whose test sets are read, or folders: their `test/` or `valid/` if
            they have one, otherwise all images below them.
        dataset: data set of the run, a name or a folder.
        shape: (C, H, W) of the run's images.
        data_dir: folder of the data sets.

    Returns:
        (O, C, H, W) uint8 for each data set.

    Raises:
        InputError: a data set is the run's own, is missing or is given twice, or an image cannot be
            read.
    """
    if not ood:
        return []
    check_ood(ood, dataset, _images_of)
    return [_read(name, shape, data_dir) for name in ood]


def ood_entries(
    ood: Sequence[str], in_logits: Tensor, out_logits: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Compute the entry of each out-of-distribution data set in the result of `mixmo eval`.

    Args:
        ood: names of data sets, or folders.
        in_logits: member logits (N, M, K) of the test images.
        out_logits: member logits (O, M, K) of each data set's images.
    """
    return [
        {"dataset": name, "num_images": len(logits), **detection_metrics(in_logits, logits)}
        for name, logits in zip(ood, out_logits, strict=True)
    ]


def _images_of(dataset: str) -> str:
    """Return the name of a named data set, or the folder of an image folder's test images."""
    folder = Path(dataset).expanduser()
    if dataset in DATASETS or not folder.is_dir():
        return dataset
    return str(evaluation_folder(folder))


def _read(name: str, shape: Shape, data_dir: Path | None) -> Tensor:
    """Read one data set; see `read_ood_images`."""
    if name in DATASETS:
        return convert_shape(load_source(name, data_dir).test.tensor(), shape)
    folder, unreadable = Path(name).expanduser(), dict[Path, str]()
    paths = find_images([Path(_images_of(name))])
    decoded = [image for _, image in decode_readable(paths, shape, unreadable)]
    if unreadable:
        names = [os.path.relpath(path, folder) for path in unreadable]
        error = damaged_images(folder, find_damaged(folder, names), len(paths))
        raise error.with_advice("Replace or remove them.")
    return torch.stack(decoded)
