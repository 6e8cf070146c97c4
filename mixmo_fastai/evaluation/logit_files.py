"""Logits of every member and image in a file of NumPy, for analyses of one's own."""

import io
from pathlib import Path

import numpy as np

from mixmo_fastai.data.image_names import image_names
from mixmo_fastai.errors import RunFailedError
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.evaluation.runs import FinishedRun
from mixmo_fastai.runs.files import write_atomically


def write_logits(path: Path, finished: FinishedRun, labelled: LabelledLogits) -> None:
    """Write the logits of the images of the final metrics to an .npz file.

    The file holds `names` (N,), `labels` (N,), or (N, K) of 0 and 1 with several labels per image,
    `logits` (N, M, K) in float32, of the members or of the networks of a deep ensemble, and
    `classes` (K,).

    Args:
        path: the file.
        finished: the run.
        labelled: logits and labels of `finished.final_images`, in their order.

    Raises:
        RunFailedError: the file cannot be written.
    """
    logits, labels = labelled
    names = image_names(finished.source, finished.final_images, finished.final_split).names
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        names=np.array(names, dtype=np.str_),
        labels=labels.cpu().numpy(),
        logits=logits.float().cpu().numpy(),
        classes=np.array(finished.source.classes, dtype=np.str_),
    )
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise RunFailedError(f"Cannot write {path}: {error.strerror or error}.") from error
