import numpy as np
import oracle_metrics as oracle
import pytest
import torch

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.bootstrap import (
    accuracy_half_width,
    auroc_intervals,
    draw_counts,
    intervals,
    paired_intervals,
    resampled_means,
)
from mixmo_fastai.rng import make_generator

NUM_RESAMPLES = 25


def draw_logits(num_samples=60, num_classes=5, seed=0, signal=1.5):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=random)
    logits = torch.randn(num_samples, num_classes, generator=random).double()
    logits[torch.arange(num_samples), labels] += signal
    return logits, labels


def resample_counts(num_samples, num_resamples=NUM_RESAMPLES, seed=0):
    return draw_counts(num_samples, num_resamples, generator=make_generator(seed, "bootstrap"))


@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_match_the_oracle(seed):
    logits, labels = draw_logits(seed=seed)
    resamples = resample_counts(60, seed=seed).int().numpy()
    expected = oracle.resampled_intervals(logits.numpy(), labels.numpy(), resamples)
    actual = intervals(logits, labels, num_resamples=NUM_RESAMPLES, seed=seed)
    for name, (_, ends) in expected.items():
        assert actual[name] == pytest.approx(tuple(ends), abs=1e-6), name


@pytest.mark.parametrize("num_images", [80, 400, 1000])
def test_half_width_is_that_of_an_accuracy_of_one_half(num_images):
    accuracies = np.random.default_rng(0).binomial(num_images, 0.5, 100_000) / num_images
    low, high = np.quantile(accuracies, (0.025, 0.975))
    assert accuracy_half_width(num_images) == pytest.approx((high - low) / 2, abs=0.6 / num_images)


def test_half_width_for_few_images():
    assert accuracy_half_width(0) == 0.98
    assert [accuracy_half_width(n) for n in (1, 4, 100)] == pytest.approx([0.98, 0.49, 0.098])


def test_one_sample_has_an_interval_of_no_width():
    low, high = intervals(torch.tensor([[2.0, 1.0]]), torch.tensor([0]), num_resamples=10)["nll"]
    assert low == high == pytest.approx(float(torch.tensor(-1.0).exp().log1p()))


def test_differences_are_paired():
    first, labels = draw_logits()
    second = first + 0.3 * torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
    resamples = resample_counts(60).int().numpy()
    first_resampled, second_resampled = (
        oracle.resampled_intervals(logits.numpy(), labels.numpy(), resamples)
        for logits in (first, second)
    )
    actual = paired_intervals(first, second, labels, num_resamples=NUM_RESAMPLES)
    for name in actual:
        differences = np.subtract(second_resampled[name][0], first_resampled[name][0])
        ends = tuple(np.quantile(differences, [0.025, 0.975]))
        assert actual[name] == pytest.approx(ends, abs=1e-6), name


def test_difference_between_equal_logits_is_zero():
    logits, labels = draw_logits()
    assert set(paired_intervals(logits, logits, labels).values()) == {(0.0, 0.0)}


def test_resamples_are_drawn_with_replacement():
    drawn = resample_counts(50, 400)
    assert bool((drawn.sum(dim=1) == 50).all())
    assert drawn.mean().item() == 1
    assert drawn.var().item() == pytest.approx(1 - 1 / 50, abs=0.03)  # binomial, p = 1/N


def test_coverage_of_the_intervals_is_close_to_their_level():
    """Repeat 100 times: 200 samples with an accuracy of 0.8."""
    hits = 0
    for seed in range(100):
        random = torch.Generator().manual_seed(seed)
        correct = torch.rand(200, generator=random) < 0.8
        logits = torch.tensor([1.0, 0.0]).expand(200, 2)
        low, high = intervals(logits, (~correct).long(), num_resamples=400, seed=seed)["accuracy"]
        hits += low <= 0.8 <= high
    assert 88 <= hits <= 99


def test_intervals_are_reproducible():
    logits, labels = draw_logits()
    assert intervals(logits, labels, num_resamples=250) != intervals(
        logits, labels, num_resamples=100
    )
    assert intervals(logits, labels, num_resamples=250) == intervals(
        logits, labels, num_resamples=250
    )


@pytest.mark.parametrize("at_once", [1, 7, 250])
def test_intervals_do_not_depend_on_the_chunks_of_resamples(monkeypatch, at_once):
    logits, labels = draw_logits()
    expected = intervals(logits, labels, num_resamples=250)
    monkeypatch.setattr("mixmo_fastai.metrics.bootstrap._RESAMPLES_AT_ONCE", at_once)
    for name, ends in intervals(logits, labels, num_resamples=250).items():
        assert ends == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_resamples": 0}, "num_resamples must be an integer, 1 or more"),
        ({"level": 0.0}, "level must be above 0 and below 1"),
        ({"level": 1.0}, "level must be above 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        intervals(*draw_logits(), **settings)


@pytest.mark.parametrize("num_resamples", [1, 99, 100, 250])
def test_number_of_resamples(num_resamples):
    found = resampled_means({"a": torch.arange(7.0)}, num_resamples=num_resamples)
    assert found["a"].shape == (num_resamples,)


def test_networks_are_compared_on_the_same_resamples_by_default():
    (logits, labels), scores = draw_logits(), {"a": torch.arange(20.0)}
    assert intervals(logits, labels) == intervals(logits, labels, seed=0)
    pair = logits, 2 * logits, labels
    assert paired_intervals(*pair) == paired_intervals(*pair, seed=0)
    assert torch.equal(resampled_means(scores)["a"], resampled_means(scores, seed=0)["a"])
    others = {"a": torch.arange(30.0) - 3}
    assert auroc_intervals(scores, others) == auroc_intervals(scores, others, seed=0)
