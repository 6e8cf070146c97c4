"""Evaluation: compute all metrics of an ensemble from its members' logits.

Shapes: N samples, M members, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.metrics.bootstrap import intervals
from mixmo_fastai.metrics.calibration import (
    TEMPERATURE_BOUNDS,
    check_logits,
    fit_temperature,
    temperature_error,
    top_predictions,
)
from mixmo_fastai.metrics.diversity import mean_probability_logits
from mixmo_fastai.metrics.table import METRICS
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runtime.devices import float32_precision
from mixmo_fastai.runtime.processes import all_gather, process_group

MIN_IMAGES_FOR_TEMPERATURE = 50
"""Smallest number of images on which a temperature is fitted."""
AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda member_logits: member_logits.mean(dim=1),
    "probabilities": mean_probability_logits,
}
"""How member logits (N, M, K) are averaged into ensemble logits (N, K); the first as published."""
_MEMBER_METRICS = {metric.name for metric in METRICS if "member_logits" in metric.arguments}
LabelledLogits = tuple[Tensor, Tensor] | None
"""Member logits (N, M, K) and labels (N,); None if there are no images."""


def collect_member_logits(model: Any, loader: Any) -> LabelledLogits:
    """Compute the member logits of every image of a loader, in full float32 without TF32.

    In a distributed run each process evaluates part of the images and receives all logits.

    Args:
        model: a `MixMoModel`, or a plain network, which counts as one member; its training mode is
            restored afterwards.
        loader: batches of images (B, C, H, W) and labels (B,), on the model's device; must be a
            `BatchLoader` in a distributed run.

    Returns:
        Member logits (N, M, K) and labels (N,), on the CPU; None for a loader without batches.
    """
    was_training = model.training
    model.eval()
    members = getattr(model, "member_logits", None) or (lambda x: model(x)[:, None])
    try:
        with torch.inference_mode(), float32_precision(tf32=False):
            # Copied to the CPU after the loop, so that the GPU never waits inside it.
            batches_of_rank = loader.shard(process_group()) if process_group().count > 1 else loader
            batches = [(members(x.as_subclass(Tensor)), y) for x, y in batches_of_rank]
    finally:
        model.train(was_training)
    if not batches and process_group().count == 1:
        return None
    parts = (torch.cat(parts).as_subclass(Tensor).cpu() for parts in zip(*batches, strict=True))
    return _interleave([part for part in all_gather(tuple(parts)) if part])


def _interleave(parts: Sequence[tuple[Tensor, Tensor]]) -> LabelledLogits:
    """Restore the order of images: of R processes, rank r has every R-th image from the r-th on."""
    if not parts:
        return None
    count = sum(len(labels) for _, labels in parts)
    logits = parts[0][0].new_empty((count, *parts[0][0].shape[1:]), dtype=torch.float32)
    labels = parts[0][1].new_empty(count)
    for rank, (rank_logits, rank_labels) in enumerate(parts):
        logits[rank :: len(parts)], labels[rank :: len(parts)] = rank_logits, rank_labels
    return logits, labels


def evaluate_splits(validation: LabelledLogits, test: LabelledLogits) -> dict[str, Any]:
    """Compute all metrics from the logits on both splits.

    Returns:
        - "test" and, if there is a validation split, "valid": from `evaluate_logits`. Without
          labelled test images, "test" is missing and all entries below are computed on the
          validation images instead; see `results.final_metrics`;
        - "test_mean_probabilities": the metrics on the test set with the members' probabilities
          averaged instead of their logits;
        - "intervals": 95 % bootstrap intervals of accuracy, nll and ece on the test set;
        - "calibrated": nll, brier and ece on the test set at the temperature fitted on the
          validation split, the relative standard error of this temperature, and the number of
          images it was fitted on;
        - "cross_fitted": the same for two halves of the test set, each at the temperature fitted
          on the other half, as published; the number of images is that of the smaller half.

        Undefined entries are omitted; "absent", present only then, maps their names to the reasons.
    """
    split = "valid" if test is None else "test"
    logits, labels = test or validation or _refuse_empty()
    mean = logits.double().mean(dim=1)  # (N, K)
    metrics: dict[str, Any] = {}
    functions: dict[str, Callable[[], Any]] = {
        "calibrated": lambda: _calibrate(metrics.get("valid"), validation, test, mean),
        "cross_fitted": lambda: cross_fitted(mean, labels),
        split: lambda: evaluate_logits(logits, labels),
        f"{split}_mean_probabilities": lambda: _average_probabilities(logits, labels),
        "intervals": lambda: {n: list(ends) for n, ends in intervals(mean, labels).items()},
    }
    if validation is not None and test is not None:
        metrics["valid"] = evaluate_logits(*validation)
    return {**metrics, **_compute_defined(functions)}


def _calibrate(
    valid: Mapping[str, Any] | None,
    validation: LabelledLogits,
    test: LabelledLogits,
    logits: Tensor,
) -> dict[str, Any]:
    """Compute the metrics of test logits (N, K) at the temperature fitted on the validation split.

    Args:
        valid: metrics on the validation split, from `evaluate_logits`.
        validation: member logits and labels of the validation split.
        test: member logits and labels of the test set.
        logits: the ensemble's logits on the test set, (N, K).
    """
    if test is None:
        raise InputError("there are no labelled test images in addition to the validation images")
    labels = test[1]
    if valid is None or validation is None:
        raise InputError("there is no validation split; raise --valid-split")
    num_fitted, temperature = len(validation[1]), valid["temperature"]
    if num_fitted < MIN_IMAGES_FOR_TEMPERATURE:
        raise InputError(
            f"there are {num_fitted} validation images; fitting a temperature needs "
            f"{MIN_IMAGES_FOR_TEMPERATURE}"
        )
    _check_temperature(temperature, "validation image", "validation split")
    return {
        "temperature": temperature,
        "temperature_error": temperature_error(validation[0].double().mean(dim=1), temperature),
        "num_images": num_fitted,
        **_calibration_metrics(logits / temperature, labels),
    }


def cross_fitted(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute calibrated metrics of two halves, each scaled by the other half's temperature.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        The "temperatures" fitted on the two halves, their "temperature_errors" (relative standard
        errors), "num_images" of the smaller half, and nll, brier and ece over all samples.

    Raises:
        InputError: there are too few samples, or a half has no optimal temperature.
    """
    scaled, temperatures = cross_scale(logits, labels)
    halves = _draw_halves(len(labels))
    return {
        "temperatures": temperatures,
        "temperature_errors": [
            temperature_error(logits[half], temperature)
            for half, temperature in zip(halves, temperatures, strict=True)
        ],
        "num_images": min(map(len, halves)),
        **_calibration_metrics(scaled, labels),
    }


def _draw_halves(num_samples: int) -> tuple[Tensor, ...]:
    """Draw the indices of two random halves, the same for every run on the same test set."""
    order = torch.randperm(num_samples, generator=make_generator(0, "halves"))
    return order.tensor_split(2)


def cross_scale(logits: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Divide each half of the logits by the temperature fitted on the other half.

    This is the published method without a validation split. The halves are random, and the same for
    every run on the same test set.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        The scaled logits (N, K), and the temperatures fitted on the two halves.

    Raises:
        InputError: there are too few samples, or a half has no optimal temperature.
    """
    if len(labels) < 2 * MIN_IMAGES_FOR_TEMPERATURE:
        raise InputError(
            f"only {len(labels)} images were evaluated; fitting two temperatures needs "
            f"{2 * MIN_IMAGES_FOR_TEMPERATURE}"
        )
    halves = _draw_halves(len(labels))
    temperatures = [fit_temperature(logits[half], labels[half]) for half in halves]
    for temperature in temperatures:
        _check_temperature(temperature, "image of one half", "set of images")
    scaled = torch.empty_like(logits)
    for half, temperature in zip(halves, reversed(temperatures), strict=True):
        scaled[half] = logits[half] / temperature
    return scaled, temperatures


def _check_temperature(temperature: float, image: str, split: str) -> None:
    if not TEMPERATURE_BOUNDS[0] < temperature < TEMPERATURE_BOUNDS[1]:
        raise InputError(
            f"every {image} is classified correctly, or none better than chance, so no temperature "
            f"is optimal; use a larger {split}"
        )


def _calibration_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    inputs = MetricInputs(logits, labels)
    return {metric.name: metric.compute(inputs) for metric in METRICS if metric.after_scaling}


def _average_probabilities(member_logits: Tensor, labels: Tensor) -> dict[str, Any]:
    if member_logits.shape[1] == 1:
        raise InputError("with one member it equals the mean of the logits")
    metrics = evaluate_logits(member_logits, labels, average="probabilities")
    return {name: value for name, value in metrics.items() if name not in _MEMBER_METRICS}


def _refuse_empty() -> NoReturn:
    raise InputError("There are neither test nor validation images to evaluate on.")


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
        Floats named accuracy, top5, nll, brier (summed over classes), ece, tace, failure_auroc,
        aurc, risk_at_80, risk_at_90 and risk_at_95 (error rate among the most confident 80, 90,
        95 %), ratio_error, disagreement, mutual_information (nats), temperature, nll_calibrated
        and ece_calibrated, and the list member_accuracy. Fractions are in [0, 1]. Undefined metrics
        are omitted; "absent", present only then, maps their names to the reasons.

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
    return _compute_defined(
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


class MetricInputs:
    """The arguments of metrics, by the names in `metric_table.INPUTS`.

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


def _compute_defined(functions: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Compute the metrics that are defined; "absent" holds the reasons for the others."""
    values: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, function in functions.items():
        try:
            values[name] = function()
        except InputError as error:
            absent[name] = str(error)
    return {**values, "absent": absent} if absent else values
