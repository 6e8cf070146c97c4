"""All metrics of an ensemble, from its members' logits.

Shapes: N samples, M members, K classes.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.metrics.calibration import check_logits, top_predictions
from mixmo_fastai.metrics.diversity import mean_probability_logits
from mixmo_fastai.metrics.table import METRICS
from mixmo_fastai.metrics.temperature import fit_temperature

AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda member_logits: member_logits.mean(dim=1),
    "probabilities": mean_probability_logits,
}
"""How member logits (N, M, K) are averaged into ensemble logits (N, K); the first as published."""


MEMBER_METRICS = {metric.name for metric in METRICS if "member_logits" in metric.arguments}


@torch.no_grad()
def evaluate_logits(
    member_logits: Tensor, labels: Tensor, *, average: str = "logits"
) -> dict[str, Any]:
    """Compute all metrics of an ensemble, whose logits are the mean of its members' logits.

    The temperature is fitted on these same logits, so `nll_calibrated` and `ece_calibrated` show
    the best that temperature scaling could reach; they are not estimates for new data.

    Args:
        member_logits: (N, M, K).
        labels: (N,).
        average: which outputs of the members are averaged: "logits", as published, or
            "probabilities".

    Returns:
        Floats named accuracy, balanced_accuracy, top5, nll, brier (summed over classes), ece, tace,
        failure_auroc, aurc, risk_at_80, risk_at_90 and risk_at_95 (error rate among the most
        confident 80, 90, 95 %), ratio_error, disagreement, mutual_information (nats), temperature,
        nll_calibrated and ece_calibrated, and the list member_accuracy. Fractions are in [0, 1].
        Undefined metrics are omitted; "absent", present only then, maps their names to the reasons.

    Raises:
        InputError: shapes are wrong, labels are out of range, logits are not finite, or `average`
            is unknown.
    """
    if average not in AVERAGES:
        raise unknown_name_error("average of members", average, AVERAGES)
    member_logits = torch.as_tensor(member_logits, device="cpu").double()
    labels = torch.as_tensor(labels, device="cpu")
    check_logits(member_logits, labels, axes="(N, M, K)", name="member_logits")
    ensemble_logits = AVERAGES[average](member_logits)
    inputs = MetricInputs(ensemble_logits, labels, member_logits)
    temperature = fit_temperature(ensemble_logits, labels)
    scaled = MetricInputs(ensemble_logits / temperature, labels)
    return compute_defined(
        {
            **{metric.name: partial(metric.compute, inputs) for metric in METRICS},
            "temperature": lambda: temperature,
            **{
                f"{metric.name}_calibrated": partial(metric.compute, scaled)
                for metric in METRICS
                if metric.at_optimum
            },
        }
    )


def compute_defined(functions: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Compute the metrics that are defined; "absent" holds the reasons for the others."""
    values: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, function in functions.items():
        try:
            values[name] = function()
        except InputError as error:
            absent[name] = str(error)
    return {**values, "absent": absent} if absent else values


class MetricInputs:
    """The arguments of metrics, by the names in `table.INPUTS`.

    Args:
        logits: of the ensemble, (N, K).
        labels: (N,).
        member_logits: (N, M, K); None for metrics of the ensemble alone.
    """

    def __init__(self, logits: Tensor, labels: Tensor, member_logits: Tensor | None = None) -> None:
        self.logits, self.labels, self.member_logits = logits, labels, member_logits

    @cached_property
    def _top_predictions(self) -> tuple[Tensor, Tensor]:
        return top_predictions(self.logits, self.labels)

    @property
    def confidence(self) -> Tensor:
        """Largest probability of each sample, (N,)."""
        return self._top_predictions[0]

    @property
    def correct(self) -> Tensor:
        """Whether each prediction is correct, (N,)."""
        return self._top_predictions[1]
