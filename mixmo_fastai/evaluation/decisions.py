"""What `mixmo predict` says about an image beyond its class: calibrated, a set, accepted or not.

Shapes: n images, M members, K classes.
"""

from dataclasses import dataclass, replace
from shlex import quote

from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import confidence
from mixmo_fastai.export.files import ExportedNetwork
from mixmo_fastai.export.thresholds import ExportedCalibration
from mixmo_fastai.metrics.abstention import Abstain, images_needed
from mixmo_fastai.metrics.conformal import ConformalSets
from mixmo_fastai.metrics.scaling import Scaling, ensemble_logits
from mixmo_fastai.runs.calibration import Calibration, read_calibration
from mixmo_fastai.runs.folder import RunFolder

_NOT_CALIBRATED = "The probabilities are not calibrated: no calibration is stored."
RISK_SCORE, FAMILIAR_SCORE = "confidence", "energy"
"""Default scores of accepted predictions and of familiar images."""


@dataclass(frozen=True)
class Request:
    """What is requested for each image.

    Attributes:
        raw: whether the probabilities are those of the network, without calibration.
        coverage: probability with which the set of an image contains its label; None for no sets.
        set_score: name of the score of the sets, see `conformal.SCORES`; None for the default.
        per_class: whether the coverage holds for each class separately.
        max_risk: largest fraction of errors among the accepted predictions; None to accept all.
        risk_score: name of the score of accepted predictions, see `runs.calibration.CONFIDENCES`.
        familiar: fraction of images like those of training that count as familiar; None to check
            none.
        familiar_score: name of the score of familiar images, as for `risk_score`.
    """

    raw: bool = False
    coverage: float | None = None
    set_score: str | None = None
    per_class: bool = False
    max_risk: float | None = None
    risk_score: str = RISK_SCORE
    familiar: float | None = None
    familiar_score: str = FAMILIAR_SCORE

    @property
    def needs_calibration(self) -> bool:
        """Whether the request cannot be met without calibration images."""
        return any(each is not None for each in (self.coverage, self.max_risk, self.familiar))


@dataclass(frozen=True)
class Decisions:
    """Thresholds that were chosen for a request.

    Attributes:
        scaling: applied to the logits; None for none.
        sets: makes the prediction sets; None for no sets.
        abstain: decides which predictions are accepted; None to accept all.
        risk_score: the score that `abstain` compares.
        familiar_from: confidence from which on an image is familiar; None to check none.
        familiar_score: the score that it is compared with.
        raw: whether the probabilities are shown without `scaling`.
        unscaling: undoes the scaling that the logits of an exported network contain, to show its
            probabilities without calibration; None for none.
        note: a remark, such as why no prediction is accepted; "" for none.
    """

    scaling: Scaling | None = None
    sets: ConformalSets | None = None
    abstain: Abstain | None = None
    risk_score: str = RISK_SCORE
    familiar_from: float | None = None
    familiar_score: str = FAMILIAR_SCORE
    raw: bool = False
    unscaling: Scaling | None = None
    note: str = ""

    def shown_logits(self, member_logits: Tensor) -> Tensor:
        """Return the logits (n, M, K) whose probabilities are shown."""
        if self.unscaling is not None:
            return self.unscaling(member_logits)
        return member_logits if self.raw or self.scaling is None else self.scaling(member_logits)

    def set_members(self, member_logits: Tensor) -> Tensor | None:
        """Return which classes each set contains, (n, K) bool; None without sets."""
        if self.sets is None:
            return None
        return self.sets(ensemble_logits(member_logits, self.scaling).softmax(dim=1))

    def accepted(self, member_logits: Tensor) -> Tensor | None:
        """Return which predictions are accepted, (n,) bool; None if not requested."""
        if self.abstain is None:
            return None
        return self.abstain(confidence(member_logits, self.scaling, self.risk_score))

    def familiar(self, member_logits: Tensor) -> Tensor | None:
        """Return which images are like those of training, (n,) bool; None if not requested."""
        if self.familiar_from is None:
            return None
        return confidence(member_logits, self.scaling, self.familiar_score) >= self.familiar_from


def decide_for(request: Request, run: RunFolder | ExportedNetwork, name: str) -> Decisions:
    """Choose the thresholds for a run or an exported network; see `decide`.

    Raises:
        InputError: as for `decide`, or the file of the network has no threshold for the request.
    """
    if isinstance(run, RunFolder):
        return decide(request, read_calibration(run), name)
    calibration, advice = run.calibration, "Calibrate the run, then export it again."
    if calibration is None:
        return decide(request, None, name, advice)
    chosen = _choose(request, calibration)
    if not calibration.in_logits:
        return chosen
    unscaling = _inverse(calibration.scaling) if request.raw and calibration.scaling else None
    return replace(chosen, scaling=None, raw=False, unscaling=unscaling)


def _inverse(scaling: Scaling) -> Scaling:
    """Return what undoes a scaling."""
    scale = tuple(1 / value for value in scaling.scale)
    if not scaling.bias:
        return Scaling(scaling.method, scale)
    wide = scale if len(scale) > 1 else scale * len(scaling.bias)
    bias = tuple(-b * s for b, s in zip(scaling.bias, wide, strict=True))
    return Scaling(scaling.method, wide, bias)


def decide(
    request: Request, calibration: Calibration | None, name: str, advice: str = ""
) -> Decisions:
    """Choose the thresholds for a request.

    Args:
        request: what is requested.
        calibration: of the run; None if it has none.
        name: name of the run, for messages.
        advice: what to do without a calibration; by default, to calibrate the run.

    Raises:
        InputError: the request needs calibration images that are missing or too few.
    """
    if calibration is None:
        if request.needs_calibration:
            raise InputError(
                f"{name} has no calibration, which --coverage, --max-risk and --ood-threshold "
                f"need.\n{advice or f'If it has validation images: mixmo calibrate {quote(name)}'}"
            )
        return Decisions(raw=request.raw, note="" if request.raw else _NOT_CALIBRATED)
    return _choose(request, calibration)


def _choose(request: Request, calibration: Calibration | ExportedCalibration) -> Decisions:
    """Choose the thresholds that are requested, and note what does not hold."""
    scaling = calibration.scaling
    if request.raw and request.needs_calibration and scaling is not None and scaling.bias:
        raise InputError(
            "Vector scaling changes which class is predicted, so --raw shows other classes than "
            "--coverage, --max-risk and --ood-threshold decide about.\nRemove --raw, or calibrate "
            "with --method temperature."
        )
    sets = abstain = familiar_from = None
    if request.coverage is not None:
        sets = calibration.sets(request.coverage, request.set_score, per_class=request.per_class)
    if request.max_risk is not None:
        abstain = calibration.abstain(request.max_risk, request.risk_score)
    if request.familiar is not None:
        familiar_from = calibration.familiar_from(request.familiar, request.familiar_score)
    notes = []
    if abstain is not None and not abstain.coverage:
        notes.append(_no_threshold(abstain))
    if scaling is None and not request.raw:
        reason = f": {calibration.reason}" if calibration.reason else ""
        notes.append(f"The probabilities are not calibrated{reason}.")
    return Decisions(
        scaling,
        sets,
        abstain,
        request.risk_score,
        familiar_from,
        request.familiar_score,
        request.raw,
        note="\n".join(notes),
    )


def _no_threshold(abstain: Abstain) -> str:
    needed = images_needed(abstain.max_risk, abstain.guarantee)
    text = (
        f"No prediction is accepted: no threshold has a risk of at most {abstain.max_risk:g} with "
        f"a guarantee of {abstain.guarantee:g} on the {abstain.num_images:,} calibration images."
    )
    if abstain.num_images < needed:
        return (
            f"{text}\nEven without errors it takes {needed:,} images: raise --valid-split in "
            "training, or add images to valid/."
        )
    return (
        f"{text}\nThe network is wrong too often with high confidence: raise --max-risk, or "
        "calibrate on more images, which allows for more errors."
    )
