"""Names and formats of methods, published results and metrics, wherever a person reads them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mixmo_fastai.recipe import Recipe
from mixmo_fastai.resolve import departures

PIXEL_NAMES = {"cutmix": "CutMix", "mixup": "Mixup"}
LARGEST_TEMPERATURE_ERROR = 0.1
"""Relative standard error of a temperature above which a remark accompanies its figures."""
METHOD_NAMES = {"cutmix": "Cut-MixMo", "linear": "Linear-MixMo", "sum": "MIMO"}


PART_NAMES = {"test": "Test", "valid": "Validation"}


def final_figures(figures: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of the part that the final figures are of, and these figures.

    Args:
        figures: from `evaluation.evaluate_parts`.

    Returns:
        "test", or "valid" when there were no labelled test images; and the figures of that part.
    """
    part = "test" if "test" in figures else "valid"
    return part, figures[part]


def percent(value: float) -> str:
    """Format a fraction: 0.9751 is "97.51 %"."""
    return f"{100 * value:.2f} %"


def round_percent(value: float) -> str:
    """Format a fraction without decimals: 0.8 is "80 %"."""
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    """Format a difference of two fractions: 0.0123 is "+1.23 points"."""
    return f"{100 * value:+.2f} points"


def decimal(value: float) -> str:
    """Format a number with four decimals."""
    return f"{value:.4f}"


def signed(value: float) -> str:
    """Format a difference with four decimals and its sign."""
    return f"{value:+.4f}"


def nats(value: float) -> str:
    """Format an amount of information."""
    return f"{value:.4f} nats"


def estimated_duration(seconds: float) -> str:
    """Format an estimated time in its largest unit: 4,000 is "about 67 min"."""
    if seconds < 10:
        return "a few seconds"
    unit, decimals, name = next(row[1:] for row in _DURATIONS if seconds < row[0])
    return f"about {seconds / unit:.{decimals}f} {name}"


_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_DURATIONS = (
    (100, 1, 0, "s"),
    (100 * _MINUTE, _MINUTE, 0, "min"),
    (10 * _HOUR, _HOUR, 1, "h"),
    (48 * _HOUR, _HOUR, 0, "h"),
    (1000 * _DAY, _DAY, 0, "days"),
    (float("inf"), 365 * _DAY, 0, "years"),
)
"""Below how many seconds an estimate is shown in which unit, with how many decimals."""


def shortened(name: str, length: int) -> str:
    """Cut a name to a number of characters, the last of them "…"."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def duration(seconds: float) -> str:
    """Format a time: 192 is "3.2 min"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


class Figure(NamedTuple):
    """Name and format of one metric of `evaluation.evaluate_logits`.

    Attributes:
        name: its key there.
        label: its short name.
        show: formats its value.
        meaning: its definition, in a phrase.
    """

    name: str
    label: str
    show: Callable[[float], str]
    meaning: str


FIGURES = (
    Figure("accuracy", "Accuracy", percent, "images whose most likely class is the true one"),
    Figure("top5", "Top-5", percent, "images whose class is among the five most likely"),
    Figure("nll", "NLL", decimal, "mean of -log probability of the true class, in nats"),
    Figure("brier", "Brier", decimal, "squared error of the probabilities, summed over classes"),
    Figure("ece", "ECE", percent, "gap between confidence and accuracy, 15 bins of equal width"),
    Figure("tace", "TACE", percent, "the same per class, bins of equal mass, above 0.001"),
    Figure("failure_auroc", "Failure AUROC", percent, "confidence as a detector of errors"),
    Figure("aurc", "AURC", percent, "error rate, mean over coverages; most confident first"),
    Figure("risk_at_80", "Risk at 80 %", percent, "error rate among the most confident 80 %"),
    Figure("risk_at_90", "Risk at 90 %", percent, "error rate among the most confident 90 %"),
    Figure("risk_at_95", "Risk at 95 %", percent, "error rate among the most confident 95 %"),
    Figure("ratio_error", "Ratio of errors", decimal, "errors of one member per error of both"),
    Figure("disagreement", "Disagreement", percent, "images on which two members differ"),
    Figure(
        "mutual_information", "Mutual information", nats, "between the members, mean over images"
    ),
)
FIGURE = {figure.name: figure for figure in FIGURES}
OF_SEVERAL_MEMBERS = ("ratio_error", "disagreement", "mutual_information")
"""Metrics that a network of one member does not have."""


def method_name(recipe: Recipe) -> str:
    """Return the name of a recipe's method."""
    if recipe.name == "imported":
        return f"Imported network, members: {recipe.model.num_members}"
    name = METHOD_NAMES.get(recipe.mix.kind, f"MixMo ({recipe.mix.kind})")
    if recipe.model.num_members == 1:
        name = "Vanilla"
    if pixels := PIXEL_NAMES.get(recipe.mix.msda):
        name = f"{name} + {pixels}"
    if recipe.data.augmix:
        name = f"{name} + AugMix"
    nets = recipe.model.num_nets
    return f"{name}, deep ensemble of {nets} networks" if nets > 1 else name


def expectation(recipe: Recipe) -> str:
    """Return the published result of a recipe, and settings that differ; "" if there is none."""
    expected = recipe.expected
    if expected.accuracy is None:
        return ""
    text = f"{100 * expected.accuracy:.2f} % top-1 with {expected.arch} ({expected.source})"
    changed = departures(recipe)
    return f"{text}; not to be expected here, for {', '.join(changed)}" if changed else text


def temperature_remark(figures: Mapping[str, Any]) -> str:
    """Return the warning beside figures at a temperature that is uncertain; "" if it is not.

    Args:
        figures: "calibrated" or "cross_fitted" of `evaluation.evaluate_parts`.
    """
    error = temperature_error(figures)
    if error <= LARGEST_TEMPERATURE_ERROR:
        return ""
    several = len(figures.get("temperature_errors", ())) > 1
    which = "Each temperature" if several else "The temperature"
    return (
        f"{which} comes from too few images: {figures['num_images']:,}, a standard error "
        f"of {round_percent(error)} (at most {round_percent(LARGEST_TEMPERATURE_ERROR)})."
    )


def temperature_error(figures: Mapping[str, Any]) -> float:
    """Return the largest relative standard error of the temperatures; 0 if none is known.

    Args:
        figures: "calibrated" or "cross_fitted" of `evaluation.evaluate_parts`.
    """
    errors: list[float] = figures.get("temperature_errors", [figures.get("temperature_error", 0.0)])
    return max(errors)
