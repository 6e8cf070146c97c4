"""Prediction sets against slow oracles, MAPIE, and their guarantee."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from mapie.classification import SplitConformalClassifier
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.conformal import (
    RAPS_FREE_RANKS,
    RAPS_PENALTY,
    SCORES,
    ConformalSets,
    check_probabilities,
    conformal_quantile,
    num_needed,
    proportion_interval,
    set_metrics,
    sets_from_scores,
)


def draw(num_images, num_classes=5, seed=0, scale=2.0):
    """Draw probabilities, and labels from other probabilities: the network is not calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((0.6 * logits).softmax(dim=1), 1, generator=generator)[:, 0]
    return logits.softmax(dim=1), labels


def oracle_score(name, row, label):
    """Return the score of one class of one image, from its definition."""
    if name == "lac":
        return round(1 - row[label], 6)
    likelier = [k for k in range(len(row)) if row[k] > row[label]]
    total = round(sum(row[k] for k in likelier), 6)
    if name == "raps":
        total += RAPS_PENALTY * max(0, len(likelier) + 1 - RAPS_FREE_RANKS)
    return total


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_the_oracle(name):
    probabilities, _ = draw(40)
    expected = [
        [oracle_score(name, row, label) for label in range(5)] for row in probabilities.tolist()
    ]
    np.testing.assert_allclose(SCORES[name](probabilities).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("num_classes", [5, 20, 100])  # torch sorts few classes stably in any case
def test_equal_probabilities_are_in_the_order_of_the_classes(num_classes):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 4, (30, num_classes), generator=generator).double()
    probabilities = weights / weights.sum(dim=1, keepdim=True)
    aps, raps = SCORES["aps"](probabilities), SCORES["raps"](probabilities)
    for row, scores, penalised in zip(probabilities.tolist(), aps, raps, strict=True):
        order = sorted(range(num_classes), key=lambda label: -row[label])  # is stable
        for rank, label in enumerate(order):
            total = sum(row[each] for each in order[:rank])
            assert scores[label] == pytest.approx(total, abs=1e-5)
            penalty = RAPS_PENALTY * max(0, rank + 1 - RAPS_FREE_RANKS)
            assert penalised[label] == pytest.approx(total + penalty, abs=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_sets_equal_the_oracle(name, per_class):
    probabilities, labels = draw(300)
    new, _ = draw(50, seed=1)
    sets = ConformalSets.fit(probabilities, labels, coverage=0.8, score=name, per_class=per_class)
    scores = [
        oracle_score(name, row, label)
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
    ]
    limits = []
    for k in range(5):
        group = sorted(
            s for s, y in zip(scores, labels.tolist(), strict=True) if y == k or not per_class
        )
        limits.append(group[math.ceil((len(group) + 1) * 0.8) - 1])
    for row, found in zip(new.tolist(), sets(new).tolist(), strict=True):
        expected = [oracle_score(name, row, k) <= limits[k] + 1e-12 for k in range(5)]
        if not any(expected):
            expected[int(np.argmax(row))] = True
        assert found == expected


class Given(ClassifierMixin, BaseEstimator):
    """A classifier whose probabilities are its inputs."""

    def __init__(self):
        self.classes_ = np.arange(5)

    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        return x

    def predict(self, x):
        return x.argmax(axis=1)

    def __sklearn_is_fitted__(self):
        return True


def mapie_sets(name, calibration, new, **options):
    """Return the sets of MAPIE, (N, K) bool."""
    probabilities, labels = calibration
    peer = SplitConformalClassifier(
        Given(), confidence_level=0.9, conformity_score=name, prefit=True, random_state=0
    )
    peer.conformalize(probabilities.numpy(), labels.numpy())
    _, sets = peer.predict_set(new.numpy(), conformity_score_params=options)
    return torch.from_numpy(sets[:, :, 0])


def test_lac_equals_that_of_mapie():
    calibration, (new, _) = draw(500), draw(200, seed=1)
    calibration, new = (calibration[0].round(decimals=6), calibration[1]), new.round(decimals=6)
    expected = mapie_sets("lac", calibration, new)
    expected[torch.arange(len(new)), new.argmax(dim=1)] |= ~expected.any(dim=1)
    assert torch.equal(ConformalSets.fit(*calibration, coverage=0.9, score="lac")(new), expected)


def test_aps_and_quantile_equal_those_of_mapie():
    """MAPIE subtracts a random part of the label's probability, and adds the class that crosses."""
    calibration, (new, _) = draw(500), draw(200, seed=1)
    probabilities, labels = (each.numpy() for each in calibration)
    part = np.random.RandomState(0).uniform(size=500)
    own = np.take_along_axis(probabilities, labels[:, None], 1)[:, 0]
    scores = SCORES["aps"](calibration[0]).gather(1, calibration[1][:, None])[:, 0]
    limit = conformal_quantile(scores + torch.from_numpy((1 - part) * own), 0.9)
    expected = mapie_sets("aps", calibration, new, include_last_label=True)
    assert torch.equal(SCORES["aps"](new) < limit, expected)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("coverage", [0.75, 0.9])
def test_coverage_over_draws_is_the_chosen_one(name, per_class, coverage):
    """Over 200 draws of both sets of images, the mean coverage is that of the order statistic."""
    num_draws, num_calibration, num_new, num_classes = 200, 150, 100, 6
    found, expected, variance = [], [], 0.0
    for number in range(num_draws):
        probabilities, labels = draw(num_calibration + num_new, num_classes, seed=number)
        first, last = slice(num_calibration), slice(num_calibration, None)
        sets = ConformalSets.fit(
            probabilities[first], labels[first], coverage=coverage, score=name, per_class=per_class
        )
        limits = torch.tensor(sets.thresholds, dtype=torch.float64)
        contains = (SCORES[name](probabilities[last]) <= limits).gather(1, labels[last, None])
        assert (probabilities.argmax(dim=1) == labels).double().mean() < 0.7
        shown = sets(probabilities[last]).gather(1, labels[last, None])
        assert bool((shown >= contains).all())
        assert name == "lac" or torch.equal(shown, contains)  # no set is filled up
        found.append(contains.double().mean().item())
        counts = [int((labels[first] == k).sum()) for k in range(num_classes)]
        sizes = [counts[k] for k in labels[last].tolist()] if per_class else [num_calibration]
        # The k-th smallest of n scores is exceeded with probability 1 - k / (n + 1).
        means = [math.ceil((n + 1) * coverage - 1e-9) / (n + 1) for n in sizes]
        expected.append(np.mean(means))
        variance += coverage * (1 - coverage) * (1 / num_new + 1 / min(sizes))
    deviation = math.sqrt(variance) / num_draws
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=3.5 * deviation)
    assert np.mean(found) > coverage - 3.5 * deviation


@pytest.mark.parametrize("name", ["aps", "raps"])
def test_sets_are_the_likeliest_classes_if_they_are_correct_often_enough(name):
    probabilities, labels = draw(2000, scale=8.0)
    sets = ConformalSets.fit(probabilities, labels, coverage=0.7, score=name)
    new, new_labels = draw(500, seed=1, scale=8.0)
    assert (new.argmax(dim=1) == new_labels).double().mean() > 0.75
    assert torch.equal(sets(new).nonzero()[:, 1], new.argmax(dim=1))


def test_arrays_are_accepted():
    probabilities, labels = draw(200)
    expected = ConformalSets.fit(probabilities, labels, coverage=0.9, per_class=True)
    found = ConformalSets.fit(probabilities.numpy(), labels.numpy(), coverage=0.9, per_class=True)
    assert found == expected
    assert torch.equal(found(probabilities.numpy()), expected(probabilities))


def test_sets_of_lower_coverage_are_contained_in_those_of_higher():
    probabilities, labels = draw(400)
    new, _ = draw(100, seed=1)
    for name in SCORES:
        small, large = (
            ConformalSets.fit(probabilities, labels, coverage=coverage, score=name)(new)
            for coverage in (0.7, 0.95)
        )
        assert bool((small <= large).all())
        assert bool(small.any(dim=1).all())  # no set is empty


def test_quantile_is_the_published_order_statistic():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0])
    assert conformal_quantile(scores, 0.9) == 9.0  # ⌈10 · 0.9⌉ = 9
    assert conformal_quantile(scores, 0.5) == 5.0
    assert conformal_quantile(scores[:3], 0.75) == 5.0
    with pytest.raises(InputError, match=r"0\.9 needs 9 calibration images; there are 8"):
        conformal_quantile(scores[:8], 0.9)
    for coverage in (0.05, 0.5, 0.8, 0.95, 0.975, 0.999):
        needed = num_needed(coverage)
        assert math.ceil((needed + 1) * coverage - 1e-9) <= needed
        assert needed == 1 or math.ceil(needed * coverage - 1e-9) > needed - 1


def test_metrics_equal_an_oracle():
    probabilities, labels = draw(300, num_classes=4)
    sets = ConformalSets.fit(probabilities, labels, coverage=0.8)(probabilities)
    labels = labels.clamp(max=2)  # class 3 has no images
    found = set_metrics(sets, labels)
    rows, truth = sets.numpy(), labels.numpy()
    contains = np.array([rows[i, truth[i]] for i in range(300)])
    sizes = rows.sum(axis=1)
    assert found["coverage"] == contains.mean()
    assert found["mean_size"] == pytest.approx(sizes.mean())
    assert found["class_coverage"] == [
        *(pytest.approx(contains[truth == k].mean()) for k in range(3)),
        None,
    ]
    assert [(each["size"], each["images"]) for each in found["by_size"]] == [
        (size, (sizes == size).sum()) for size in np.unique(sizes)
    ]
    for each in found["by_size"]:
        assert each["coverage"] == pytest.approx(contains[sizes == each["size"]].mean())
    exact = stats.binomtest(int(contains.sum()), 300).proportion_ci(method="exact")
    assert found["interval"] == pytest.approx([exact.low, exact.high])


def test_intervals_of_none_and_all():
    assert proportion_interval(0, 10)[0] == 0
    assert proportion_interval(10, 10)[1] == 1
    assert proportion_interval(0, 10)[1] == pytest.approx(1 - 0.025**0.1)


PROBABILITIES = torch.full((20, 4), 0.25)
LABELS = torch.arange(20) % 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coverage": 1.0}, "coverage must be above 0 and below 1; got 1"),
        ({"coverage": 0.99}, "0.99 needs 99 calibration images; there are 20"),
        ({"coverage": 0.9, "per_class": True}, "9 calibration images per class; 4 of 4 classes"),
        ({"score": "asp"}, "Did you mean 'aps'"),
        ({"score": "lca"}, "Did you mean 'lac'"),
        ({"probabilities": PROBABILITIES[:, 0]}, r"shape \(N, K\)"),
        ({"probabilities": 2 * PROBABILITIES}, "Apply softmax"),
        ({"probabilities": PROBABILITIES - 0.5}, "Apply softmax"),
        ({"probabilities": PROBABILITIES * math.nan}, "Apply softmax"),
        ({"labels": LABELS[:5]}, r"shape \(N,\) with N = 20"),
        ({"labels": LABELS.float()}, "integers"),
        ({"labels": LABELS + 1}, r"labels must be in 0 … 3"),
    ],
)
def test_invalid_arguments_are_explained(changes, message):
    arguments = {"probabilities": PROBABILITIES, "labels": LABELS, "coverage": 0.8, **changes}
    probabilities, labels = arguments.pop("probabilities"), arguments.pop("labels")
    with pytest.raises(InputError, match=message) as error:
        ConformalSets.fit(probabilities, labels, **arguments)
    assert len(str(error.value).splitlines()) <= 3
    with pytest.raises(InputError, match="sets must be bool"):
        set_metrics(PROBABILITIES, LABELS)


@pytest.mark.parametrize("name", SCORES)
def test_rounding_errors_of_logits_do_not_change_sets(name):
    """The scores of the least likely class are all 1, and often the threshold."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(600, 3, generator=generator)
    labels = torch.randint(3, (600,), generator=generator)
    exact, shifted = logits.double().softmax(dim=1), (logits.double() + 7.3).softmax(dim=1)
    fitted = ConformalSets.fit(exact[:300], labels[:300], coverage=0.95, score=name)
    assert torch.equal(fitted(exact[300:]), fitted(shifted[300:]))
    noisy = (logits * (1 + 1e-7)).double().softmax(dim=1)
    assert float((fitted(exact[300:]) != fitted(noisy[300:])).double().mean()) < 0.005


def test_default_score_depends_on_the_number_of_classes():
    for num_classes, expected in ((2, "lac"), (3, "raps")):
        probabilities, labels = draw(100, num_classes=num_classes)
        assert ConformalSets.fit(probabilities, labels, coverage=0.8).score == expected


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_to_the_threshold_are_in_the_set(name):
    """Of the calibration images themselves, exactly those up to the threshold are covered."""
    probabilities, labels = draw(99, scale=0.5)
    sets = ConformalSets.fit(probabilities, labels, coverage=0.9, score=name)
    covered = (SCORES[name](probabilities) <= sets.thresholds[0]).gather(1, labels[:, None])
    assert int(covered.sum()) == 90
    assert torch.equal(sets(probabilities).gather(1, labels[:, None]) & covered, covered)


def test_sets_have_one_threshold_by_default():
    probabilities, labels = draw(100)
    sets = ConformalSets.fit(probabilities, labels, coverage=0.8)
    options = {"num_classes": 5, "coverage": 0.8, "score": "lac"}
    scores = torch.arange(100.0)
    assert len(sets.thresholds) == len(sets_from_scores(scores, labels, **options).thresholds) == 1
    with pytest.raises(FrozenInstanceError):
        sets.thresholds = ()


def test_numbers_slightly_above_an_integer_are_rounded_up():
    scores = torch.arange(1.0, 10.0)
    assert conformal_quantile(scores, 0.5005) == 6.0  # ⌈10 · 0.5005⌉
    assert conformal_quantile(torch.arange(1.0, 100.0), 0.07) == 7.0  # 7.000000000000001
    assert num_needed(9.005 / 10.005) == 10
    assert num_needed(1e-3) == 1
    with pytest.raises(InputError, match="coverage must be above 0"):
        num_needed(0.0)


def test_probabilities_may_be_zero_and_add_up_to_one_with_little_precision():
    assert check_probabilities(torch.tensor([[1.0, 0.0]])).tolist() == [[1.0, 0.0]]
    for total in (0.992, 1.008):
        assert check_probabilities(torch.full((1, 4), total / 4)).shape == (1, 4)
    for total in (0.985, 1.015):
        with pytest.raises(InputError, match="must add up to 1"):
            check_probabilities(torch.full((1, 4), total / 4))


def test_nine_images_per_class_suffice_for_nine_tenths():
    probabilities, labels = torch.full((18, 2), 0.5), torch.arange(18) % 2
    sets = ConformalSets.fit(probabilities, labels, coverage=0.9, per_class=True)
    assert sets.thresholds == (0.5, 0.5)
