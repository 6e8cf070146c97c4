"""Metrics of a run's splits, calibrated on images that are not evaluated.

Shapes: N samples, M members, K classes.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import COVERAGE, MAX_RISK, evaluate_promises, summary
from mixmo_fastai.evaluation.logits import LabelledLogits
from mixmo_fastai.metrics.bootstrap import intervals
from mixmo_fastai.metrics.summary import (
    MEMBER_METRICS,
    MetricInputs,
    compute_defined,
    evaluate_logits,
)
from mixmo_fastai.metrics.table import METRICS
from mixmo_fastai.metrics.temperature import TEMPERATURE_BOUNDS, fit_temperature, temperature_error
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runs.calibration import Calibration

MIN_IMAGES_FOR_TEMPERATURE = 50
"""Smallest number of images on which a temperature is fitted."""
_NO_TEST = "there are no labelled test images in addition to the validation images"


def evaluate_splits(
    validation: LabelledLogits,
    test: LabelledLogits,
    calibration: Calibration | None = None,
    *,
    separate: LabelledLogits = None,
    is_separate: bool = False,
    coverage: float = COVERAGE,
    max_risk: float = MAX_RISK,
    with_intervals: bool = True,
) -> dict[str, Any]:
    """Compute all metrics from the logits on both splits.

    Args:
        validation: of the validation split.
        test: of the test set.
        calibration: fitted on validation images; None for none.
        separate: of the images that were set aside for calibration; None if there are none.
        is_separate: whether only images that were set aside may calibrate; otherwise the validation
            split does.
        coverage: coverage of the prediction sets.
        max_risk: risk of the accepted predictions.
        with_intervals: whether to compute "intervals".

    Returns:
        - "test" and, if there is a validation split, "valid": from `evaluate_logits`. Without
          labelled test images, "test" is missing and all entries below are computed on the
          validation images instead; see `results.final_metrics`;
        - "test_mean_probabilities": the metrics on the test set with the members' probabilities
          averaged instead of their logits;
        - "intervals": 95 % bootstrap intervals of accuracy, nll and ece on the test set;
        - "calibrated": nll, brier and ece on the test set at the temperature fitted on `separate`
          or on the validation split, the relative standard error of this temperature, and the
          number of images it was fitted on;
        - "cross_fitted": the same for two halves of the test set, each at the temperature fitted
          on the other half, as published; the number of images is that of the smaller half;
        - "calibration", "sets" and "abstention", with a calibration: the first from
          `calibration.summary`, the others from `calibration.evaluate_promises`.

        Undefined entries are omitted; "absent", present only then, maps their names to the reasons.
    """
    split = "valid" if test is None else "test"
    logits, labels = test or validation or _refuse_empty()
    mean = logits.double().mean(dim=1)  # (N, K)
    missing = "the run has no validation split; train one with --valid-split"
    if is_separate and validation is not None:
        missing = "no validation image is set aside for calibration; see data.calibration_split"
    metrics: dict[str, Any] = {}
    functions: dict[str, Callable[[], Any]] = {
        "calibrated": lambda: _calibrate(
            separate if is_separate else validation, test, mean, missing
        ),
        "cross_fitted": lambda: cross_fitted(mean, labels),
        split: lambda: evaluate_logits(logits, labels),
        f"{split}_mean_probabilities": lambda: _average_probabilities(logits, labels),
    }
    if with_intervals:
        functions["intervals"] = lambda: {
            name: list(ends) for name, ends in intervals(mean, labels).items()
        }
    if validation is not None and test is not None:
        metrics["valid"] = evaluate_logits(*validation)
    if calibration is None and (validation is None or is_separate):
        names = ("calibration", "sets", "abstention")
        functions |= dict.fromkeys(names, lambda: _refuse(missing))
    elif calibration is not None and test is None:
        functions |= dict.fromkeys(("sets", "abstention"), lambda: _refuse(_NO_TEST))
    if calibration is not None:
        metrics["calibration"] = summary(calibration)
        if test is not None:
            metrics |= evaluate_promises(calibration, test, coverage=coverage, max_risk=max_risk)
    return {**metrics, **compute_defined(functions)}


def _calibrate(
    images: LabelledLogits, test: LabelledLogits, logits: Tensor, missing: str
) -> dict[str, Any]:
    """Compute the metrics of test logits (N, K) at the temperature fitted on other images.

    Args:
        images: member logits and labels of the images to fit the temperature on.
        test: member logits and labels of the test set.
        logits: the ensemble's logits on the test set, (N, K).
        missing: the reason if there are no such images.
    """
    if test is None:
        raise InputError(_NO_TEST)
    labels = test[1]
    if images is None:
        raise InputError(missing)
    fitted_on, num_fitted = images[0].double().mean(dim=1), len(images[1])
    if num_fitted < MIN_IMAGES_FOR_TEMPERATURE:
        raise InputError(
            f"there are {num_fitted} validation images; fitting a temperature needs "
            f"{MIN_IMAGES_FOR_TEMPERATURE}"
        )
    temperature = fit_temperature(fitted_on, images[1])
    _check_temperature(temperature, "validation image", "validation split")
    return {
        "temperature": temperature,
        "temperature_error": temperature_error(fitted_on, temperature),
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
            f"no temperature is optimal, since every {image} is classified correctly, or the "
            f"network is no better than chance; use a larger {split}"
        )


def _calibration_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    inputs, values = MetricInputs(logits, labels), {}
    for metric in METRICS:
        if metric.after_scaling:
            with suppress(InputError):  # the reason is among those of the other metrics
                values[metric.name] = metric.compute(inputs)
    return values


def _average_probabilities(member_logits: Tensor, labels: Tensor) -> dict[str, Any]:
    if member_logits.shape[1] == 1:
        raise InputError("with one member it equals the mean of the logits")
    metrics = evaluate_logits(member_logits, labels, average="probabilities")
    return {name: value for name, value in metrics.items() if name not in MEMBER_METRICS}


def _refuse(reason: str) -> NoReturn:
    raise InputError(reason)


def _refuse_empty() -> NoReturn:
    raise InputError("There are neither test nor validation images to evaluate on.")
