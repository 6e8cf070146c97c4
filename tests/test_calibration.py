import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from golden import arrays, facts, needs_golden
from sklearn.metrics import log_loss

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.calibration import (
    brier,
    expected_calibration_error,
    nll,
    reliability_bins,
    thresholded_adaptive_calibration_error,
    top_predictions,
)
from mixmo_fastai.metrics.temperature import TEMPERATURE_BOUNDS, fit_temperature, temperature_error

SWEEP = [(1, 2), (3, 2), (14, 3), (40, 5), (200, 10), (331, 7)]
FIGURES = [
    nll,
    brier,
    expected_calibration_error,
    thresholded_adaptive_calibration_error,
    fit_temperature,
]


def draw(num_samples, num_classes, *, signal=1.5, scale=2.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=random)
    logits = torch.randn(num_samples, num_classes, generator=random)
    logits[torch.arange(num_samples), labels] += signal
    return scale * logits, labels


@pytest.mark.parametrize("size", SWEEP)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_against_the_oracle(size, seed):
    logits, labels = draw(*size, seed=seed)
    z, y = logits.numpy(), labels.numpy()
    assert nll(logits, labels).item() == pytest.approx(oracle.nll(z, y), rel=1e-10)
    assert brier(logits, labels).item() == pytest.approx(oracle.brier(z, y), rel=1e-10)
    ece = expected_calibration_error(logits, labels).item()
    assert ece == pytest.approx(oracle.ece(*oracle.top(z, y)), abs=1e-12)
    tace = thresholded_adaptive_calibration_error(logits, labels).item()
    assert tace == pytest.approx(oracle.tace(z, y), abs=1e-12)


def test_nll_against_scikit_learn():
    logits, labels = draw(300, 6)
    probabilities = logits.double().softmax(1).numpy()
    expected = log_loss(labels.numpy(), probabilities, labels=range(6))
    assert nll(logits, labels).item() == pytest.approx(expected, rel=1e-10)


@needs_golden
@pytest.mark.parametrize("name", ["metrics_k10_m2", "metrics_k20_m3"])
def test_published_figures(name):
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
    for figure, value in measured.items():
        assert float(value) == pytest.approx(expected[figure], abs=1e-6), figure


def test_bins_against_the_oracle():
    logits, labels = draw(500, 4)
    confidence, correct = oracle.top(logits.numpy(), labels.numpy())
    found = reliability_bins(logits, labels, num_bins=7)
    counts, means, accuracies = zip(*oracle.bins(confidence, correct, 7), strict=True)
    assert found.counts.tolist() == list(counts)
    assert found.counts.dtype == torch.int64
    np.testing.assert_allclose(found.confidence, means, atol=1e-12)
    np.testing.assert_allclose(found.accuracy, accuracies, atol=1e-12)
    assert found.expected_calibration_error.item() == pytest.approx(
        oracle.ece(confidence, correct, 7)
    )


@pytest.mark.parametrize(
    ("logits", "expected_bin"),
    [
        ([0.0, 0.0, 0.0], 4),  # 1/3 = 5/15: an edge belongs to the bin on its left
        ([0.0, 0.0, 0.0, 0.0, 0.0], 2),  # 1/5 = 3/15
        ([800.0, 0.0, 0.0], 14),  # exactly one
        ([0.0] * 30, 0),
    ],
)
def test_bins_are_closed_on_the_right(logits, expected_bin):
    bins = reliability_bins(torch.tensor([logits]), torch.tensor([0]))
    assert bins.counts.nonzero().flatten().tolist() == [expected_bin]
    assert bins.accuracy[expected_bin].item() == 1


def test_empty_bins_are_zeros_and_count_for_nothing():
    bins = reliability_bins(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
    assert bins.counts.tolist() == [0] * 14 + [2]
    assert bins.confidence[:14].tolist() == bins.accuracy[:14].tolist() == [0.0] * 14
    expected = 1 / (1 + np.exp(-9)) - 0.5
    assert bins.expected_calibration_error.item() == pytest.approx(expected, rel=1e-12)


def test_certain_predictions():
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 2])
    confidence, correct = top_predictions(logits, right)
    assert confidence.tolist() == [1.0, 1.0]
    assert correct.tolist() == [True, True]
    for figure in (nll, brier, expected_calibration_error, thresholded_adaptive_calibration_error):
        assert figure(logits, right).item() == 0
    assert nll(logits, wrong).item() == 1e4
    assert brier(logits, wrong).item() == 2
    assert expected_calibration_error(logits, wrong).item() == 1


def test_one_class_is_predicted_always():
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([3.0, 0.0, 0.0]).expand(4, 3)
    p = oracle.softmax([3.0, 0.0, 0.0])
    ece = expected_calibration_error(logits, labels).item()
    assert ece == pytest.approx(p[0] - 0.5, rel=1e-12)
    # Four samples are one bin per class: p_k against the share of k.
    tace = thresholded_adaptive_calibration_error(logits, labels).item()
    assert tace == pytest.approx(np.abs(p - [0.5, 0.25, 0.25]).mean(), rel=1e-12)


def test_the_first_of_tied_classes_is_predicted():
    _, correct = top_predictions(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert correct.tolist() == [True, False]


@pytest.mark.parametrize("num_samples", [14, 15, 16, 29, 30, 31, 44])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.2, 1.0])
def test_tace_with_bins_of_every_filling(num_samples, threshold):
    logits, labels = draw(num_samples, 3)
    found = thresholded_adaptive_calibration_error(logits, labels, threshold=threshold).item()
    expected = oracle.tace(logits.numpy(), labels.numpy(), threshold=threshold)
    assert found == pytest.approx(expected, abs=1e-12)
    assert (found == 0) == (threshold == 1)


def test_tace_leaves_out_probabilities_at_the_threshold():
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
def test_temperature_against_the_oracle(size, scale):
    logits, labels = draw(*size, scale=scale)
    expected = oracle.temperature(logits.double().numpy(), labels.numpy())
    assert TEMPERATURE_BOUNDS[0] < expected < TEMPERATURE_BOUNDS[1]
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-8)


def test_the_error_of_a_temperature_is_its_spread_over_samples():
    """Of honest logits, refitted on many sets of 100 images."""
    random = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(20_000, 6, generator=random).double()
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=random)[:, 0]
    parts = [(logits[i : i + 100], labels[i : i + 100]) for i in range(0, 20_000, 100)]
    fitted = torch.tensor([fit_temperature(*part) for part in parts])
    errors = torch.tensor([temperature_error(part, 1.0) for part, _ in parts])
    assert float(fitted.std()) == pytest.approx(float(errors.mean()), rel=0.15)


def test_a_temperature_that_changes_nothing_has_no_error():
    with pytest.raises(InputError, match="no temperature is optimal"):
        temperature_error(torch.ones(10, 3), 1.0)


def test_temperature_is_where_the_gradient_of_the_nll_vanishes():
    logits, labels = draw(400, 8)
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
@pytest.mark.parametrize("lone_error", [1e-2, 1e-4, 1e-8])
def test_slopes_that_vanish_are_solved_too(margin, lone_error):
    logits = torch.zeros(100, 2, dtype=torch.float64)
    logits[:, 0] = margin
    logits[0, 0] = lone_error
    labels = torch.zeros(100, dtype=torch.long)
    labels[0] = 1
    expected = oracle.temperature(logits.numpy(), labels.numpy())
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-8)


def test_temperature_scales_with_the_logits():
    logits, labels = draw(200, 5)
    once, tenfold = fit_temperature(logits, labels), fit_temperature(10 * logits.double(), labels)
    assert tenfold == pytest.approx(10 * once, rel=1e-8)


def test_one_error_far_out_is_solved_too():
    logits = torch.tensor([[20.0, 0.0]]).repeat(1000, 1)
    labels = torch.zeros(1000, dtype=torch.long)
    labels[0] = 1
    # Two classes, margin 20 / T: the NLL is least where sigmoid(20 / T) is the accuracy.
    expected = 20 / np.log(0.999 / 0.001)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_separable_logits_take_the_lower_bound(scale):
    logits, labels = scale * torch.eye(5), torch.arange(5)
    assert fit_temperature(logits, labels) == TEMPERATURE_BOUNDS[0]


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_logits_worse_than_chance_take_the_upper_bound(scale):
    assert fit_temperature(-scale * torch.eye(5), torch.arange(5)) == TEMPERATURE_BOUNDS[1]


@pytest.mark.parametrize("logits", [torch.ones(3, 4), 1e6 * torch.eye(4)[:3]])
def test_temperature_is_one_where_nothing_can_be_gained(logits):
    assert fit_temperature(logits, torch.arange(3)) == 1


def test_temperature_ignores_gradients_and_half_precision_is_accepted():
    logits, labels = draw(50, 4)
    logits = logits.half()
    tracked = logits.clone().requires_grad_()
    expected = oracle.temperature(logits.double().numpy(), labels.numpy())
    assert fit_temperature(tracked, labels.to(torch.uint8)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("figure", FIGURES)
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
def test_what_cannot_be_scored_is_refused(figure, logits, labels, message):
    with pytest.raises(InputError, match=message) as raised:
        figure(logits, labels)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "figure", [expected_calibration_error, thresholded_adaptive_calibration_error]
)
def test_bins_must_be_there(figure):
    with pytest.raises(InputError, match="num_bins must be 1 or more; got 0"):
        figure(*draw(5, 2), num_bins=0)
