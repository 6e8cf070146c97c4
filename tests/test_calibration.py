from dataclasses import FrozenInstanceError

import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from golden import arrays, facts, needs_golden
from sklearn.metrics import log_loss

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics import temperature
from mixmo_fastai.metrics.calibration import (
    brier,
    expected_calibration_error,
    nll,
    reliability_bins,
    thresholded_adaptive_calibration_error,
    top_predictions,
)
from mixmo_fastai.metrics.temperature import (
    TEMPERATURE_BOUNDS,
    _nll_derivatives,
    fit_temperature,
    temperature_error,
)

SWEEP = [(1, 2), (3, 2), (14, 3), (40, 5), (200, 10), (331, 7)]
METRICS = [
    nll,
    brier,
    expected_calibration_error,
    thresholded_adaptive_calibration_error,
    fit_temperature,
]


def draw_logits(num_samples, num_classes, *, signal=1.5, scale=2.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=random)
    logits = torch.randn(num_samples, num_classes, generator=random)
    logits[torch.arange(num_samples), labels] += signal
    return scale * logits, labels


def two_classes(optimum):
    """Return logits of two classes with the given optimum, at which sigmoid(m / T) is 0.999."""
    logits = torch.tensor([[optimum * np.log(999), 0.0]], dtype=torch.float64)
    return logits.repeat(1000, 1), (torch.arange(1000) == 0).long()


def count_passes(monkeypatch, logits, labels):
    """Return how often `fit_temperature` computes probabilities of all samples."""
    calls = []

    def derivatives(*arguments):
        calls.append(arguments)
        return _nll_derivatives(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(temperature, "_nll_derivatives", derivatives)
        fit_temperature(logits, labels)
    return len(calls)


@pytest.mark.parametrize("size", SWEEP)
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_match_the_oracle(size, seed):
    logits, labels = draw_logits(*size, seed=seed)
    z, y = logits.numpy(), labels.numpy()
    assert nll(logits, labels).item() == pytest.approx(oracle.nll(z, y), rel=1e-10)
    assert brier(logits, labels).item() == pytest.approx(oracle.brier(z, y), rel=1e-10)
    ece = expected_calibration_error(logits, labels).item()
    assert ece == pytest.approx(oracle.ece(*oracle.top(z, y)), abs=1e-12)
    tace = thresholded_adaptive_calibration_error(logits, labels).item()
    assert tace == pytest.approx(oracle.tace(z, y), abs=1e-12)


def test_nll_matches_scikit_learn():
    logits, labels = draw_logits(300, 6)
    probabilities = logits.double().softmax(1).numpy()
    expected = log_loss(labels.numpy(), probabilities, labels=range(6))
    assert nll(logits, labels).item() == pytest.approx(expected, rel=1e-10)


@needs_golden
@pytest.mark.parametrize("name", ["metrics_k10_m2", "metrics_k20_m3"])
def test_metrics_match_the_published_implementation(name):
    stored, expected = arrays(name), facts(name)
    logits, labels = stored["member_logits"].mean(dim=1), stored["labels"]
    temperature = fit_temperature(logits, labels)
    measured = {
        "nll": nll(logits, labels),
        "brier": brier(logits, labels) / logits.shape[1],  # published as the mean over classes
        "ece": expected_calibration_error(logits, labels),
        "tace": thresholded_adaptive_calibration_error(logits, labels),
        "optimal_temperature": temperature,
        "nll_at_optimal_temperature": nll(logits / temperature, labels),
    }
    for metric, value in measured.items():
        assert float(value) == pytest.approx(expected[metric], abs=1e-6), metric


def test_bins_match_the_oracle():
    logits, labels = draw_logits(500, 4)
    confidence, correct = oracle.top(logits.numpy(), labels.numpy())
    actual = reliability_bins(logits, labels, num_bins=7)
    counts, means, accuracies = zip(*oracle.bins(confidence, correct, 7), strict=True)
    assert actual.counts.tolist() == list(counts)
    assert actual.counts.dtype == torch.int64
    np.testing.assert_allclose(actual.confidence, means, atol=1e-12)
    np.testing.assert_allclose(actual.accuracy, accuracies, atol=1e-12)
    assert actual.expected_calibration_error.item() == pytest.approx(
        oracle.ece(confidence, correct, 7)
    )


@pytest.mark.parametrize(
    ("logits", "expected_bin"),
    [
        ([0.0, 0.0, 0.0], 4),  # 1/3 = 5/15: an edge belongs to the bin on its left
        ([0.0, 0.0, 0.0, 0.0, 0.0], 2),  # 1/5 = 3/15
        ([800.0, 0.0, 0.0], 14),  # confidence exactly 1
        ([0.0] * 30, 0),
    ],
)
def test_bins_are_closed_on_the_right(logits, expected_bin):
    bins = reliability_bins(torch.tensor([logits]), torch.tensor([0]))
    assert bins.counts.nonzero().flatten().tolist() == [expected_bin]
    assert bins.accuracy[expected_bin].item() == 1


def test_empty_bins_are_zero_and_have_no_weight():
    bins = reliability_bins(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
    assert bins.counts.tolist() == [0] * 14 + [2]
    assert bins.confidence[:14].tolist() == bins.accuracy[:14].tolist() == [0.0] * 14
    expected = 1 / (1 + np.exp(-9)) - 0.5
    assert bins.expected_calibration_error.item() == pytest.approx(expected, rel=1e-12)


def test_predictions_with_confidence_one():
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    correct_labels, wrong_labels = torch.tensor([0, 1]), torch.tensor([1, 2])
    confidence, correct = top_predictions(logits, correct_labels)
    assert confidence.tolist() == [1.0, 1.0]
    assert correct.tolist() == [True, True]
    for metric in (nll, brier, expected_calibration_error, thresholded_adaptive_calibration_error):
        assert metric(logits, correct_labels).item() == 0
    assert nll(logits, wrong_labels).item() == 1e4
    assert brier(logits, wrong_labels).item() == 2
    assert expected_calibration_error(logits, wrong_labels).item() == 1


def test_constant_predictions():
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([3.0, 0.0, 0.0]).expand(4, 3)
    p = oracle.softmax([3.0, 0.0, 0.0])
    ece = expected_calibration_error(logits, labels).item()
    assert ece == pytest.approx(p[0] - 0.5, rel=1e-12)
    # With four samples, each class has one bin: p_k is compared with the fraction of class k.
    tace = thresholded_adaptive_calibration_error(logits, labels).item()
    assert tace == pytest.approx(np.abs(p - [0.5, 0.25, 0.25]).mean(), rel=1e-12)


def test_first_of_tied_classes_is_predicted():
    _, correct = top_predictions(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert correct.tolist() == [True, False]


@pytest.mark.parametrize("num_samples", [14, 15, 16, 29, 30, 31, 44])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.2, 1.0])
def test_tace_matches_the_oracle_for_all_bin_sizes(num_samples, threshold):
    logits, labels = draw_logits(num_samples, 3)
    actual = thresholded_adaptive_calibration_error(logits, labels, threshold=threshold).item()
    expected = oracle.tace(logits.numpy(), labels.numpy(), threshold=threshold)
    assert actual == pytest.approx(expected, abs=1e-12)
    assert (actual == 0) == (threshold == 1)


def test_tace_excludes_probabilities_at_the_threshold():
    logits, labels = torch.zeros(30, 2), torch.zeros(30, dtype=torch.long)
    assert thresholded_adaptive_calibration_error(logits, labels, threshold=0.49).item() == 0.5
    assert thresholded_adaptive_calibration_error(logits, labels, threshold=0.5).item() == 0


def test_tace_breaks_ties_by_the_order_of_samples():
    logits = torch.zeros(30, 2)
    labels = torch.arange(30) % 2  # bins of two hold one sample of each class
    assert thresholded_adaptive_calibration_error(logits, labels).item() == 0
    assert thresholded_adaptive_calibration_error(logits, labels.sort()[0]).item() > 0.4


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("size", [(40, 2), (200, 10), (331, 7)])
def test_temperature_matches_the_oracle(size, scale):
    logits, labels = draw_logits(*size, scale=scale)
    expected = oracle.temperature(logits.double().numpy(), labels.numpy())
    assert TEMPERATURE_BOUNDS[0] < expected < TEMPERATURE_BOUNDS[1]
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-8)


def test_temperature_error_is_the_standard_deviation_over_samples():
    """Fit calibrated logits on many sets of 100 images."""
    random = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(20_000, 6, generator=random).double()
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=random)[:, 0]
    parts = [(logits[i : i + 100], labels[i : i + 100]) for i in range(0, 20_000, 100)]
    fitted = torch.tensor([fit_temperature(*part) for part in parts])
    errors = torch.tensor([temperature_error(part, 1.0) for part, _ in parts])
    assert float(fitted.std()) == pytest.approx(float(errors.mean()), rel=0.15)


def test_temperature_error_of_constant_logits_is_undefined():
    with pytest.raises(InputError, match="no temperature is optimal"):
        temperature_error(torch.ones(10, 3), 1.0)


def test_gradient_of_the_nll_is_zero_at_the_temperature():
    logits, labels = draw_logits(400, 8)
    logits = logits.double()
    temperature = torch.tensor(
        fit_temperature(logits, labels), dtype=torch.float64, requires_grad=True
    )
    nll(logits / temperature, labels).backward()
    assert temperature.grad is not None
    assert abs(temperature.grad.item()) < 1e-10
    best = nll(logits / temperature, labels).item()
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert nll(logits / (factor * temperature), labels).item() > best


@pytest.mark.parametrize("margin", [0.1, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("error_margin", [1e-2, 1e-4, 1e-8])
def test_temperature_with_vanishing_slopes(monkeypatch, margin, error_margin):
    logits = torch.zeros(100, 2, dtype=torch.float64)
    logits[:, 0] = margin
    logits[0, 0] = error_margin
    labels = torch.zeros(100, dtype=torch.long)
    labels[0] = 1
    assert count_passes(monkeypatch, logits, labels) <= 17
    expected = oracle.temperature(logits.numpy(), labels.numpy())
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-8)


def test_temperature_scales_with_the_logits():
    logits, labels = draw_logits(200, 5)
    plain, scaled = fit_temperature(logits, labels), fit_temperature(10 * logits.double(), labels)
    assert scaled == pytest.approx(10 * plain, rel=1e-8)


def test_temperature_with_one_confident_error():
    logits = torch.tensor([[20.0, 0.0]]).repeat(1000, 1)
    labels = torch.zeros(1000, dtype=torch.long)
    labels[0] = 1
    # Two classes with margin 20 / T: the NLL is minimal if sigmoid(20 / T) equals the accuracy.
    expected = 20 / np.log(0.999 / 0.001)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("optimum", "expected"),
    [(0.0007, 0.001), (0.0013, 0.0013), (0.0025, 0.0025), (400, 400), (700, 700), (1300, 1000)],
)
def test_temperatures_near_the_bounds(optimum, expected):
    assert fit_temperature(*two_classes(optimum)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_separable_logits_have_the_lowest_temperature(scale):
    logits, labels = scale * torch.eye(5), torch.arange(5)
    assert fit_temperature(logits, labels) == TEMPERATURE_BOUNDS[0] == 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_logits_worse_than_chance_have_the_highest_temperature(scale):
    assert fit_temperature(-scale * torch.eye(5), torch.arange(5)) == TEMPERATURE_BOUNDS[1] == 1e3


@pytest.mark.parametrize("logits", [torch.ones(3, 4), 1e6 * torch.eye(4)[:3]])
def test_temperature_is_one_if_no_temperature_is_better(logits):
    assert fit_temperature(logits, torch.arange(3)) == 1


def test_temperature_accepts_gradients_and_half_precision():
    logits, labels = draw_logits(50, 4)
    logits = logits.half()
    tracked = logits.clone().requires_grad_()
    expected = oracle.temperature(logits.double().numpy(), labels.numpy())
    assert fit_temperature(tracked, labels.to(torch.uint8)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0).long(), r"logits must have shape \(N, K\).*\(0, 3\)"),
        (torch.zeros(4), torch.zeros(4).long(), r"logits must have shape \(N, K\).*\(4,\)"),
        (torch.zeros(4, 1), torch.zeros(4).long(), r"K ≥ 2; got \(4, 1\)"),
        (torch.zeros(4, 3), torch.zeros(5).long(), r"labels must have shape.*N = 4.*\(5,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), r"labels must have shape.*\(4, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2), r"labels must be integers; got torch\.float32"),
        (torch.zeros(2, 3), torch.zeros(2).bool(), r"labels must be integers; got torch\.bool"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must be in 0 … 2.*got 3 at index 1"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"got -1 at index 0"),
        (torch.tensor([[0, torch.nan]]), torch.tensor([0]), r"finite; got nan at index \(0, 1\)"),
        (torch.tensor([[-torch.inf, 0]]), torch.tensor([0]), r"finite; got -inf at index"),
    ],
)
def test_invalid_logits_and_labels_are_refused(metric, logits, labels, message):
    with pytest.raises(InputError, match=message) as raised:
        metric(logits, labels)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "metric", [expected_calibration_error, thresholded_adaptive_calibration_error]
)
def test_zero_bins_are_refused(metric):
    with pytest.raises(InputError, match="num_bins must be an integer, 1 or more; got 0"):
        metric(*draw_logits(5, 2), num_bins=0)


@pytest.mark.parametrize("inverse_temperature", [0.3, 1.0, 2.0])
def test_derivatives_of_the_nll_equal_those_of_autograd(inverse_temperature):
    logits, labels = draw_logits(40, 4)
    margins = logits.double() - logits.double().gather(1, labels[:, None])
    s = torch.tensor(inverse_temperature, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(nll(s * logits.double(), labels), s, create_graph=True)[0]
    curvature = torch.autograd.grad(slope, s)[0]
    expected = slope.item(), curvature.item()
    assert _nll_derivatives(margins, inverse_temperature) == pytest.approx(expected, rel=1e-10)


def test_temperature_error_is_that_of_the_scaled_logits():
    logits, _ = draw_logits(50, 4)
    expected = temperature_error(logits.double() / 3, 1.0)
    assert temperature_error(logits, 3.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [draw_logits(200, 5, scale=scale) for scale in (0.01, 0.1, 0.5, 1, 2, 10, 50, 300)]
    + [two_classes(optimum) for optimum in (0.0013, 0.1, 0.7, 1.5, 20, 100, 700)],
)
def test_temperatures_take_few_passes_over_the_logits(monkeypatch, logits, labels):
    assert count_passes(monkeypatch, logits, labels) <= 14


def test_low_temperatures_take_few_passes_over_the_logits(monkeypatch):
    assert count_passes(monkeypatch, *two_classes(0.0013)) <= 11


def test_bins_are_immutable_and_equal_only_to_themselves():
    bins = reliability_bins(*draw_logits(20, 3))
    assert bins != reliability_bins(*draw_logits(20, 3))
    assert len({bins, bins}) == 1
    with pytest.raises(FrozenInstanceError):
        bins.counts = bins.accuracy
