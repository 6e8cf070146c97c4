"""Abstention: the threshold against a slow oracle, and its guarantee."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from scipy import stats

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.abstention import (
    Abstain,
    abstention_metrics,
    images_needed,
    num_bounds,
    risk_bound,
)


def draw(num_images, seed=0, levels=None):
    """Draw confidences, and whether predictions are correct: with probability √confidence."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(num_images, generator=generator, dtype=torch.float64)
    if levels:
        confidence = (confidence * levels).round() / levels
    correct = torch.rand(num_images, generator=generator) < confidence.sqrt()
    return confidence, correct


@pytest.mark.parametrize("errors", [0, 3, 40])
def test_bound_is_the_root_of_the_binomial_tail(errors):
    bound = risk_bound(errors, 100, 0.05)
    assert stats.binom.cdf(errors, 100, bound) == pytest.approx(0.05)
    assert bound == pytest.approx(
        stats.binomtest(errors, 100, alternative="less").proportion_ci(0.95, "exact").high
    )
    assert risk_bound(7, 7, 0.05) == 1


def oracle(confidence, correct, max_risk, guarantee):
    """Follow algorithm 1 of the paper on lists; return the number of accepted images, or None."""
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True))
    steps = math.ceil(math.log2(len(pairs)))
    low, high, best = 0, len(pairs) - 1, None
    for _ in range(steps):
        middle = (low + high) // 2
        accepted = [is_correct for value, is_correct in pairs if value >= pairs[middle][0]]
        errors = accepted.count(False)
        tail = stats.beta.ppf(1 - (1 - guarantee) / steps, errors + 1, len(accepted) - errors)
        bound = 1.0 if errors == len(accepted) else tail
        best_bound = 1 - ((1 - guarantee) / steps) ** (1 / len(accepted))  # without errors
        if bound <= max_risk:
            best = max(best or 0, len(accepted))
        if bound <= max_risk or best_bound > max_risk:
            high = middle
        else:
            low = middle
    return best


@pytest.mark.parametrize("levels", [None, 20])
@pytest.mark.parametrize("max_risk", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("num_images", [50, 999])
def test_threshold_equals_the_oracle(num_images, max_risk, levels):
    confidence, correct = draw(num_images, levels=levels)
    found = Abstain.fit(confidence, correct, max_risk=max_risk, guarantee=0.9)
    expected = oracle(confidence, correct, max_risk, 0.9)
    accepted = found(confidence)
    if expected is None:
        assert (found.threshold, found.coverage) == (math.inf, 0)
        assert not accepted.any()
        return
    assert int(accepted.sum()) == expected == round(found.coverage * num_images)
    errors = int((accepted & ~correct).sum())
    delta = 0.1 / num_bounds(num_images)
    assert found.bound == pytest.approx(risk_bound(errors, expected, delta))
    assert found.bound <= max_risk


@pytest.mark.parametrize("max_risk", [0.1, 0.2])
def test_risk_is_guaranteed_over_draws(max_risk):
    """The true risk of the accepted images, E[1 - √c | c ≥ t], exceeds the limit rarely."""
    violations, draws = 0, 300
    for seed in range(draws):
        found = Abstain.fit(*draw(500, seed), max_risk=max_risk, guarantee=0.9)
        if found.threshold == math.inf:
            continue
        t = found.threshold
        true_risk = 1 - (1 - t**1.5) / 1.5 / (1 - t)
        violations += true_risk > max_risk
    assert violations / draws <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / draws)


def test_everything_is_accepted_if_nothing_is_wrong():
    confidence, correct = draw(200)[0], torch.ones(200, dtype=torch.bool)
    found = Abstain.fit(confidence, correct, max_risk=0.1)
    assert found.coverage == 1
    assert found.threshold == confidence.min()
    nothing = Abstain.fit(confidence, ~correct, max_risk=0.1)
    assert nothing.coverage == 0
    assert not nothing(confidence).any()


def test_number_of_images_is_the_smallest():
    for max_risk in (0.01, 0.05, 0.2):
        needed = images_needed(max_risk)
        for count, is_enough in ((needed, True), (needed - 1, False)):
            correct = torch.ones(count, dtype=torch.bool)
            found = Abstain.fit(torch.rand(count).double(), correct, max_risk=max_risk)
            assert (found.coverage == 1) == is_enough


def test_probabilities_of_any_classifier():
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(dim=1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    found = Abstain.from_probabilities(probabilities, labels, max_risk=0.1)
    confidence, classes = probabilities.double().max(dim=1)
    assert found == Abstain.fit(confidence, classes == labels, max_risk=0.1)
    assert 0 < found.coverage < 1


def test_metrics_equal_an_oracle():
    confidence, correct = draw(300)
    accepted = confidence > 0.6
    found = abstention_metrics(accepted, correct)
    chosen = correct.numpy()[accepted.numpy()]
    assert found["coverage"] == pytest.approx(accepted.numpy().mean())
    assert found["risk"] == pytest.approx(1 - chosen.mean())
    exact = stats.binomtest(int((~chosen).sum()), len(chosen)).proportion_ci(method="exact")
    assert found["interval"] == pytest.approx([exact.low, exact.high])
    none = abstention_metrics(torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool))
    assert none == {"coverage": 0.0, "risk": None, "interval": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_risk": 0.0}, "max_risk must be above 0"),
        ({"max_risk": 1.5}, "max_risk must be from 0 to 1"),
        ({"guarantee": 1.0}, "guarantee must be above 0 and below 1"),
        ({"confidence": torch.tensor([0.5, math.nan])}, "confidence must be numbers"),
        ({"confidence": torch.zeros(2, 2)}, "confidence must be numbers of shape"),
        ({"correct": torch.tensor([1, 0])}, "correct must be bool"),
        ({"correct": torch.tensor([True])}, "correct must be bool"),
    ],
)
def test_invalid_arguments_are_explained(changes, message):
    arguments = {
        "confidence": torch.tensor([0.5, 0.75]),
        "correct": torch.tensor([True, False]),
        "max_risk": 0.1,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        Abstain.fit(arguments.pop("confidence"), arguments.pop("correct"), **arguments)
    assert np.isfinite(images_needed(0.5))


def test_the_bound_is_divided_among_the_steps():
    """With equal risks just above the limit everywhere, any accepted threshold is a failure."""
    failures, draws = 0, 400
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        confidence = torch.rand(400, generator=generator)
        correct = torch.rand(400, generator=generator) < 0.745
        failures += Abstain.fit(confidence, correct, max_risk=0.25, guarantee=0.8).coverage > 0
    # 20 % in all; each of the nine steps alone would allow 20 %.
    assert failures / draws < 0.2 - 2 * math.sqrt(0.16 / draws)


@pytest.mark.parametrize("num_images", range(2, 12))
def test_thresholds_of_few_images_equal_the_oracle(num_images):
    for seed in range(20):
        confidence, correct = draw(num_images, seed)
        found = Abstain.fit(confidence, correct, max_risk=0.7, guarantee=0.3)
        expected = oracle(confidence, correct, 0.7, 0.3)
        assert int(found(confidence).sum()) == (expected or 0)


def test_one_image_may_be_accepted():
    confidence, correct = torch.tensor([0.5]), torch.tensor([True])
    assert Abstain.fit(confidence, correct, max_risk=0.7, guarantee=0.5).threshold == 0.5
    nothing = Abstain.fit(confidence, ~correct, max_risk=0.7, guarantee=0.5)
    assert (nothing.threshold, nothing.bound, nothing.coverage) == (math.inf, 0, 0)


def test_bounds_equal_to_the_risk_are_accepted():
    """The first two steps of 400 images accept 201 and, if these do not suffice, 301 of them."""
    confidence, correct = torch.arange(400.0), torch.ones(400, dtype=torch.bool)
    delta = (1 - 0.95) / num_bounds(400)
    for num_accepted in (201, 400):
        found = Abstain.fit(confidence, correct, max_risk=risk_bound(0, num_accepted, delta))
        assert found.coverage == 1
    limit = risk_bound(0, 201, delta)
    correct[399] = False
    assert risk_bound(1, 301, delta) < limit
    # 201 images have an error, but are as many as the risk needs without one: fewer are tried next.
    assert Abstain.fit(confidence, correct, max_risk=limit).coverage == 0
    with pytest.raises(FrozenInstanceError):
        found.threshold = 0.0


def test_number_of_images_is_rounded_up():
    assert [num_bounds(n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert images_needed(0.96) == 1  # one bound, 1 - 0.05
    assert images_needed(0.5, 0.875) == 4  # two bounds, of 1 - (0.125 / 2)^(1/4) = 0.5
    delta = 0.05 / num_bounds(11)
    assert images_needed(1 - delta ** (1 / 10.005)) == 11
