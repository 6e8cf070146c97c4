"""Metrics against label distributions: definitions, intervals, and their bias with few votes."""

import numpy as np
import oracle_metrics as oracle
import pytest
import torch

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics import calibration
from mixmo_fastai.metrics.bootstrap import draw_counts
from mixmo_fastai.metrics.label_distribution import (
    TERMS,
    cross_entropy_terms,
    kl_divergence_terms,
    label_agreement,
    label_distribution_metrics,
    label_entropy_terms,
)
from mixmo_fastai.rng import make_generator


def draw(num_samples=60, num_classes=5, votes=4, seed=0):
    """Draw logits and the distributions of a few votes, with classes that have none."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (num_samples, num_classes))
    truth = random.dirichlet(np.ones(num_classes), num_samples)
    counts = np.stack([random.multinomial(votes, row) for row in truth])
    return torch.from_numpy(logits), torch.from_numpy(counts / votes)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_match_their_definitions(seed):
    logits, distributions = draw(seed=seed)
    assert (distributions == 0).any()
    expected = oracle.label_distribution(logits.numpy(), distributions.numpy())
    for name, function in TERMS.items():
        np.testing.assert_allclose(function(logits, distributions), expected[name], atol=1e-12)
    np.testing.assert_allclose(
        label_entropy_terms(distributions), expected.pop("label_entropy"), atol=1e-12
    )
    metrics = label_distribution_metrics(logits.float(), distributions.float())
    assert metrics.keys() == expected.keys() | {"intervals"}
    for name, terms in expected.items():
        assert metrics[name] == pytest.approx(terms.mean(), abs=1e-6)


def test_intervals_are_percentiles_of_resampled_means():
    logits, distributions = draw()
    counts = draw_counts(60, 100, generator=make_generator(0, "bootstrap"))  # as drawn in parts
    metrics = label_distribution_metrics(logits, distributions)
    expected = oracle.label_distribution(logits.numpy(), distributions.numpy())
    for name, (low, high) in metrics["intervals"].items():
        first_means = [np.average(expected[name], weights=row) for row in counts.numpy()]
        assert low < metrics[name] < high
        assert np.mean([low <= mean <= high for mean in first_means]) == pytest.approx(
            0.95, abs=0.06
        )
        deviation = expected[name].std() / 60**0.5
        assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_unanimous_votes_give_the_metrics_of_labels():
    logits, _ = draw()
    labels = torch.arange(60) % 5
    metrics = label_distribution_metrics(logits, torch.eye(5)[labels])
    assert metrics["cross_entropy"] == pytest.approx(calibration.nll(logits, labels).item())
    assert metrics["kl_divergence"] == pytest.approx(metrics["cross_entropy"])
    assert metrics["brier"] == pytest.approx(calibration.brier(logits, labels).item())
    correct = (logits.argmax(dim=1) == labels).double().mean().item()
    assert metrics["vote_agreement"] == pytest.approx(correct)


def test_perfect_predictions_reach_the_bounds():
    _, distributions = draw(votes=200)
    metrics = label_distribution_metrics((distributions + 1e-12).log(), distributions)
    assert metrics["cross_entropy"] == pytest.approx(label_entropy_terms(distributions).mean())
    for name in ("kl_divergence", "brier", "total_variation"):
        assert metrics[name] == pytest.approx(0, abs=1e-9)
    certain = 1000 * torch.eye(5)[:2]
    opposite = label_distribution_metrics(certain, torch.eye(5)[[1, 0]])
    assert (opposite["brier"], opposite["total_variation"]) == (2, 1)
    assert opposite["cross_entropy"] == 1000
    assert opposite["vote_agreement"] == 0


def test_few_votes_bias_the_divergence_but_not_the_cross_entropy():
    """The bias with V votes per image is about (K - 1) / 2V nats."""
    random = np.random.default_rng(0)
    truth = random.dirichlet(5 * np.ones(5), 4000)
    logits = torch.from_numpy(np.log(truth))  # perfect probabilities
    entropy = label_entropy_terms(torch.from_numpy(truth)).mean().item()
    for votes in (20, 100):
        counts = np.stack([random.multinomial(votes, row) for row in truth])
        distributions = torch.from_numpy(counts / votes)
        cross_entropy = cross_entropy_terms(logits, distributions).mean().item()
        assert cross_entropy == pytest.approx(entropy, abs=0.02)
        bias = kl_divergence_terms(logits, distributions).mean().item()
        assert bias == pytest.approx(4 / (2 * votes), rel=0.15)


def test_agreement_with_labels_detects_another_order():
    labels = torch.arange(300) % 3
    distributions = 0.7 * torch.eye(3)[labels] + 0.1
    agreement, by_chance = label_agreement(distributions, labels)
    assert agreement == pytest.approx(0.8)
    assert by_chance == pytest.approx(1 / 3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert label_agreement(distributions[order], labels)[0] == pytest.approx(by_chance, abs=0.06)
    skewed = torch.tensor([0] * 90 + [1] * 10)
    always_first = torch.tensor([[1.0, 0.0]]).expand(100, 2)
    assert label_agreement(always_first, skewed) == pytest.approx((0.9, 0.9))


@pytest.mark.parametrize(
    ("distributions", "message"),
    [
        ([[0.5, 0.6], [1, 0]], "index 0"),
        ([[1, 0], [1.5, -0.5]], "index 1"),
        ([[1, 0], [float("nan"), 0]], "must be finite"),
        ([[1, 0]], "shape of the logits"),
        ([1, 0], "must have shape"),
    ],
)
def test_other_values_are_refused(distributions, message):
    with pytest.raises(InputError, match=message):
        label_distribution_metrics(torch.zeros(2, 2), torch.tensor(distributions))
    with pytest.raises(InputError, match="logits must be finite"):
        label_distribution_metrics(torch.full((2, 2), torch.inf), torch.eye(2))
