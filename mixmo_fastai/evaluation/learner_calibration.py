"""Calibrate the predictions of a fastai Learner.

Shapes: N images, M members, K classes.
"""

from typing import Any, NamedTuple

from fastai.learner import Learner
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import calibrate
from mixmo_fastai.learner.member_preds import collect_preds
from mixmo_fastai.metrics.members import current_member_logits
from mixmo_fastai.metrics.scaling import ensemble_logits
from mixmo_fastai.models.mixmo_model import MixMoModel, unwrap
from mixmo_fastai.runs.calibration import Calibration


class CalibratedPreds(NamedTuple):
    """Calibrated predictions, image by image, on the CPU.

    Attributes:
        probabilities: (N, K).
        targets: (N,); None for a loader without targets.
    """

    probabilities: Tensor
    targets: Tensor | None


def calibrate_learner(
    learn: Learner, ds_idx: int = 1, dl: Any = None, *, method: str = "temperature"
) -> Calibration:
    """Fit a calibration on the validation images of a Learner, or on another loader.

    Use images that were neither trained on nor used to choose an epoch or a setting. The Learner is
    not changed; `calibrated_preds` returns calibrated probabilities, `Calibration.sets` prediction
    sets and `Calibration.abstain` what accepts predictions at a chosen risk.

    Args:
        learn: a Learner for single-label classification, with a MixMo network or any other one.
        ds_idx: index of the Learner's loader; 1 for validation.
        dl: another loader instead of `ds_idx`.
        method: "temperature", "vector" or "none"; see `calibration.calibrate`.

    Raises:
        InputError: the targets are not one class per image, or an unknown method.
    """
    logits, targets = _member_logits(learn, ds_idx, dl)
    if targets is None or targets.ndim != 1 or targets.is_floating_point() or logits.ndim != 3:
        shape = None if targets is None else tuple(targets.shape)
        raise InputError(
            "calibrate_learner needs one class per image as the target; the loader has targets of "
            f"shape {shape}."
        )
    names = [f"{ds_idx if dl is None else 'dl'}/{index}" for index in range(len(targets))]
    return calibrate(logits, targets, names, method)


def calibrated_preds(
    learn: Learner, calibration: Calibration, ds_idx: int = 1, dl: Any = None
) -> CalibratedPreds:
    """Return the calibrated probabilities of a Learner, as `Learner.get_preds` returns its own.

    Args:
        learn: the Learner.
        calibration: from `calibrate_learner`.
        ds_idx: index of the Learner's loader; 1 for validation.
        dl: another loader, such as `learn.dls.test_dl(files)`, instead of `ds_idx`.
    """
    member_logits, targets = _member_logits(learn, ds_idx, dl)
    scaled = ensemble_logits(member_logits, calibration.scaling)
    return CalibratedPreds(scaled.softmax(dim=1), targets)


def _member_logits(learn: Learner, ds_idx: int, dl: Any) -> tuple[Tensor, Tensor | None]:
    """Return the logits (N, M, K) of a Learner, M = 1 for a plain network, and the targets."""
    logits, targets = collect_preds(learn, _logits_of_batch, ds_idx, dl)
    return logits.as_subclass(Tensor), targets


def _logits_of_batch(learn: Learner) -> Tensor:
    if isinstance(unwrap(learn.model), MixMoModel):
        return current_member_logits(learn)
    pred: Tensor = learn.pred
    return pred[:, None]
