import json
import math

import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from golden import arrays, facts, needs_golden
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.evaluation.splits import cross_fitted, evaluate_splits
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.rng import make_generator

METRICS = [
    "accuracy",
    "balanced_accuracy",
    "top5",
    "nll",
    "brier",
    "ece",
    "tace",
    "failure_auroc",
    "aurc",
    "risk_at_80",
    "risk_at_90",
    "risk_at_95",
    "member_accuracy",
    "ratio_error",
    "disagreement",
    "mutual_information",
    "temperature",
    "nll_calibrated",
    "ece_calibrated",
]


def draw_logits(num_samples, num_members, num_classes, *, signal=1.5, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=random)
    logits = torch.randn(num_samples, num_members, num_classes, generator=random)
    logits[torch.arange(num_samples), :, labels] += signal
    return logits, labels


def oracle_metrics(member_logits, labels, average="logits"):
    member_logits, labels = member_logits.double().numpy(), labels.numpy()
    logits = member_logits.mean(1)
    if average == "probabilities":
        means = [np.mean([oracle.softmax(z) for z in row], axis=0) for row in member_logits]
        logits = np.log(means)
    confidence, correct = oracle.top(logits, labels)
    temperature = oracle.temperature(logits, labels)
    return {
        "accuracy": correct.mean(),
        "balanced_accuracy": oracle.balanced_accuracy(logits, labels),
        "top5": oracle.top5(logits, labels),
        "nll": oracle.nll(logits, labels),
        "brier": oracle.brier(logits, labels),
        "ece": oracle.ece(confidence, correct),
        "tace": oracle.tace(logits, labels),
        "failure_auroc": oracle.failure_auroc(confidence, correct),
        "aurc": oracle.aurc(confidence, correct),
        **{f"risk_at_{c}": oracle.risk_at(confidence, correct, c) for c in (80, 90, 95)},
        "member_accuracy": oracle.member_accuracy(member_logits, labels),
        "ratio_error": oracle.ratio_error(member_logits, labels),
        "disagreement": oracle.disagreement(member_logits),
        "mutual_information": oracle.mutual_information(member_logits),
        "temperature": temperature,
        "nll_calibrated": oracle.nll(logits / temperature, labels),
        "ece_calibrated": oracle.ece(*oracle.top(logits / temperature, labels)),
    }


@pytest.mark.parametrize("size", [(80, 2, 6), (150, 3, 10), (200, 4, 25)])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_metrics_match_the_oracle(size, seed, average):
    member_logits, labels = draw_logits(*size, seed=seed)
    actual = evaluate_logits(member_logits, labels, average=average)
    assert list(actual) == METRICS
    expected_metrics = oracle_metrics(member_logits, labels, average)
    assert expected_metrics.keys() == actual.keys()  # no metric without an oracle
    for name, expected in expected_metrics.items():
        assert actual[name] == pytest.approx(expected, rel=1e-8, abs=1e-8), name


@needs_golden
@pytest.mark.parametrize("name", ["metrics_k10_m2", "metrics_k20_m3"])
def test_metrics_match_the_published_implementation(name):
    stored, published = arrays(name), facts(name)
    num_members, num_classes = stored["member_logits"].shape[1:]
    actual = evaluate_logits(stored["member_logits"], stored["labels"])
    expected = {
        "accuracy": published["accuracy"],
        "top5": published["accuracytop5"],
        "nll": published["nll"],
        "brier": published["brier"] * num_classes,
        "ece": published["ece"],
        "tace": published["tace"],
        "failure_auroc": published["auc"],
        "ratio_error": published["diversity_ratioerrors"],
        "member_accuracy": [published[f"accuracy_{m}"] for m in range(num_members)],
        "temperature": published["optimal_temperature"],
        "nll_calibrated": published["nll_at_optimal_temperature"],
    }
    for metric, value in expected.items():
        assert actual[metric] == pytest.approx(value, abs=1e-6), metric


def test_metrics_are_plain_numbers():
    actual = evaluate_logits(*draw_logits(50, 2, 8))
    accuracies = actual.pop("member_accuracy")
    assert all(type(value) is float for value in [*actual.values(), *accuracies])
    assert json.loads(json.dumps(actual)) == actual


def test_top5_matches_scikit_learn():
    member_logits, labels = draw_logits(200, 2, 12, signal=0.5)
    scores = member_logits.mean(dim=1).numpy()
    expected = top_k_accuracy_score(labels.numpy(), scores, k=5, labels=range(12))
    assert evaluate_logits(member_logits, labels)["top5"] == pytest.approx(expected)
    tied = evaluate_logits(torch.zeros(8, 1, 8), torch.arange(8))
    assert tied["top5"] == 5 / 8
    assert tied["accuracy"] == 1 / 8


def test_balanced_accuracy_matches_scikit_learn():
    member_logits, labels = draw_logits(400, 2, 12, signal=0.5)
    labels[labels > 8] = 3  # 3 is four times as frequent, and three classes do not occur
    member_logits[..., 9:] = -100.0
    predicted = member_logits.mean(dim=1).argmax(dim=1)
    expected = balanced_accuracy_score(labels.numpy(), predicted.numpy())
    actual = evaluate_logits(member_logits, labels)
    assert actual["balanced_accuracy"] == pytest.approx(expected)
    assert abs(actual["balanced_accuracy"] - actual["accuracy"]) > 0.01
    constant = torch.zeros(60, 1, 12)  # always the first class
    few = torch.tensor([0] * 50 + [1] * 10)
    assert evaluate_logits(constant, few)["accuracy"] == pytest.approx(50 / 60)
    assert evaluate_logits(constant, few)["balanced_accuracy"] == 0.5
    for part in (few[:50], few[50:]):
        values = evaluate_logits(constant[: len(part)], part)
        assert values["balanced_accuracy"] == values["accuracy"]


def test_metrics_that_need_members_are_absent_for_one_member():
    member_logits, labels = draw_logits(60, 1, 6)
    actual = evaluate_logits(member_logits, labels)
    assert set(actual["absent"]) == {"ratio_error", "disagreement", "mutual_information"}
    assert all("at least two; got 1" in reason for reason in actual["absent"].values())
    assert actual["member_accuracy"] == [actual["accuracy"]]


def test_metrics_of_one_sample():
    actual = evaluate_logits(torch.tensor([[[0.0] * 6 + [2.0]] * 2]), torch.tensor([6]))
    assert set(actual["absent"]) == {"failure_auroc", "ratio_error"}
    assert "1 correct and 0 incorrect" in actual["absent"]["failure_auroc"]
    assert actual["accuracy"] == 1
    assert actual["aurc"] == 0
    assert actual["nll"] == pytest.approx(math.log(1 + 6 * math.exp(-2)))


def test_top5_is_absent_for_five_classes():
    actual = evaluate_logits(*draw_logits(60, 2, 5))
    assert actual["absent"] == {"top5": "top5 is always 1 with five classes or fewer; got 5."}


def test_metrics_without_errors():
    actual = evaluate_logits(4 * torch.eye(7)[:, None].expand(7, 2, 7), torch.arange(7))
    assert set(actual["absent"]) == {"failure_auroc", "ratio_error"}
    assert actual["accuracy"] == actual["top5"] == 1
    assert actual["nll_calibrated"] == actual["ece_calibrated"] == 0


def test_metrics_without_correct_predictions():
    actual = evaluate_logits(torch.eye(7)[:, None].expand(7, 2, 7), torch.arange(7).roll(1))
    assert list(actual["absent"]) == ["failure_auroc"]
    assert "0 correct and 7 incorrect" in actual["absent"]["failure_auroc"]
    assert actual["accuracy"] == actual["ratio_error"] == 0
    assert actual["aurc"] == 1
    assert actual["nll_calibrated"] < actual["nll"]


@pytest.mark.parametrize(
    "member_logits",
    [
        torch.zeros(6, 2, 7),  # all classes tie
        torch.tensor([900.0] + [0.0] * 6).expand(6, 2, 7),  # one class with confidence 1
        1e30 * torch.randn(6, 2, 7, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_metrics_are_never_nan(member_logits):
    actual = evaluate_logits(member_logits, torch.tensor([0, 0, 1, 2, 3, 6]))
    absent = actual.pop("absent", {})
    assert sorted([*actual, *absent]) == sorted(METRICS)
    assert all(np.isfinite(value).all() for value in actual.values())


def test_ensemble_averages_logits():
    member_logits, labels = draw_logits(100, 3, 6)
    mean = member_logits.double().mean(dim=1, keepdim=True)
    ensemble, single = evaluate_logits(member_logits, labels), evaluate_logits(mean, labels)
    for name in set(single) - {"absent", "member_accuracy"}:
        assert ensemble[name] == pytest.approx(single[name], abs=1e-12), name


def test_metrics_do_not_depend_on_gradients_or_precision():
    member_logits, labels = draw_logits(40, 2, 6)
    expected = evaluate_logits(member_logits, labels)
    tracked = member_logits.clone().requires_grad_()
    assert evaluate_logits(tracked, labels.to(torch.int32)) == expected
    half = member_logits.bfloat16()
    assert evaluate_logits(half, labels) == evaluate_logits(half.double(), labels)


@pytest.mark.parametrize(
    ("member_logits", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4).long(), r"member_logits must have shape \(N, M, K\)"),
        (torch.zeros(0, 2, 3), torch.zeros(0).long(), r"no axis empty.*got \(0, 2, 3\)"),
        (torch.zeros(4, 0, 3), torch.zeros(4).long(), r"no axis empty.*got \(4, 0, 3\)"),
        (torch.zeros(4, 2, 1), torch.zeros(4).long(), r"K ≥ 2; got \(4, 2, 1\)"),
        (torch.zeros(4, 2, 3), torch.zeros(3).long(), r"labels must have shape.*N = 4.*\(3,\)"),
        (torch.zeros(2, 2, 3), torch.tensor([0, 3]), r"labels must be in 0 … 2.*got 3 at index 1"),
        (torch.zeros(2, 2, 3), torch.zeros(2), r"labels must be integers"),
        (torch.full((2, 2, 3), torch.nan), torch.zeros(2).long(), r"member_logits must be finite"),
    ],
)
def test_invalid_logits_and_labels_are_refused(member_logits, labels, message):
    with pytest.raises(InputError, match=message) as raised:
        evaluate_logits(member_logits, labels)
    assert len(str(raised.value).splitlines()) <= 3


def test_unknown_average_is_refused():
    with pytest.raises(InputError, match="Did you mean 'logits'"):
        evaluate_logits(*draw_logits(10, 2, 6), average="logit")


def draw_splits(num_members=2, num_valid=80, num_test=240):
    logits, labels = draw_logits(num_valid + num_test, num_members, 6, signal=1.0, seed=3)
    validation = (logits[:num_valid], labels[:num_valid]) if num_valid else None
    return validation, (logits[num_valid:], labels[num_valid:])


class TestSplits:
    """Metrics of the validation split and the test set."""

    def test_metrics_of_both_averages(self):
        validation, test = draw_splits()
        actual = evaluate_splits(validation, test)
        assert actual["test"] == evaluate_logits(*test)
        assert actual["valid"] == evaluate_logits(*validation)
        mean = evaluate_logits(*test, average="probabilities")
        others = {"member_accuracy", "ratio_error", "disagreement", "mutual_information"}
        assert actual["test_mean_probabilities"] == {
            name: value for name, value in mean.items() if name not in others
        }
        assert actual["test"]["nll"] != actual["test_mean_probabilities"]["nll"]
        assert "absent" not in actual

    def test_intervals_contain_their_metrics(self):
        actual = evaluate_splits(*draw_splits())
        assert set(actual["intervals"]) == {"accuracy", "nll", "ece"}
        for name in ("accuracy", "nll"):
            low, high = actual["intervals"][name]
            assert low < actual["test"][name] < high

    def test_each_half_is_scored_at_the_temperature_of_the_other(self):
        logits, labels = draw_logits(200, 1, 6, signal=1.0, seed=5)
        logits = logits[:, 0].double()
        actual = cross_fitted(logits, labels)
        order = torch.randperm(200, generator=make_generator(0, "halves"))
        first, second = order[:100].numpy(), order[100:].numpy()
        z, y = logits.numpy(), labels.numpy()
        temperatures = [oracle.temperature(z[half], y[half]) for half in (first, second)]
        assert actual["temperatures"] == pytest.approx(temperatures, rel=1e-8)
        scaled = np.concatenate([z[first] / temperatures[1], z[second] / temperatures[0]])
        joined = np.concatenate([y[first], y[second]])
        assert actual["num_images"] == 100
        errors = [
            oracle.temperature_error(z[half], temperature)
            for half, temperature in zip((first, second), temperatures, strict=True)
        ]
        assert actual["temperature_errors"] == pytest.approx(errors)
        assert actual["nll"] == pytest.approx(oracle.nll(scaled, joined))
        assert actual["brier"] == pytest.approx(oracle.brier(scaled, joined))
        assert actual["ece"] == pytest.approx(oracle.ece(*oracle.top(scaled, joined)))

    @pytest.mark.parametrize(
        ("settings", "absent", "reason"),
        [
            ({"num_members": 1}, "test_mean_probabilities", "one member"),
            ({"num_valid": 0}, "calibrated", "no validation split"),
            ({"num_test": 60}, "cross_fitted", "60 images"),
        ],
    )
    def test_undefined_results_are_absent_with_a_reason(self, settings, absent, reason):
        actual = evaluate_splits(*draw_splits(**settings))
        assert absent not in actual
        assert reason in actual["absent"][absent]

    def test_results_of_one_class_without_errors_contain_no_nan(self):
        logits = torch.zeros(120, 2, 6)
        logits[:, :, 2] = 5.0
        labels = torch.full((120,), 2)
        actual = evaluate_splits((logits, labels), (logits, labels))
        assert set(actual["absent"]) == {"calibrated", "cross_fitted"}
        assert "every image of one half is classified correctly" in actual["absent"]["cross_fitted"]
        assert "nan" not in json.dumps(actual).lower()


class TestCalibratedMetrics:
    """Metrics of the test set at the temperature of the validation split."""

    @staticmethod
    def metrics(num_valid, margin):
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(200, 4, generator=random)
        labels = torch.randint(4, (200,), generator=random)
        valid_labels = torch.arange(num_valid) % 4
        valid = margin * torch.eye(4)[valid_labels] + torch.randn(num_valid, 4, generator=random)
        model = IdentityNetwork()
        loaders = [(valid, valid_labels)], [(logits, labels)]
        return evaluate_splits(*(collect_member_logits(model, loader) for loader in loaders))

    def test_calibrated_metrics_use_the_validation_temperature(self):
        metrics = self.metrics(100, 1.0)
        assert 0.3 < metrics["calibrated"]["temperature"] < 3
        assert metrics["calibrated"]["temperature"] == metrics["valid"]["temperature"]
        assert metrics["calibrated"]["num_images"] == 100
        assert 0.05 < metrics["calibrated"]["temperature_error"] < 0.5
        assert metrics["calibrated"]["nll"] != metrics["test"]["nll"]

    @pytest.mark.parametrize(
        ("num_valid", "margin", "reason"),
        [(10, 1.0, "10 validation images"), (60, 90.0, "every validation image")],
    )
    def test_calibrated_metrics_are_absent_with_a_reason(self, num_valid, margin, reason):
        metrics = self.metrics(num_valid, margin)
        assert "calibrated" not in metrics
        assert reason in metrics["absent"]["calibrated"]

    def test_training_mode_is_restored(self):
        model = IdentityNetwork().train()
        collect_member_logits(model, [(torch.zeros(2, 4), torch.zeros(2))])
        assert model.training


class IdentityNetwork(torch.nn.Module):
    """A network that returns its input as the logits of both members."""

    def member_logits(self, x):
        assert not self.training
        return torch.stack([x, x], dim=1)
