"""Calibration in exported files: scaled heads, and thresholds for sets and accepted predictions.

The metadata of a file hold, under "calibration" of its header:

- "scaling": method, scale and bias of the calibration, or null; all thresholds are those of scaled
  logits;
- "in_logits": whether the logits of the network are scaled already; if not, scale them first:
  scale · logits + bias;
- "num_images": number of calibration images;
- "sets": by score (with "-per-class" if the coverage holds for each class), by coverage, such as
  "0.9": the thresholds, one for all classes or one per class;
- "abstention": by score, by risk, such as "0.05": the smallest accepted confidence, or null if no
  prediction is accepted;
- "familiar": by score, by fraction of images from the same source: the confidence they reach.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.abstention import GUARANTEE, Abstain
from mixmo_fastai.metrics.conformal import SCORES, ConformalSets, check_score, num_needed
from mixmo_fastai.metrics.scaling import Scaling
from mixmo_fastai.models import MixMoModel
from mixmo_fastai.runs.calibration import Calibration

COVERAGES, RISKS = (0.8, 0.9, 0.95, 0.99), (0.01, 0.02, 0.05, 0.1, 0.2)
"""Coverages and risks whose thresholds exported files hold."""
EXPORTED_CONFIDENCES = ("confidence", "entropy", "max-logit", "energy")
"""Scores of confidence that need no members."""
FAMILIAR = (0.9, 0.95, 0.99)
"""Fractions of familiar images whose thresholds exported files hold."""


@torch.no_grad()
def scale_heads(model: MixMoModel, scaling: Scaling) -> None:
    """Scale the heads of a network in place, so that its logits are calibrated.

    Raises:
        InputError: a head is not a linear layer, or has no bias for vector scaling.
    """
    for head in model.heads:
        if not isinstance(head, nn.Linear) or (scaling.bias and head.bias is None):
            raise InputError(
                f"Calibrated logits need linear heads{' with a bias' * bool(scaling.bias)}; this "
                f"network has {head}.\nExport without calibration: --raw."
            )
        scale = head.weight.new_tensor(scaling.scale)
        head.weight.mul_(scale[:, None] if len(scale) > 1 else scale)
        if head.bias is not None:
            head.bias.mul_(scale)
            if scaling.bias:
                head.bias.add_(head.bias.new_tensor(scaling.bias))


SCORES_VERSION = 2
"""Definition of the scores; before 2, those of "aps" and "raps" contained the class's own."""


def exported_thresholds(calibration: Calibration, *, in_logits: bool) -> dict[str, Any]:
    """Return the entry of a file's header.

    Args:
        calibration: of the run.
        in_logits: whether the heads contain the scaling.
    """
    scaling = calibration.scaling
    sets: dict[str, dict[str, list[float]]] = {}
    for score in SCORES:
        for per_class in (False, True):
            found = _thresholds(calibration, score, per_class=per_class)
            if found:
                sets[f"{score}-per-class" if per_class else score] = found
    abstention = {
        score: {
            str(risk): abstain.threshold if abstain.coverage else None
            for risk in RISKS
            for abstain in [calibration.abstain(risk, score)]
        }
        for score in EXPORTED_CONFIDENCES
    }
    return {
        "scores": SCORES_VERSION,
        "scaling": None if scaling is None else dataclasses.asdict(scaling),
        "in_logits": in_logits,
        "num_images": len(calibration.labels),
        "sets": sets,
        "abstention": abstention,
        "familiar": {score: _familiar(calibration, score) for score in EXPORTED_CONFIDENCES},
    }


def _familiar(calibration: Calibration, score: str) -> dict[str, float]:
    needed = {fraction: num_needed(fraction) for fraction in FAMILIAR}
    return {
        str(fraction): calibration.familiar_from(fraction, score)
        for fraction, count in needed.items()
        if count <= len(calibration.labels)
    }


def _thresholds(calibration: Calibration, score: str, *, per_class: bool) -> dict[str, list[float]]:
    found = {}
    for coverage in COVERAGES:
        try:
            sets = calibration.sets(coverage, score, per_class=per_class)
        except InputError:  # too few images
            continue
        found[str(coverage)] = list(sets.thresholds)
    return found


class ExportedCalibration:
    """The calibration of an exported file, used as that of a run: `runs.calibration.Calibration`.

    Args:
        entry: of the header, see the module.
        num_classes: K.

    Attributes:
        scaling: applied to the logits before they are compared with thresholds; None for none.
        in_logits: whether the logits of the network are scaled already.
        entry: the entry of the header.
        reason: why there is no scaling; "", since files do not state it.

    Raises:
        ValueError: a value is impossible.
        LookupError: a value is missing.
    """

    reason = ""

    def __init__(self, entry: Mapping[str, Any], num_classes: int) -> None:
        values = entry["scaling"]
        self.scaling = None if values is None else Scaling.from_mapping(values)
        self.in_logits = bool(entry["in_logits"])
        if entry.get("scores") != SCORES_VERSION:
            kept = {name: each for name, each in entry["sets"].items() if name.startswith("lac")}
            entry = {**entry, "sets": kept}
        self.entry, self._num_images = entry, int(entry["num_images"])
        self._num_classes = num_classes

    def sets(
        self, coverage: float, score: str | None = None, *, per_class: bool = False
    ) -> ConformalSets:
        """Return the sets of a coverage.

        Args:
            coverage: one of those in the file.
            score: name of the score; None for the default.
            per_class: whether the coverage holds for each class.

        Raises:
            InputError: the file has no thresholds for it; the message lists those it has.
        """
        score = check_score(score, self._num_classes)
        key = f"{score}-per-class" if per_class else score
        values = _chosen(self.entry["sets"], key, coverage, "coverage")
        return ConformalSets(score, coverage, tuple(map(float, values)), self._num_images)

    def abstain(self, max_risk: float, score: str) -> Abstain:
        """Return what accepts predictions at a risk; see `sets`.

        Raises:
            InputError: the file has no threshold for it; the message lists those it has.
        """
        threshold = _chosen(self.entry["abstention"], score, max_risk, "risk")
        if threshold is None:
            return Abstain(math.inf, max_risk, GUARANTEE, 0.0, 0.0, self._num_images)
        # Bound and coverage on the calibration images are not in the file.
        return Abstain(float(threshold), max_risk, GUARANTEE, max_risk, math.nan, self._num_images)

    def familiar_from(self, fraction: float, score: str) -> float:
        """Return the confidence that a fraction of familiar images reach; see `sets`.

        Raises:
            InputError: the file has no threshold for it; the message lists those it has.
        """
        return float(_chosen(self.entry["familiar"], score, fraction, "fraction"))


def _chosen(table: Mapping[str, Any], score: str, value: float, kind: str) -> Any:
    of_score = table.get(score, {})
    if (key := str(value)) in of_score:
        return of_score[key]
    if score not in table:
        raise InputError(
            f"The file has no thresholds for the score {score!r}; it has: {', '.join(table)}.\n"
            "Predict with the run for others."
        )
    known = ", ".join(of_score) or "none, from too few calibration images"
    raise InputError(
        f"The file has no threshold for a {kind} of {value:g} with the score {score!r}; it has: "
        f"{known}.\nPredict with the run for others."
    )
