import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.selective import aurc, failure_auroc, risk_at_coverage, risk_coverage


def draw(num_samples, num_levels, seed=0):
    """Draw confidences from `num_levels` values, so that few levels yield many ties."""
    random = torch.Generator().manual_seed(seed)
    levels = torch.rand(num_levels, generator=random, dtype=torch.float64)
    confidence = levels[torch.randint(num_levels, (num_samples,), generator=random)]
    correct = torch.rand(num_samples, generator=random) < confidence
    correct[:2] = torch.tensor([True, False])
    return confidence, correct


@pytest.mark.parametrize("num_levels", [1, 2, 7, 10_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_equal_the_oracle(num_levels, seed):
    confidence, correct = draw(120, num_levels, seed)
    c, r = confidence.numpy(), correct.numpy()
    auroc = failure_auroc(confidence, correct).item()
    assert auroc == pytest.approx(oracle.failure_auroc(c, r), abs=1e-12)
    assert auroc == pytest.approx(roc_auc_score(r, c), abs=1e-12)
    coverage, risk = risk_coverage(confidence, correct)
    np.testing.assert_allclose(coverage, np.arange(1, 121) / 120, atol=1e-15)
    np.testing.assert_allclose(risk, oracle.risk(c, r), atol=1e-12)
    assert aurc(confidence, correct).item() == pytest.approx(oracle.aurc(c, r), abs=1e-12)


@pytest.mark.parametrize("num_levels", [1, 3, 1000])
def test_metrics_do_not_depend_on_the_order_of_samples(num_levels):
    confidence, correct = draw(100, num_levels)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    for metric in (failure_auroc, aurc):
        reordered = metric(confidence[order], correct[order]).item()
        assert reordered == pytest.approx(metric(confidence, correct).item(), abs=1e-14)


def test_risk_within_ties_is_the_mean_over_their_orders():
    confidence, correct = draw(60, 4)
    random = torch.Generator().manual_seed(1)
    curves = []
    for _ in range(4000):
        noise = 1e-9 * torch.rand(60, generator=random, dtype=torch.float64)
        curves.append(risk_coverage(confidence + noise, correct)[1])
    _, expected = risk_coverage(confidence, correct)
    torch.testing.assert_close(torch.stack(curves).mean(dim=0), expected, atol=0.03, rtol=0)


def test_failure_auroc_depends_only_on_the_ranking():
    confidence, correct = draw(100, 20)
    for monotone in (torch.exp, torch.logit, lambda c: 5 * c - 3):
        auroc = failure_auroc(monotone(confidence), correct).item()
        assert auroc == failure_auroc(confidence, correct).item()
    reversed_auroc = failure_auroc(-confidence, correct).item()
    assert reversed_auroc == pytest.approx(1 - failure_auroc(confidence, correct).item(), abs=1e-14)


def test_best_and_worst_rankings():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6])
    best, worst = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    assert failure_auroc(confidence, best).item() == 1
    assert failure_auroc(confidence, worst).item() == 0
    assert risk_coverage(confidence, best)[1].tolist() == [0, 0, 1 / 3, 1 / 2]
    assert aurc(confidence, best).item() == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert aurc(confidence, worst).item() == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4)


def test_constant_confidence_is_chance():
    confidence, correct = torch.ones(10), torch.arange(10) < 7
    assert failure_auroc(confidence, correct).item() == 0.5
    assert risk_coverage(confidence, correct)[1].tolist() == pytest.approx([0.3] * 10)


def test_infinite_confidences_tie():
    confidence = torch.tensor([torch.inf, torch.inf, 0.0, -torch.inf])
    correct = torch.tensor([True, False, True, False])
    expected = oracle.failure_auroc(confidence.numpy(), correct.numpy())
    assert failure_auroc(confidence, correct).item() == expected == 0.625


@pytest.mark.parametrize("num_samples", [1, 6])
@pytest.mark.parametrize("is_correct", [True, False])
def test_all_correct_or_all_incorrect(num_samples, is_correct):
    confidence = torch.linspace(0.1, 0.9, num_samples)
    correct = torch.full((num_samples,), is_correct)
    count = (
        f"{num_samples} correct and 0 incorrect"
        if is_correct
        else f"0 correct and {num_samples} incorrect"
    )
    with pytest.raises(InputError, match=f"failure_auroc needs correct and incorrect.*{count}"):
        failure_auroc(confidence, correct)
    assert aurc(confidence, correct).item() == 1 - is_correct
    assert risk_coverage(confidence, correct)[1].tolist() == [1 - is_correct] * num_samples


@pytest.mark.parametrize("metric", [failure_auroc, risk_coverage, aurc])
@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        (torch.zeros(0), torch.zeros(0).bool(), r"confidence must have shape \(N,\).*\(0,\)"),
        (torch.zeros(2, 2), torch.zeros(2, 2).bool(), r"confidence must have shape.*\(2, 2\)"),
        (torch.tensor([0.1, torch.nan]), torch.tensor([True, False]), "got nan"),
        (torch.zeros(3), torch.zeros(2).bool(), r"correct must be bool of shape.*\(3,\).*\(2,\)"),
        (torch.zeros(2), torch.zeros(2), r"correct must be bool.*got torch\.float32"),
    ],
)
def test_invalid_inputs_are_rejected(metric, confidence, correct, message):
    with pytest.raises(InputError, match=message):
        metric(confidence, correct)


@pytest.mark.parametrize(
    ("coverage", "accepted"),
    [
        (1e-12, 1),
        (0.01, 1),
        (0.0101, 2),
        (0.07, 7),
        (0.07005, 8),
        (0.29, 29),
        (0.991, 100),
        (1, 100),
    ],
)
def test_risk_at_coverage_accepts_the_smallest_sufficient_number(coverage, accepted):
    """0.07 · 100 and 0.29 · 100 are above and below the integer by a rounding error."""
    correct = torch.arange(100) == 99  # only the most confident one, so that all risks differ
    risk = risk_at_coverage(torch.arange(100.0), correct, coverage).item()
    assert risk == pytest.approx(1 - 1 / accepted)


@pytest.mark.parametrize("coverage", [-0.1, 0.0, 1.01, float("nan")])
def test_coverages_out_of_range_are_rejected(coverage):
    with pytest.raises(InputError, match="coverage must be above 0 and at most 1"):
        risk_at_coverage(torch.tensor([0.5]), torch.tensor([True]), coverage)
