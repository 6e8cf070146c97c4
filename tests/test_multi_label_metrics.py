"""Metrics of images with several labels, against scikit-learn and slow oracles."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
)

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.multi_label import evaluate_multi_label
from mixmo_fastai.metrics.multi_label import (
    LabelDecisions,
    as_decisions,
    average_precisions,
    best_thresholds,
    decision_metrics,
    exact_match,
    f1_scores,
    image_intervals,
    label_temperature,
    mean_average_precision,
)
from mixmo_fastai.metrics.summary import evaluate_logits

CLASSES = ("cat", "dog", "eel", "fox", "gnu")


def draw(count=200, num_classes=5, seed=0, levels=None):
    """Draw logits that predict the targets somewhat; with few levels, many logits are equal."""
    random = np.random.default_rng(seed)
    targets = random.random((count, num_classes)) < np.linspace(0.1, 0.6, num_classes)
    logits = random.normal(size=targets.shape) + 1.5 * targets - 0.7
    if levels:
        logits = np.round(logits * levels) / levels
    return torch.tensor(logits), torch.tensor(targets).to(torch.uint8)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_scikit_learn(levels, seed):
    logits, targets = draw(seed=seed, levels=levels)
    found = average_precisions(logits, targets)
    expected = average_precision_score(targets, logits, average=None)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert mean_average_precision(logits, targets) == pytest.approx(expected.mean())


def test_classes_without_positives_do_not_count():
    logits, targets = draw()
    targets[:, 2] = 0
    found = average_precisions(logits, targets)
    assert math.isnan(found[2])
    kept = [0, 1, 3, 4]
    expected = average_precision_score(targets[:, kept], logits[:, kept])
    assert mean_average_precision(logits, targets) == pytest.approx(expected)
    predicted = logits > 0
    expected = f1_score(targets[:, kept], predicted[:, kept], average="macro")
    assert f1_scores(predicted, targets)[1] == pytest.approx(expected)
    with pytest.raises(InputError, match="no image has a label"):
        mean_average_precision(logits, torch.zeros_like(targets))
    with pytest.raises(InputError, match="no image has a label"):
        f1_scores(predicted, torch.zeros_like(targets))


def test_decisions_equal_scikit_learn():
    logits, targets = draw()
    predicted = logits > 0.4
    found = decision_metrics(predicted, targets)
    for name, function in (
        ("precision", precision_score),
        ("recall", recall_score),
        ("f1", f1_score),
    ):
        np.testing.assert_allclose(found[name], function(targets, predicted, average=None))
    micro, macro = f1_scores(predicted, targets)
    assert micro == pytest.approx(f1_score(targets, predicted, average="micro"))
    assert macro == pytest.approx(f1_score(targets, predicted, average="macro"))
    expected = np.mean([(p == t).all() for p, t in zip(predicted.numpy(), targets.numpy() > 0)])  # noqa: B905
    assert exact_match(predicted, targets) == pytest.approx(expected)
    never = decision_metrics(torch.zeros_like(predicted), targets)
    assert never["precision"].isnan().all()
    assert not never["recall"].any()


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_have_the_best_f1(levels, seed):
    logits, targets = draw(60, seed=seed, levels=levels)
    targets[:, 1] = 0
    probabilities = logits.sigmoid()
    found = best_thresholds(probabilities, targets)
    assert found[1] == 0.5
    for k in (0, 2, 3, 4):
        scores, labels = probabilities[:, k].numpy(), targets[:, k].numpy()
        edges = np.unique(scores)
        candidates = [0.0, *(edges[:-1] + edges[1:]) / 2]
        values = [f1_score(labels, scores > edge) for edge in candidates]
        assert f1_score(labels, scores > float(found[k])) == pytest.approx(max(values))


def test_each_label_is_a_decision():
    """NLL and accuracy of the decisions are binary cross-entropy and the fraction of right ones."""
    logits, targets = draw()
    members = torch.stack([logits + 0.3, logits - 0.1], dim=1)
    samples, labels = as_decisions(members, targets)
    assert samples.shape == (1000, 2, 2)
    found = evaluate_logits(samples, labels)
    mean = members.mean(dim=1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(mean, targets.double())
    assert found["nll"] == pytest.approx(float(expected))
    right = (mean > 0) == (targets > 0)
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    differ = ((members[:, 0] > 0) != (members[:, 1] > 0)).double().mean()
    assert found["disagreement"] == pytest.approx(float(differ))


def test_intervals_keep_the_labels_of_an_image_together():
    """With copies of one column, intervals are those of a single column."""
    logits, targets = draw(80, 1)
    wide = image_intervals(logits.expand(-1, 4), targets.expand(-1, 4))
    narrow = image_intervals(logits, targets)
    for name, ends in narrow.items():
        assert wide[name] == pytest.approx(ends), name
    assert set(narrow) == {"accuracy", "nll", "ece", "mean_ap"}


def test_interval_of_the_map_equals_a_slow_bootstrap():
    logits, targets = draw(40, 3)
    generator = np.random.default_rng(0)
    values = []
    for _ in range(2000):
        chosen = generator.integers(40, size=40)
        columns = [k for k in range(3) if targets[chosen, k].any()]
        each = [average_precision_score(targets[chosen, k], logits[chosen, k]) for k in columns]
        values.append(np.mean(each))
    low, high = image_intervals(logits, targets, num_resamples=2000)["mean_ap"]
    expected = np.quantile(values, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.02)
    assert low < mean_average_precision(logits, targets) < high


def test_temperature_changes_thresholds_but_not_decisions():
    logits, _ = draw()
    decide = LabelDecisions((0.2, 0.5, 0.9, 0.7, 0.31), 2.5)
    raw = decide.with_temperature(1.0)
    assert torch.equal(decide(logits), raw(logits))
    assert raw.thresholds != decide.thresholds
    assert raw.with_temperature(2.5).thresholds == pytest.approx(decide.thresholds)
    extreme = LabelDecisions((0.0, 1.0), 0.5).with_temperature(1.0)
    assert extreme.thresholds == (0.0, 1.0)
    for values in ({"thresholds": [0.5]}, {"thresholds": [0.5, 1.5]}, {}, 3, {"thresholds": 0.5},
                   {"thresholds": [0.5, 0.5], "temperature": 0}):  # fmt: skip
        with pytest.raises(ValueError, match="threshold"):
            LabelDecisions.from_mapping(values, 2)


def labelled(count, seed):
    logits, targets = draw(count, seed=seed)
    random = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn(count, 2, 5, generator=random, dtype=torch.float64)
    return (logits[:, None] + noise).float(), targets.float()


def test_thresholds_come_from_the_validation_images():
    validation, test = labelled(150, 1), labelled(200, 2)
    metrics = evaluate_multi_label(validation, test, CLASSES)
    found = metrics["multi_label"]
    temperature = metrics["calibrated"]["temperature"]
    assert found["temperature"] == temperature != 1
    assert metrics["calibrated"]["num_images"] == 150
    assert "deployed" not in found
    mean = validation[0].double().mean(dim=1) / temperature
    expected = best_thresholds(mean.sigmoid(), validation[1])
    assert found["thresholds"] == expected.tolist()
    assert found["thresholds_from"] == "validation"
    predicted = (test[0].double().mean(dim=1) / temperature).sigmoid() > expected
    assert (found["f1_micro"], found["f1_macro"]) == f1_scores(predicted, test[1])
    assert [row["name"] for row in found["per_class"]] == [*CLASSES]
    assert sum(row["positives"] for row in found["per_class"]) == int(test[1].sum())
    low, high = found["mean_ap_interval"]
    assert low < found["mean_ap"] < high
    assert len(found["member_mean_ap"]) == 2
    assert not {"calibration", "sets", "abstention", "cross_fitted"} & metrics.keys()
    assert set(metrics["intervals"]) == {"accuracy", "nll", "ece"}


@pytest.mark.parametrize("parts", [(150, None), (None, 150)])
def test_without_other_images_thresholds_are_the_default(parts):
    """Predictions still use those of the validation images, if there are any."""
    validation, test = (None if n is None else labelled(n, 1) for n in parts)
    metrics = evaluate_multi_label(validation, test, CLASSES)
    found = metrics["multi_label"]
    assert found["thresholds"] == [0.5] * 5
    assert (found["thresholds_from"], found["temperature"]) == ("default", 1.0)
    assert "calibrated" in metrics["absent"]
    if validation is None:
        assert "deployed" not in found or found["deployed"]["thresholds"] == [0.5] * 5
        return
    logits = validation[0].double().mean(dim=1)
    temperature, _ = label_temperature(logits, validation[1])
    expected = best_thresholds((logits / temperature).sigmoid(), validation[1])
    assert found["deployed"] == {
        "thresholds": tuple(expected.tolist()), "temperature": temperature
    }  # fmt: skip


def test_images_set_aside_choose_the_thresholds():
    validation, separate = labelled(150, 1), labelled(100, 2)
    found = evaluate_multi_label(validation, None, CLASSES, separate=separate, is_separate=True)[
        "multi_label"
    ]
    mean = separate[0].double().mean(dim=1) / found["temperature"]
    assert found["thresholds"] == best_thresholds(mean.sigmoid(), separate[1]).tolist()
    assert found["thresholds_from"] == "validation"
    assert "deployed" not in found


def test_few_images_give_no_temperature():
    """The labels of 40 images are 200 decisions, but not independent ones."""
    metrics = evaluate_multi_label(labelled(40, 1), labelled(60, 2), CLASSES)
    assert "there are 40 validation images" in metrics["absent"]["calibrated"]
    assert metrics["multi_label"]["temperature"] == 1.0


def test_error_of_the_temperature_is_that_of_images():
    """Copies of a label do not make the temperature more certain; independent ones do."""
    logits, targets = draw(300, 1)
    one = label_temperature(logits, targets)
    copies = label_temperature(logits.expand(-1, 9), targets.expand(-1, 9))
    assert copies == pytest.approx(one)
    values = []
    for seed in range(200):
        logits, targets = draw(100, 4, seed=seed)
        values.append((math.log(label_temperature(logits, targets)[0]),
                       label_temperature(logits, targets)[1]))  # fmt: skip
    found, errors = np.array(values).T
    assert errors.mean() == pytest.approx(found.std(), rel=0.15)


def test_interval_without_positives_is_left_out():
    logits, targets = draw(40, 3)
    targets[:] = 0
    targets[:2, 0] = 1  # a tenth of all resamples have neither image
    assert set(image_intervals(logits, targets)) == {"accuracy", "nll", "ece"}


def test_images_without_labels_leave_the_map_undefined():
    logits, targets = labelled(60, 1)
    found = evaluate_multi_label(None, (logits, 0 * targets), CLASSES)["multi_label"]
    assert found["absent"] == "no image has a label"
    assert "mean_ap" not in found
    assert found["per_class"][0]["average_precision"] is None


def test_wrong_targets_are_refused():
    logits, targets = draw(10)
    for wrong in (targets[:5], 2 * targets, targets[:, 0]):
        with pytest.raises(InputError, match=r"targets must be \(10, 5\) of 0 and 1"):
            average_precisions(logits, wrong)
    with pytest.raises(InputError, match="finite"):
        average_precisions(logits * math.inf, targets)
