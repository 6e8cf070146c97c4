"""How methods, expectations and figures are called wherever a person reads them."""

from collections.abc import Callable
from typing import NamedTuple

from mixmo_fastai.recipe import Recipe
from mixmo_fastai.resolve import departures

PIXEL_NAMES = {"cutmix": "CutMix", "mixup": "Mixup"}
METHOD_NAMES = {"cutmix": "Cut-MixMo", "linear": "Linear-MixMo", "sum": "MIMO"}


def percent(value: float) -> str:
    """Show a share: 0.9751 is "97.51 %"."""
    return f"{100 * value:.2f} %"


def decimal(value: float) -> str:
    """Show a number with four decimals."""
    return f"{value:.4f}"


def nats(value: float) -> str:
    """Show an amount of information."""
    return f"{value:.4f} nats"


def duration(seconds: float) -> str:
    """Show an estimated time in its largest unit: 4,000 is "about 67 min"."""
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


class Figure(NamedTuple):
    """How one figure of `evaluation.evaluate_logits` is shown.

    Attributes:
        name: its key there.
        label: its short name.
        show: how its value is written.
        meaning: what it is, in a phrase.
    """

    name: str
    label: str
    show: Callable[[float], str]
    meaning: str


FIGURES = (
    Figure("accuracy", "Accuracy", percent, "share of images whose likeliest class is right"),
    Figure("top5", "Top-5", percent, "share whose class is among the five likeliest"),
    Figure("nll", "NLL", decimal, "mean of -log probability of the true class, in nats"),
    Figure("brier", "Brier", decimal, "squared error of the probabilities, summed over classes"),
    Figure("ece", "ECE", percent, "gap between confidence and accuracy, 15 bins of equal width"),
    Figure("tace", "TACE", percent, "the same per class, bins of equal mass, above 0.001"),
    Figure("failure_auroc", "Failure AUROC", decimal, "how well confidence tells right from wrong"),
    Figure("aurc", "AURC", decimal, "errors among the surest images, mean over coverages"),
    Figure("risk_at_80", "Risk at 80 %", percent, "errors among the surest 80 %"),
    Figure("risk_at_90", "Risk at 90 %", percent, "errors among the surest 90 %"),
    Figure("risk_at_95", "Risk at 95 %", percent, "errors among the surest 95 %"),
    Figure("ratio_error", "Ratio of errors", decimal, "errors of one member per error of both"),
    Figure("disagreement", "Disagreement", percent, "images on which two members differ"),
    Figure("mutual_information", "Information", nats, "mutual information between the members"),
)
FIGURE = {figure.name: figure for figure in FIGURES}
OF_SEVERAL_MEMBERS = ("ratio_error", "disagreement", "mutual_information")
"""Figures that a network of one member cannot have."""


def method_name(recipe: Recipe) -> str:
    """Say what method a recipe is."""
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
    """Say what was published for this recipe, and where this run departs from it."""
    expected = recipe.expected
    if expected.accuracy is None:
        return "none for this recipe"
    text = f"{100 * expected.accuracy:.2f} % top-1 with {expected.arch} ({expected.source})"
    changed = departures(recipe)
    return f"{text}; not to be expected here, for {', '.join(changed)}" if changed else text
