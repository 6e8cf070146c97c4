"""The table of metrics: how each metric of an ensemble is computed, formatted and compared.

`evaluation.evaluate_logits`, the bootstrap, the command line and the report iterate over `METRICS`,
so a new metric is one function and one row. Functions are imported when they are called, so that
reading the table needs the standard library only.

Shapes: N samples, M members, K classes, Q bins.
"""

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, summarize_error


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


def signed_decimal(value: float) -> str:
    """Format a difference with four decimals and its sign."""
    return f"{value:+.4f}"


def nats(value: float) -> str:
    """Format an amount of information in nats."""
    return f"{value:.4f} nats"


def signed_nats(value: float) -> str:
    """Format a difference of two amounts of information in nats."""
    return f"{value:+.4f} nats"


class NumberFormat(NamedTuple):
    """How the values of a metric, and the differences of two values, are formatted.

    Attributes:
        value: formats a value.
        difference: formats a difference, with its sign; a unit follows after a space.
    """

    value: Callable[[float], str]
    difference: Callable[[float], str]


PERCENT = NumberFormat(percent, points)
DECIMAL = NumberFormat(decimal, signed_decimal)
NATS = NumberFormat(nats, signed_nats)

COVERAGES = (80, 90, 95)
"""Percentages of the most confident predictions among which the error rate is reported."""
ENSEMBLE_INPUTS = ("logits", "labels", "confidence", "correct")
INPUTS = ("member_logits", *ENSEMBLE_INPUTS)
"""What a metric may be computed from: member logits (N, M, K); the ensemble's logits (N, K); labels
(N,); the confidence (N,) and correctness (N,) of the ensemble's predictions."""


@dataclass(frozen=True)
class MetricSpec:
    """A metric: one row of the table.

    Attributes:
        name: key of the metric in the result of `evaluate_logits`.
        label: display name within a line; `title` begins with a capital letter.
        definition: short definition.
        format: format of its values.
        function: module and function that computes it, as "module:function". The function receives
            the arguments in float64 and returns a scalar tensor. It raises an `InputError` if the
            metric is undefined for these arguments.
        arguments: names of the function's positional arguments, from `INPUTS`.
        options: further arguments of the function, by keyword.
        terms: for a metric with bootstrap intervals, the function of its terms, as
            "module:function": of logits (N, K) in float64 and labels (N,), which are already
            checked. It returns terms (N,), the mean of which is the metric, or (N, Q), for which
            the metric is the sum over Q of the absolute values of their means. Such a metric must
            be defined for all logits.
        is_per_member: the function returns one value per member, (M,). Such a metric is a list in
            JSON and is not in printed tables.
        compares_members: the metric is undefined for one member.
        min_classes: smallest number of classes for which the metric is defined. If it is above 2,
            printed lines do not report that the metric is undefined.
        after_scaling: the metric is also computed after temperature scaling, in "calibrated" and
            "cross_fitted" of `evaluation.evaluate_splits`.
        at_optimum: the metric is also computed at the temperature that is optimal for the evaluated
            images themselves, as NAME_calibrated.
        corrupted_name: name of its mean over corrupted images, for which it must be defined
            whatever the logits; "" if it is not computed on them.
        is_detail: the metric is printed by `mixmo eval`, but not at the end of a training.
        unless_equal: name of another metric; tables list this one only where it is not the same.

    Raises:
        InputError: an argument is not one of `INPUTS`, or a metric that is computed from the
            ensemble's logits alone has the argument `member_logits`.
    """

    name: str
    label: str
    definition: str
    format: NumberFormat
    function: str
    arguments: tuple[str, ...] = ("logits", "labels")
    options: Mapping[str, float] = field(default_factory=dict)
    terms: str = ""
    is_per_member: bool = False
    compares_members: bool = False
    min_classes: int = 2
    after_scaling: bool = False
    at_optimum: bool = False
    corrupted_name: str = ""
    is_detail: bool = False
    unless_equal: str = ""

    def __post_init__(self) -> None:
        needs_ensemble_alone = (
            self.terms or self.after_scaling or self.at_optimum or self.corrupted_name
        )
        allowed = ENSEMBLE_INPUTS if needs_ensemble_alone else INPUTS
        for argument in self.arguments:
            if argument not in allowed:
                raise InputError(
                    f"arguments of the metric {self.name!r} must be among {', '.join(allowed)}; "
                    f"got {argument!r}."
                )

    @property
    def title(self) -> str:
        """Display name at the start of a line."""
        return self.label[:1].upper() + self.label[1:]

    def is_redundant(self, values: Mapping[str, Any]) -> bool:
        """Check whether the value among `values` is displayed like that of `unless_equal`."""
        value, other = values.get(self.name), values.get(self.unless_equal)
        if value is None or other is None:
            return False
        return self.format.value(value) == self.format.value(other)

    def compute(self, inputs: Any) -> Any:
        """Compute the metric.

        Args:
            inputs: an object with attributes named as in `INPUTS`.

        Returns:
            A float, or a list of M floats if `is_per_member`.

        Raises:
            InputError: the metric is undefined, or its function fails or returns something else;
                an error in one metric must not cost the others.
        """
        if self.compares_members and (num_members := inputs.member_logits.shape[1]) < 2:
            raise InputError(
                f"{self.name} compares members and needs at least two; got {num_members}."
            )
        arguments = (getattr(inputs, name) for name in self.arguments)
        function = resolve_registered("metric", self.name, self.function)
        with _failure_explained(self.function):
            value = function(*_protected(self.function, arguments), **self.options)
            value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, list if self.is_per_member else int | float):
            expected = "one value per member (M,)" if self.is_per_member else "one number"
            raise InputError(f"{self.function} must return {expected}; got {value!r:.60}")
        for number in value if isinstance(value, list) else [value]:
            if not math.isfinite(number):
                raise InputError(f"{self.function} returned {number}")
        return value

    def compute_terms(self, logits: Any, labels: Any) -> Any:
        """Compute the terms of samples for the bootstrap; see `terms`.

        Raises:
            InputError: the function fails, or does not return one row per sample.
        """
        function = resolve_registered("metric", self.name, self.terms)
        with _failure_explained(self.terms):
            terms = function(*_protected(self.terms, [logits, labels]))
            if len(terms) != len(labels) or terms.ndim > 2:
                raise InputError(
                    f"{self.terms} must return one row per sample, ({len(labels)},) or "
                    f"({len(labels)}, Q); got {tuple(terms.shape)}"
                )
        return terms


def _protected(function: str, arguments: Iterable[Any]) -> Iterable[Any]:
    """Return copies for functions of others, which could change what other metrics use."""
    is_own = function.startswith("mixmo_fastai.")
    return arguments if is_own else [argument.clone() for argument in arguments]


@contextmanager
def _failure_explained(function: str) -> Iterator[None]:
    """Replace an error of a metric's function by an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{function} failed with {summarize_error(error)} ({_position(error)})"
        ) from error


def _position(error: Exception) -> str:
    """Return the file and line at which an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def by_name(metrics: Iterable[MetricSpec]) -> dict[str, MetricSpec]:
    """Return metrics by their names.

    Raises:
        InputError: two have the same name.
    """
    found: dict[str, MetricSpec] = {}
    for metric in metrics:
        if metric.name in found:
            raise InputError(f"METRICS has two metrics named {metric.name!r}; rename one of them.")
        found[metric.name] = metric
    return found


METRICS = (
    MetricSpec(
        "accuracy",
        "accuracy",
        "images whose most likely class is the true class",
        PERCENT,
        "mixmo_fastai.metrics.accuracy:accuracy",
        terms="mixmo_fastai.metrics.accuracy:accuracy_terms",
        corrupted_name="cA",
    ),
    MetricSpec(
        "balanced_accuracy",
        "balanced accuracy",
        "accuracy on the images of each class, mean over classes",
        PERCENT,
        "mixmo_fastai.metrics.accuracy:balanced_accuracy",
        unless_equal="accuracy",
    ),
    MetricSpec(
        "top5",
        "top-5",
        "images whose true class is among the five most likely",
        PERCENT,
        "mixmo_fastai.metrics.accuracy:top5",
        min_classes=6,
        is_detail=True,
    ),
    MetricSpec(
        "nll",
        "NLL",
        "mean of -log probability of the true class, in nats",
        DECIMAL,
        "mixmo_fastai.metrics.calibration:nll",
        terms="mixmo_fastai.metrics.calibration:nll_terms",
        after_scaling=True,
        at_optimum=True,
        corrupted_name="cNLL",
    ),
    MetricSpec(
        "brier",
        "Brier",
        "squared error of the probabilities, summed over classes",
        DECIMAL,
        "mixmo_fastai.metrics.calibration:brier",
        after_scaling=True,
        is_detail=True,
    ),
    MetricSpec(
        "ece",
        "ECE",
        "gap between confidence and accuracy, 15 bins of equal width",
        PERCENT,
        "mixmo_fastai.metrics.calibration:expected_calibration_error",
        terms="mixmo_fastai.metrics.calibration:ece_terms",
        after_scaling=True,
        at_optimum=True,
        corrupted_name="cECE",
    ),
    MetricSpec(
        "tace",
        "TACE",
        "the same per class, bins of equal mass, above 0.001",
        PERCENT,
        "mixmo_fastai.metrics.calibration:thresholded_adaptive_calibration_error",
        is_detail=True,
    ),
    MetricSpec(
        "failure_auroc",
        "failure AUROC",
        "confidence as a detector of errors",
        PERCENT,
        "mixmo_fastai.metrics.selective:failure_auroc",
        ("confidence", "correct"),
        is_detail=True,
    ),
    MetricSpec(
        "aurc",
        "AURC, mean of risks",
        "error rate, mean over coverages; most confident first",
        PERCENT,
        "mixmo_fastai.metrics.selective:aurc",
        ("confidence", "correct"),
        is_detail=True,
    ),
    *(
        MetricSpec(
            f"risk_at_{coverage}",
            f"risk at {coverage} %",
            f"error rate among the most confident {coverage} %",
            PERCENT,
            "mixmo_fastai.metrics.selective:risk_at_coverage",
            ("confidence", "correct"),
            {"coverage": coverage / 100},
            is_detail=True,
        )
        for coverage in COVERAGES
    ),
    MetricSpec(
        "member_accuracy",
        "member accuracy",
        "accuracy of each member",
        PERCENT,
        "mixmo_fastai.metrics.diversity:member_accuracies",
        ("member_logits", "labels"),
        is_per_member=True,
    ),
    MetricSpec(
        "ratio_error",
        "ratio of errors",
        "errors of one member per error of both",
        DECIMAL,
        "mixmo_fastai.metrics.diversity:ratio_error",
        ("member_logits", "labels"),
        compares_members=True,
        is_detail=True,
    ),
    MetricSpec(
        "disagreement",
        "disagreement",
        "images on which two members differ",
        PERCENT,
        "mixmo_fastai.metrics.diversity:disagreement",
        ("member_logits",),
        compares_members=True,
    ),
    MetricSpec(
        "mutual_information",
        "mutual information",
        "between the members, mean over images",
        NATS,
        "mixmo_fastai.metrics.diversity:mutual_information",
        ("member_logits",),
        compares_members=True,
        is_detail=True,
    ),
)
"""All metrics, in the order of `evaluate_logits`."""
METRIC_BY_NAME = by_name(METRICS)
MAIN_METRICS = tuple(metric for metric in METRICS if metric.terms)
"""Metrics with bootstrap intervals: displayed first, and compared between runs."""
LISTED_METRICS = tuple(metric for metric in METRICS if not metric.is_per_member)
"""Metrics with one value, listed in printed tables."""
MULTI_MEMBER_METRICS = tuple(metric.name for metric in METRICS if metric.compares_members)
"""Metrics that compare members: undefined for a network with one member."""
