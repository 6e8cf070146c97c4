"""Bootstrap confidence intervals of metrics over test images.

Shapes: N samples, O positives, R resamples, Q bins. Logits are (N, K), labels (N,).
Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile
interval); pairing as in Koehn, "Statistical Significance Tests", EMNLP 2004.

A resample draws N of the N samples with replacement and is represented by the count of each sample,
so that the metrics of all resamples are computed by matrix products.
"""

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, check_count
from mixmo_fastai.metrics.calibration import check_logits
from mixmo_fastai.metrics.table import MAIN_METRICS
from mixmo_fastai.rng import make_generator

NUM_RESAMPLES = 1000
LEVEL = 0.95
_RESAMPLES_AT_ONCE = 100  # limits the memory of their counts to tens of megabytes

Interval = tuple[float, float]


def accuracy_half_width(num_images: int) -> float:
    """Return the half-width of the 95 % interval of an accuracy of 50 %, where it is largest.

    By the normal approximation: 1.96 · sqrt(0.25 / n).

    Args:
        num_images: n, the number of images on which the accuracy is measured.

    Example:
        >>> accuracy_half_width(10_000)
        0.0098
    """
    half_width: float = 0.98 / max(1, num_images) ** 0.5
    return half_width


def intervals(
    logits: Tensor,
    labels: Tensor,
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute percentile intervals of accuracy, NLL and ECE, which are `table.MAIN_METRICS`.

    Args:
        logits: (N, K).
        labels: (N,).
        num_resamples: R.
        level: confidence level.
        seed: seed of the resamples.

    Returns:
        lower and upper bound by metric: accuracy, nll, ece.

    Raises:
        InputError: wrong shapes, labels out of range, logits that are not finite, R below 1 or a
            level outside (0, 1).

    Example:
        >>> found = intervals(100 * torch.eye(10), torch.arange(10))  # all correct and certain
        >>> found["accuracy"], found["nll"]
        ((1.0, 1.0), (0.0, 0.0))
    """
    terms = _sample_terms(logits, labels)
    resampled = _resample(terms, num_resamples, seed)
    return {name: percentile_interval(values, level) for name, values in resampled.items()}


def paired_intervals(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute percentile intervals of the differences second - first, on the same samples.

    The same resamples are used for both networks, so images that are difficult for both do not
    widen the interval.

    Args:
        first: logits (N, K) of one network.
        second: logits (N, K) of the other network.
        labels: (N,).
        num_resamples: R.
        level: confidence level.
        seed: seed of the resamples.

    Returns:
        lower and upper bound of the difference by metric: accuracy, nll, ece.

    Raises:
        InputError: as for `intervals`.

    Example:
        >>> logits, labels = torch.eye(10), torch.arange(10)
        >>> paired_intervals(logits, 2 * logits, labels)["accuracy"]  # equal predictions
        (0.0, 0.0)
    """
    resampled_first, resampled_second = (
        _resample(_sample_terms(logits, labels), num_resamples, seed) for logits in (first, second)
    )
    return {
        name: percentile_interval(resampled_second[name] - values, level)
        for name, values in resampled_first.items()
    }


def resampled_means(
    terms: Mapping[str, Tensor], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Compute the mean of each sample's values in each resample: (R,) by name.

    Calls with equal N, R and seed have the same resamples, so that networks can be compared.

    Args:
        terms: (N,) by name, such as 1 for a correct sample in accuracy, or its NLL.
        num_resamples: R.
        seed: seed of the resamples.

    Example:
        >>> found = resampled_means({"accuracy": torch.tensor([True, True, True, False])})
        >>> found["accuracy"].shape, round(float(found["accuracy"].mean()), 1)
        (torch.Size([1000]), 0.7)
    """
    return _resample(terms, num_resamples, seed)


def auroc_intervals(
    in_scores: Mapping[str, Tensor],
    out_scores: Mapping[str, Tensor],
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute percentile intervals of the AUROC of each score, by the Mann-Whitney statistic.

    Each resample draws N of the N samples and O of the O positives, the same for all scores.

    Args:
        in_scores: (N,) by name.
        out_scores: (O,) by name, of the positives, which should be larger; the same names.
        num_resamples: R.
        level: confidence level.
        seed: seed of the resamples.

    Returns:
        lower and upper bound by name.

    Example:
        >>> scores = torch.arange(4.0)
        >>> auroc_intervals({"a": scores, "b": scores}, {"a": scores + 9, "b": scores - 9})
        {'a': (1.0, 1.0), 'b': (0.0, 0.0)}
    """
    check_count("num_resamples", num_resamples)
    joined = {name: torch.cat([scores, out_scores[name]]) for name, scores in in_scores.items()}
    groups = {n: torch.searchsorted(each.sort().values, each) for n, each in joined.items()}
    num_in, num_out = (len(next(iter(scores.values()))) for scores in (in_scores, out_scores))
    generator = make_generator(seed, "bootstrap")
    values: dict[str, list[Tensor]] = {name: [] for name in in_scores}
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        counts_in = draw_counts(num_in, size, generator=generator)
        counts_out = draw_counts(num_out, size, generator=generator)
        for name, group in groups.items():
            grouped = torch.zeros(size, num_in + num_out)
            below = grouped.index_add(1, group[:num_in], counts_in)
            below = below.cumsum(dim=1) - below / 2  # ties count as half
            pairs = (counts_out * below[:, group[num_in:]]).double().sum(dim=1)
            values[name].append(pairs / (num_in * num_out))
    return {name: percentile_interval(torch.cat(each), level) for name, each in values.items()}


def percentile_interval(values: Tensor, level: float = LEVEL) -> Interval:
    """Compute the percentile interval of a metric from its values in resamples, (R,).

    Args:
        values: (R,) float64.
        level: confidence level.

    Raises:
        InputError: a level outside (0, 1).

    Example:
        >>> percentile_interval(torch.arange(101).double(), level=0.5)
        (25.0, 75.0)
    """
    if not 0 < level < 1:
        raise InputError(f"level must be above 0 and below 1; got {level}.")
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high


def draw_counts(num_samples: int, num_resamples: int, *, generator: torch.Generator) -> Tensor:
    """Draw the count of each sample in each resample: (R, N) float32, each row summing to N.

    Example:
        >>> counts = draw_counts(5, 3, generator=torch.Generator().manual_seed(0))
        >>> counts.shape, counts.sum(dim=1).tolist()
        (torch.Size([3, 5]), [5.0, 5.0, 5.0])
    """
    indices = torch.randint(num_samples, (num_resamples, num_samples), generator=generator)
    counts = torch.zeros(num_resamples, num_samples)
    return counts.scatter_add_(1, indices, torch.ones(1, 1).expand_as(indices))


def _sample_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compute each sample's terms in each metric by name: (N,) or, for Q bins, (N, Q)."""
    check_logits(logits, labels)
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu()
    terms = {}
    for metric in MAIN_METRICS:
        with suppress(InputError):  # `evaluate_logits` reports it; the others keep their intervals
            terms[metric.name] = metric.compute_terms(logits, labels)
    return terms


def _resample(terms: Mapping[str, Tensor], num_resamples: int, seed: int) -> dict[str, Tensor]:
    """Compute each metric for each resample: (R,) by name."""
    check_count("num_resamples", num_resamples)
    columns = torch.cat([term.reshape(len(term), -1) for term in terms.values()], dim=1).float()
    generator, sums = make_generator(seed, "bootstrap"), []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        sums.append(draw_counts(len(columns), size, generator=generator) @ columns)
    means = torch.cat(sums).double() / len(columns)  # (R, columns of all terms)
    parts = torch.split(means, [term[0].numel() for term in terms.values()], dim=1)
    return {
        name: part[:, 0] if term.ndim == 1 else part.abs().sum(dim=1)
        for (name, term), part in zip(terms.items(), parts, strict=True)
    }
