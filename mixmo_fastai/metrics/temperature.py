"""Temperature scaling: one number that calibrates logits.

Shapes: N samples, K classes. Logits are (N, K), labels (N,).
Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

import math

from torch import Tensor

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.calibration import check_logits

TEMPERATURE_BOUNDS = (1e-3, 1e3)
"""Lowest and highest temperature of `fit_temperature`."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature T that minimises nll(logits / T, labels) (Guo et al., section 4.2).

    The problem is convex in s = 1 / T: with margins d_nk = z_nk - z_ny, the NLL is the mean over n
    of log Σ_k exp(s · d_nk). The root of its derivative is bracketed and found by Newton steps in
    float64, to a relative tolerance of 1e-10.

    The result lies within `TEMPERATURE_BOUNDS`: logits that separate the classes perfectly, for
    which the optimum is zero, yield the lower bound; logits that predict worse than chance yield
    the upper bound. The result is 1 if 1 is a minimum to machine precision, as for constant logits.

    Args:
        logits: (N, K), of samples that are not used in the reported metrics.
        labels: (N,).

    Raises:
        InputError: wrong shapes, labels out of range or logits that are not finite.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]]).expand(4, 2)
        >>> labels = torch.tensor([0, 0, 0, 1])  # three of four correct: 2 / T = log 3
        >>> round(fit_temperature(logits, labels), 4)
        1.8205
    """
    check_logits(logits, labels)
    logits = logits.detach().double()
    margins = logits - logits.gather(1, labels.long()[:, None])  # (N, K)
    slope, _ = _nll_derivatives(margins, 1.0)
    if slope == 0:
        return 1.0
    lowest, highest = TEMPERATURE_BOUNDS
    bound = lowest if slope < 0 else highest
    slope_at_bound, _ = _nll_derivatives(margins, 1 / bound)
    if (slope > 0) == (slope_at_bound > 0):
        return bound
    return 1 / _find_root(margins, *sorted((1.0, 1 / bound)))


def temperature_error(logits: Tensor, temperature: float) -> float:
    """Compute the relative standard error of a fitted temperature.

    The Fisher information of log T in N samples is I = Σ_n Var_k[z_nk / T] with k drawn from
    softmax(z_n / T). The standard error of log T, which is the relative standard error of T, is
    1 / √I. It is large if samples are few or their confidences are near one.

    Args:
        logits: (N, K), of the samples on which the temperature was fitted.
        temperature: from `fit_temperature`.

    Returns:
        The error as a fraction of the temperature.

    Raises:
        InputError: wrong shapes, logits that are not finite, or probabilities that do not depend
            on the temperature.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0]]).log().expand(4, 2)
        >>> round(temperature_error(logits, 1.0), 4)  # I = 4 · 3/4 · 1/4 · (log 3)²
        1.0511
    """
    check_logits(logits)
    scaled = logits.detach().double() / temperature  # (N, K)
    probabilities = scaled.softmax(dim=1)
    centred = scaled - (probabilities * scaled).sum(dim=1, keepdim=True)
    information = (probabilities * centred.square()).sum().item()
    if information == 0:
        raise InputError(
            "no temperature is optimal because the probabilities do not depend on the temperature"
        )
    return float(information**-0.5)


def _nll_derivatives(margins: Tensor, inverse_temperature: float) -> tuple[float, float]:
    """Compute the first two derivatives of the NLL with respect to s = 1 / T.

    They are the mean and variance of a sample's margins under softmax(s · d_n), averaged over n.
    """
    # With margins instead of logits, rounding does not hide the sign of a vanishing slope.
    probabilities = (inverse_temperature * margins).softmax(dim=1)
    mean = (probabilities * margins).sum(dim=1)
    variance = (probabilities * (margins - mean[:, None]).square()).sum(dim=1)
    return mean.mean().item(), variance.mean().item()


def _find_root(margins: Tensor, low: float, high: float, tolerance: float = 1e-10) -> float:
    """Find s in (low, high) at which the slope of the NLL changes sign."""
    current, step = 1.0, high - low
    for _ in range(200):
        slope, curvature = _nll_derivatives(margins, current)
        low, high = (low, current) if slope > 0 else (current, high)
        # Without curvature, as where all probabilities are 0 or 1, the interval is halved.
        proposal = current - slope / curvature if curvature > 0 else math.inf
        # Newton's method converges slowly if the slope decays exponentially, so each step must be
        # at most half the previous one, unless it is already within the tolerance.
        size = abs(proposal - current)
        is_short = size < abs(step) / 2 or size <= tolerance * current
        is_accepted = low <= proposal <= high and is_short
        new = proposal if is_accepted else (low * high) ** 0.5
        step, current = new - current, new
        if abs(step) <= tolerance * current:
            break
    return current
