"""The calibration of a run: what was fitted on its calibration images, and their scores.

`calibration.json` holds the scaling of the logits and its effect, `calibration.safetensors` what
later choices need of each calibration image: a coverage of prediction sets, a risk of accepted
predictions. Neither the images nor the network are needed for them.

Shapes: n calibration images, K classes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.metrics.abstention import GUARANTEE, Abstain
from mixmo_fastai.metrics.conformal import (
    SCORES,
    ConformalSets,
    check_score,
    conformal_quantile,
    num_needed,
    sets_from_scores,
)
from mixmo_fastai.metrics.scaling import Scaling
from mixmo_fastai.runs.folder import RunFolder

CALIBRATION, CALIBRATION_IMAGES = "calibration.json", "calibration.safetensors"
FORMAT = 2  # 1 had other scores of prediction sets
CONFIDENCES = ("confidence", "entropy", "mutual-information", "max-logit", "energy")
"""Scores by which predictions are accepted: larger is more confident, so some are negated."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """What was fitted and computed on calibration images.

    Attributes:
        scaling: applied to the logits; None if it does not help.
        reason: why `scaling` is None; "" otherwise.
        effect: NLL and ECE of the calibration images "before" and "after" scaling, with their
            "intervals"; after, each fifth is scaled by what was fitted on the others.
        num_classes: K.
        names: names of the calibration images.
        labels: (n,) int64.
        correct: (n,) bool.
        label_scores: score of the label by name of `conformal.SCORES`, each (n,).
        confidences: by name of `CONFIDENCES`, each (n,), larger for more confident predictions;
            those that are undefined, such as mutual information with one member, are missing.
    """

    scaling: Scaling | None
    reason: str
    effect: Mapping[str, Any]
    num_classes: int
    names: tuple[str, ...]
    labels: Tensor
    correct: Tensor
    label_scores: Mapping[str, Tensor]
    confidences: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        method = "no scaling" if self.scaling is None else f"{self.scaling.method} scaling"
        if self.temperature is not None:
            method = f"temperature {self.temperature:.4f}"
        return f"<Calibration: {method}, {len(self.labels):,} images, {self.num_classes} classes>"

    @property
    def temperature(self) -> float | None:
        """The temperature by which logits are divided; None for vector scaling or no scaling."""
        return None if self.scaling is None else self.scaling.temperature

    def sets(
        self, coverage: float, score: str | None = None, *, per_class: bool = False
    ) -> ConformalSets:
        """Choose the thresholds of prediction sets; see `ConformalSets.fit`.

        Raises:
            InputError: invalid arguments, or too few calibration images.
        """
        score = check_score(score, self.num_classes)
        return sets_from_scores(
            self.label_scores[score],
            self.labels,
            num_classes=self.num_classes,
            coverage=coverage,
            score=score,
            per_class=per_class,
        )

    def abstain(
        self, max_risk: float, score: str = "confidence", *, guarantee: float = GUARANTEE
    ) -> Abstain:
        """Choose the threshold of accepted predictions; see `Abstain.fit`.

        Raises:
            InputError: invalid arguments, or a score that is undefined for this network.
        """
        confidence = self._confidence(score)
        return Abstain.fit(confidence, self.correct, max_risk=max_risk, guarantee=guarantee)

    def familiar_from(self, fraction: float, score: str = "energy") -> float:
        """Return the confidence that at least a fraction of images like these reach.

        It is a conformal threshold: an image from the same source reaches it with at least that
        probability.

        Args:
            fraction: above 0 and below 1.
            score: a name in `CONFIDENCES`.

        Raises:
            InputError: invalid arguments, or too few calibration images.
        """
        confidence = self._confidence(score)
        if (needed := num_needed(fraction)) > len(confidence):
            raise InputError(
                f"Familiar images at {fraction:g} need {needed} calibration images; there are "
                f"{len(confidence)}."
            )
        return -conformal_quantile(-confidence, fraction)

    def _confidence(self, score: str) -> Tensor:
        if score not in CONFIDENCES:
            raise unknown_name_error("score of confidence", score, CONFIDENCES)
        if score not in self.confidences:
            raise InputError(f"The score {score!r} needs several members.")
        return self.confidences[score]


def write_calibration(run: RunFolder, calibration: Calibration) -> None:
    """Write the calibration of a run."""
    scaling = calibration.scaling
    tensors = {
        "labels": calibration.labels,
        "correct": calibration.correct,
        **{f"score.{name}": each for name, each in calibration.label_scores.items()},
        **{f"confidence.{name}": each for name, each in calibration.confidences.items()},
    }
    content = save({name: each.contiguous() for name, each in tensors.items()})
    values = {
        "format": FORMAT,
        "sha256": hashlib.sha256(content).hexdigest(),
        "scaling": None if scaling is None else dataclasses.asdict(scaling),
        "temperature": None if scaling is None else scaling.temperature,
        "reason": calibration.reason,
        "effect": calibration.effect,
        "num_classes": calibration.num_classes,
        "num_images": len(calibration.names),
        "images": list(calibration.names),
    }
    run.write_file(CALIBRATION_IMAGES, content)
    run.write_file(CALIBRATION, json.dumps(values, indent=1) + "\n")


class _OtherFormatError(Exception):
    """The file has a format that this version does not know."""


def read_calibration(run: RunFolder) -> Calibration | None:
    """Read the calibration of a run; None if it has none.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = run.path / CALIBRATION
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        content = (run.path / CALIBRATION_IMAGES).read_bytes()
        if values["format"] != FORMAT:
            raise _OtherFormatError
        if values["sha256"] != hashlib.sha256(content).hexdigest():
            raise ValueError("the two files do not belong together")
        return _from_parts(values, load(content))
    except _OtherFormatError:
        raise InputError(
            f"{path} was written by another version.\n"
            f"Write it again: mixmo calibrate {run.argument}"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"{path} or {CALIBRATION_IMAGES} beside it is damaged: {type(error).__name__}: "
            f"{str(error)[:80]}.\nWrite them again: mixmo calibrate {run.argument}"
        ) from error


def _from_parts(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    scaling = values["scaling"]
    count = len(tensors["labels"])
    names = tuple(map(str, values["images"]))
    if any(tensor.shape != (count,) for tensor in tensors.values()) or len(names) != count:
        raise ValueError("the numbers of images differ")
    if not all(bool(each.isfinite().all()) for each in tensors.values()):
        raise ValueError("a score is not finite")
    return Calibration(
        scaling=None if scaling is None else Scaling.from_mapping(scaling),
        reason=str(values["reason"]),
        effect=values["effect"],
        num_classes=int(values["num_classes"]),
        names=names,
        labels=tensors["labels"].long(),
        correct=tensors["correct"].bool(),
        label_scores={name: tensors[f"score.{name}"].double() for name in SCORES},
        confidences={
            name: tensors[f"confidence.{name}"].double()
            for name in CONFIDENCES
            if f"confidence.{name}" in tensors
        },
    )
