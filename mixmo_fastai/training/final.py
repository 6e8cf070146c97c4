"""The evaluation at the end of a training, with the calibration of the run."""

from collections.abc import Sequence
from typing import Any

from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.evaluation.calibration import calibrate_images
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.evaluation.multi_label import evaluate_multi_label
from mixmo_fastai.evaluation.splits import evaluate_splits
from mixmo_fastai.runs.calibration import write_calibration
from mixmo_fastai.runs.folder import RunFolder


def evaluate_and_calibrate(
    run: RunFolder, loaders: Sequence[BatchLoader], logits: Sequence[LabelledLogits]
) -> dict[str, Any]:
    """Compute the final metrics, and write the calibration.

    Args:
        run: the run.
        loaders: of validation, test and, if calibration has images of its own, those.
        logits: member logits and labels of each loader.

    Returns:
        The metrics of `evaluate_splits`, or of `evaluate_multi_label`, which has no calibration.
    """
    is_separate = len(loaders) > 2
    index = 2 if is_separate else 0  # all validation images, if no others are set aside
    if loaders[0].is_multi_label:
        return evaluate_multi_label(
            *logits[:2], loaders[0].classes, separate=logits[index], is_separate=is_separate
        )
    calibration = calibrate_images(logits[index], loaders[index].images)
    if calibration is not None:
        write_calibration(run, calibration)
    return evaluate_splits(
        *logits[:2], calibration, separate=logits[index], is_separate=is_separate
    )
