"""Evaluation: every figure of an ensemble from its members' logits.

Shapes: N samples, M members, K classes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from mixmo_fastai.calibration import (
    TEMPERATURE_BOUNDS,
    brier,
    check_logits,
    expected_calibration_error,
    fit_temperature,
    nll,
    thresholded_adaptive_calibration_error,
    top_predictions,
)
from mixmo_fastai.diversity import disagreement, member_accuracies, ratio_error
from mixmo_fastai.errors import InputError
from mixmo_fastai.selective import aurc, failure_auroc

FEWEST_FOR_TEMPERATURE = 50
"""Validation images below which a fitted temperature says nothing."""
LabelledLogits = tuple[Tensor, Tensor] | None
"""Member logits (N, M, K) and labels (N,); None where there are no images."""


def collect_member_logits(model: Any, loader: Iterable[tuple[Tensor, Tensor]]) -> LabelledLogits:
    """Show a network every image of a loader once.

    Args:
        model: a `MixMoModel`; its training mode is as before afterwards.
        loader: batches of images (B, C, H, W) and labels (B,), on the model's device.

    Returns:
        member logits (N, M, K) and labels (N,), on the CPU; None for a loader without batches.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            # Moved to the host at the end, so that a GPU never waits within the pass.
            batches = [(model.member_logits(x.as_subclass(Tensor)), y) for x, y in loader]
    finally:
        model.train(was_training)
    if not batches:
        return None
    logits, labels = (torch.cat(parts).as_subclass(Tensor) for parts in zip(*batches, strict=True))
    return logits.float().cpu(), labels.cpu()


def evaluate_loaders(model: Any, *, valid: Any, test: Any) -> dict[str, Any]:
    """Compute the figures of a network on its validation and test images.

    Args:
        model: a `MixMoModel`.
        valid: loader of the validation split, which may be empty.
        test: loader of the test set.

    Returns:
        "test" and, where there is a validation split, "valid", each as `evaluate_logits` gives it,
        and "calibrated": the test figures at the temperature fitted on the validation split. Where
        that cannot be told, "absent" maps its name to the reason.
    """
    return evaluate_parts(collect_member_logits(model, valid), collect_member_logits(model, test))


def evaluate_parts(validation: LabelledLogits, test: LabelledLogits) -> dict[str, Any]:
    """Compute the figures of `evaluate_loaders` from the logits of both parts."""
    figures: dict[str, Any] = {}
    test_logits, test_labels = test or _refuse_empty()
    if validation is not None:
        figures["valid"] = evaluate_logits(*validation)
        figures |= _calibrated(
            figures["valid"]["temperature"], len(validation[1]), test_logits, test_labels
        )
    return {**figures, "test": evaluate_logits(test_logits, test_labels)}


def _calibrated(
    temperature: float, num_fitted: int, logits: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Compute the figures at a temperature that was fitted on so many other images."""
    if num_fitted < FEWEST_FOR_TEMPERATURE:
        reason = (
            f"the validation split has {num_fitted} images, and a temperature needs "
            f"{FEWEST_FOR_TEMPERATURE}; raise --valid-split"
        )
        return {"absent": {"calibrated": reason}}
    if not TEMPERATURE_BOUNDS[0] < temperature < TEMPERATURE_BOUNDS[1]:
        reason = (
            "every validation image is right, or none better than chance, so that no temperature "
            "is best; a larger validation split would tell"
        )
        return {"absent": {"calibrated": reason}}
    scaled = logits.double().mean(dim=1) / temperature  # (N, K)
    figures = {"nll": nll, "brier": brier, "ece": expected_calibration_error}
    values = {name: figure(scaled, labels).item() for name, figure in figures.items()}
    return {"calibrated": {"temperature": temperature, **values}}


def _refuse_empty() -> NoReturn:
    raise InputError("The test set has no images.")


@torch.no_grad()
def evaluate_logits(member_logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute every figure of an ensemble, which is the mean of its members' logits.

    The temperature is fitted on these very logits, so `nll_calibrated` and `ece_calibrated` show
    what temperature scaling could reach at best, and are no estimates for new data.

    Args:
        member_logits: (N, M, K).
        labels: (N,).

    Returns:
        Floats named accuracy, top5, nll, brier (summed over classes), ece, tace, failure_auroc,
        aurc, ratio_error, disagreement, temperature, nll_calibrated and ece_calibrated, and the
        list member_accuracy. Shares are in [0, 1]. A figure that is undefined for this input is
        left out; "absent", there only then, maps its name to the reason.

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.
    """
    member_logits = torch.as_tensor(member_logits, device="cpu").double()
    labels = torch.as_tensor(labels, device="cpu")
    check_logits(member_logits, labels, axes="(N, M, K)", name="member_logits")
    return _compute(_figures(member_logits, labels))


def _figures(member_logits: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """List the figures, each as what computes it."""
    logits = member_logits.mean(dim=1)  # (N, K)
    confidence, correct = top_predictions(logits, labels)
    temperature = fit_temperature(logits, labels)
    calibrated = logits / temperature
    return {
        "accuracy": lambda: correct.double().mean(),
        "top5": lambda: _top5(logits, labels),
        "nll": lambda: nll(logits, labels),
        "brier": lambda: brier(logits, labels),
        "ece": lambda: expected_calibration_error(logits, labels),
        "tace": lambda: thresholded_adaptive_calibration_error(logits, labels),
        "failure_auroc": lambda: failure_auroc(confidence, correct),
        "aurc": lambda: aurc(confidence, correct),
        "member_accuracy": lambda: member_accuracies(member_logits, labels),
        "ratio_error": lambda: ratio_error(member_logits, labels),
        "disagreement": lambda: disagreement(member_logits),
        "temperature": lambda: torch.tensor(temperature, dtype=torch.float64),
        "nll_calibrated": lambda: nll(calibrated, labels),
        "ece_calibrated": lambda: expected_calibration_error(calibrated, labels),
    }


def _compute(figures: Mapping[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Compute each figure that is defined, and note why the others are not."""
    values: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, figure in figures.items():
        try:
            values[name] = figure().tolist()
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
