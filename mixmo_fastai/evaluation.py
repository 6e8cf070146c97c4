"""Evaluation: every figure of an ensemble from its members' logits.

Shapes: N samples, M members, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from mixmo_fastai.bootstrap import intervals
from mixmo_fastai.calibration import (
    TEMPERATURE_BOUNDS,
    brier,
    check_logits,
    expected_calibration_error,
    fit_temperature,
    nll,
    temperature_error,
    thresholded_adaptive_calibration_error,
    top_predictions,
)
from mixmo_fastai.devices import float32_precision
from mixmo_fastai.diversity import (
    disagreement,
    mean_probability_logits,
    member_accuracies,
    mutual_information,
    ratio_error,
)
from mixmo_fastai.errors import InputError, unknown
from mixmo_fastai.processes import all_gather, process_group
from mixmo_fastai.randomness import make_generator
from mixmo_fastai.selective import aurc, failure_auroc, risk_at_coverage

FEWEST_FOR_TEMPERATURE = 50
"""Number of images below which no temperature is fitted."""
COVERAGES = (80, 90, 95)
"""Shares of the surest predictions, in percent, whose errors are reported."""
AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda member_logits: member_logits.mean(dim=1),
    "probabilities": mean_probability_logits,
}
"""How members (N, M, K) become an ensemble (N, K); the first as published."""
_OF_MEMBERS = ("member_accuracy", "ratio_error", "disagreement", "mutual_information")
LabelledLogits = tuple[Tensor, Tensor] | None
"""Member logits (N, M, K) and labels (N,); None where there are no images."""


def collect_member_logits(model: Any, loader: Any) -> LabelledLogits:
    """Show a network every image of a loader once; float32 is not rounded on any device.

    Processes that have joined share the images, and each gets the logits of all.

    Args:
        model: a `MixMoModel`, or a plain network, which has one member; its training mode is as
            before afterwards.
        loader: batches of images (B, C, H, W) and labels (B,), on the model's device; a
            `BatchLoader` where several processes share it.

    Returns:
        member logits (N, M, K) and labels (N,), on the CPU; None for a loader without batches.
    """
    was_training = model.training
    model.eval()
    members = getattr(model, "member_logits", None) or (lambda x: model(x)[:, None])
    try:
        with torch.inference_mode(), float32_precision(tf32=False):
            # Moved to the host at the end, so that a GPU never waits within the pass.
            shown = loader.shard(process_group()) if process_group().count > 1 else loader
            batches = [(members(x.as_subclass(Tensor)), y) for x, y in shown]
    finally:
        model.train(was_training)
    if not batches and process_group().count == 1:
        return None
    parts = (torch.cat(parts).as_subclass(Tensor).cpu() for parts in zip(*batches, strict=True))
    return _together([part for part in all_gather(tuple(parts)) if part])


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> LabelledLogits:
    """Put the shares of processes, every so many-th image each, back in order."""
    if not parts:
        return None
    count = sum(len(labels) for _, labels in parts)
    logits = parts[0][0].new_empty((count, *parts[0][0].shape[1:]), dtype=torch.float32)
    labels = parts[0][1].new_empty(count)
    for rank, (some_logits, some_labels) in enumerate(parts):
        logits[rank :: len(parts)], labels[rank :: len(parts)] = some_logits, some_labels
    return logits, labels


def evaluate_parts(validation: LabelledLogits, test: LabelledLogits) -> dict[str, Any]:
    """Compute every figure from the logits of both parts.

    Returns:
        - "test" and, where there is a validation split, "valid": as `evaluate_logits` gives them.
          Without labelled test images there is no "test", and everything below is said of the
          validation images instead; see `wording.final_figures`;
        - "test_mean_probabilities": the test set again, the members' probabilities averaged in
          place of their logits;
        - "intervals": of the test set's accuracy, nll and ece, 95 % by bootstrap;
        - "calibrated": nll, brier and ece of the test set at the temperature that was fitted on
          the validation split, with its relative standard error and the number of images that it
          was fitted on;
        - "cross_fitted": the same at the temperatures of two halves of the test set, each fitted
          on the other half, as published; the number of images is that of the smaller half.

        What cannot be told is left out, and "absent", there only then, maps it to the reason.
    """
    part = "valid" if test is None else "test"
    logits, labels = test or validation or _refuse_empty()
    mean = logits.double().mean(dim=1)  # (N, K)
    figures: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "calibrated": lambda: _calibrated(figures.get("valid"), validation, test, mean),
        "cross_fitted": lambda: cross_fitted(mean, labels),
        part: lambda: evaluate_logits(logits, labels),
        f"{part}_mean_probabilities": lambda: _by_probabilities(logits, labels),
        "intervals": lambda: {n: list(ends) for n, ends in intervals(mean, labels).items()},
    }
    if validation is not None and test is not None:
        figures["valid"] = evaluate_logits(*validation)
    return {**figures, **_compute(parts)}


def _calibrated(
    valid: Mapping[str, Any] | None,
    validation: LabelledLogits,
    test: LabelledLogits,
    logits: Tensor,
) -> dict[str, Any]:
    """Compute the metrics of the test set (N, K) at the temperature of the validation split."""
    if test is None:
        raise InputError("there are no labelled test images beside the validation images")
    labels = test[1]
    if valid is None or validation is None:
        raise InputError("there is no validation split; raise --valid-split")
    num_fitted, temperature = len(validation[1]), valid["temperature"]
    if num_fitted < FEWEST_FOR_TEMPERATURE:
        raise InputError(
            f"there are {num_fitted} validation images, and a temperature needs "
            f"{FEWEST_FOR_TEMPERATURE}"
        )
    _check_temperature(temperature, "validation image", "validation split")
    return {
        "temperature": temperature,
        "temperature_error": temperature_error(validation[0].double().mean(dim=1), temperature),
        "num_images": num_fitted,
        **_calibration_figures(logits / temperature, labels),
    }


def cross_fitted(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute the figures of two halves, each at the temperature of the other.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        "temperatures" of both halves, "temperature_errors" of both, "num_images" that each was
        fitted on at least, and nll, brier and ece over all samples.

    Raises:
        InputError: there are too few samples, or no temperature is best for a half.
    """
    scaled, temperatures = cross_scaled(logits, labels)
    halves = _halves(len(labels))
    return {
        "temperatures": temperatures,
        "temperature_errors": [
            temperature_error(logits[half], temperature)
            for half, temperature in zip(halves, temperatures, strict=True)
        ],
        "num_images": min(map(len, halves)),
        **_calibration_figures(scaled, labels),
    }


def _halves(num_samples: int) -> tuple[Tensor, ...]:
    """Draw the indices of two halves, the same ones for every run on one test set."""
    order = torch.randperm(num_samples, generator=make_generator(0, "halves"))
    return order.tensor_split(2)


def cross_scaled(logits: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Divide each half of the logits by the temperature of the other half.

    As published, where there is no validation split. The halves are random, and the same for every
    run on one test set.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        the logits divided (N, K), and the temperatures of both halves.

    Raises:
        InputError: there are too few samples, or no temperature is best for a half.
    """
    if len(labels) < 2 * FEWEST_FOR_TEMPERATURE:
        raise InputError(
            f"only {len(labels)} images were evaluated, and two temperatures need "
            f"{2 * FEWEST_FOR_TEMPERATURE}"
        )
    halves = _halves(len(labels))
    temperatures = [fit_temperature(logits[half], labels[half]) for half in halves]
    for temperature in temperatures:
        _check_temperature(temperature, "image of one half", "set of images")
    scaled = torch.empty_like(logits)
    for half, temperature in zip(halves, reversed(temperatures), strict=True):
        scaled[half] = logits[half] / temperature
    return scaled, temperatures


def _check_temperature(temperature: float, which: str, part: str) -> None:
    if not TEMPERATURE_BOUNDS[0] < temperature < TEMPERATURE_BOUNDS[1]:
        raise InputError(
            f"every {which} is right, or none better than chance, so that no temperature is best; "
            f"a larger {part} would tell"
        )


def _calibration_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    figures = {"nll": nll, "brier": brier, "ece": expected_calibration_error}
    return {name: figure(logits, labels).item() for name, figure in figures.items()}


def _by_probabilities(member_logits: Tensor, labels: Tensor) -> dict[str, Any]:
    if member_logits.shape[1] == 1:
        raise InputError("with one member it is the same as the mean of the logits")
    figures = evaluate_logits(member_logits, labels, average="probabilities")
    return {name: value for name, value in figures.items() if name not in _OF_MEMBERS}


def _refuse_empty() -> NoReturn:
    raise InputError("There are neither test nor validation images to evaluate on.")


@torch.no_grad()
def evaluate_logits(
    member_logits: Tensor, labels: Tensor, *, average: str = "logits"
) -> dict[str, Any]:
    """Compute every figure of an ensemble, which is the mean of its members' logits.

    The temperature is fitted on these very logits, so `nll_calibrated` and `ece_calibrated` show
    what temperature scaling could reach at best, and are no estimates for new data.

    Args:
        member_logits: (N, M, K).
        labels: (N,).
        average: of the members: "logits", as published, or "probabilities".

    Returns:
        Floats named accuracy, top5, nll, brier (summed over classes), ece, tace, failure_auroc,
        aurc, risk_at_80, risk_at_90 and risk_at_95 (errors among the surest 80, 90, 95 %),
        ratio_error, disagreement, mutual_information (nats), temperature, nll_calibrated and
        ece_calibrated, and the list member_accuracy. Shares are in [0, 1]. A figure that is
        undefined for this input is left out; "absent", there only then, maps its name to the
        reason.

    Raises:
        InputError: wrong shapes, labels out of range, logits that are not finite, or an unknown
            average.
    """
    if average not in AVERAGES:
        raise unknown("average of members", average, AVERAGES)
    member_logits = torch.as_tensor(member_logits, device="cpu").double()
    labels = torch.as_tensor(labels, device="cpu")
    check_logits(member_logits, labels, axes="(N, M, K)", name="member_logits")
    return _compute(_figures(member_logits, labels, AVERAGES[average](member_logits)))


def _figures(member_logits: Tensor, labels: Tensor, logits: Tensor) -> dict[str, Callable[[], Any]]:
    """List the figures of an ensemble (N, K) of members (N, M, K), each as what computes it."""
    confidence, correct = top_predictions(logits, labels)
    temperature = fit_temperature(logits, labels)
    calibrated = logits / temperature
    return {
        "accuracy": lambda: correct.double().mean().item(),
        "top5": lambda: _top5(logits, labels).item(),
        "nll": lambda: nll(logits, labels).item(),
        "brier": lambda: brier(logits, labels).item(),
        "ece": lambda: expected_calibration_error(logits, labels).item(),
        "tace": lambda: thresholded_adaptive_calibration_error(logits, labels).item(),
        "failure_auroc": lambda: failure_auroc(confidence, correct).item(),
        "aurc": lambda: aurc(confidence, correct).item(),
        **{
            f"risk_at_{share}": partial(_risk_at, confidence, correct, share / 100)
            for share in COVERAGES
        },
        "member_accuracy": lambda: member_accuracies(member_logits, labels).tolist(),
        "ratio_error": lambda: ratio_error(member_logits, labels).item(),
        "disagreement": lambda: disagreement(member_logits).item(),
        "mutual_information": lambda: mutual_information(member_logits).item(),
        "temperature": lambda: temperature,
        "nll_calibrated": lambda: nll(calibrated, labels).item(),
        "ece_calibrated": lambda: expected_calibration_error(calibrated, labels).item(),
    }


def _risk_at(confidence: Tensor, correct: Tensor, coverage: float) -> float:
    return risk_at_coverage(confidence, correct, coverage).item()


def _compute(figures: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Compute each figure that is defined, and note why the others are not."""
    values: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, figure in figures.items():
        try:
            values[name] = figure()
        except InputError as error:
            absent[name] = str(error)
    return {**values, "absent": absent} if absent else values


def _top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of labels among the five likeliest classes; the first of a tie leads."""
    num_classes = logits.shape[1]
    if num_classes <= 5:
        raise InputError(f"top5 is always 1 with five classes or fewer; got {num_classes}.")
    own = logits.gather(1, labels.long()[:, None])  # (N, 1)
    earlier = torch.arange(num_classes) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)  # (N, K)
    return (ahead.sum(dim=1) < 5).double().mean()
