import json
import math

import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from golden import arrays, facts, needs_golden
from sklearn.metrics import top_k_accuracy_score

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.evaluation.splits import cross_fitted, evaluate_splits
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.rng import make_generator

FIGURES = [
    "accuracy",
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


def draw(num_samples, num_members, num_classes, *, signal=1.5, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=random)
    logits = torch.randn(num_samples, num_members, num_classes, generator=random)
    logits[torch.arange(num_samples), :, labels] += signal
    return logits, labels


def by_the_oracle(member_logits, labels, average="logits"):
    member_logits, labels = member_logits.double().numpy(), labels.numpy()
    logits = member_logits.mean(1)
    if average == "probabilities":
        means = [np.mean([oracle.softmax(z) for z in row], axis=0) for row in member_logits]
        logits = np.log(means)
    confidence, correct = oracle.top(logits, labels)
    temperature = oracle.temperature(logits, labels)
    return {
        "accuracy": correct.mean(),
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
def test_every_figure_against_the_oracle(size, seed, average):
    member_logits, labels = draw(*size, seed=seed)
    found = evaluate_logits(member_logits, labels, average=average)
    assert list(found) == FIGURES
    by_name = by_the_oracle(member_logits, labels, average)
    assert by_name.keys() == found.keys()  # no metric without an oracle
    for name, expected in by_name.items():
        assert found[name] == pytest.approx(expected, rel=1e-8, abs=1e-8), name


@needs_golden
@pytest.mark.parametrize("name", ["metrics_k10_m2", "metrics_k20_m3"])
def test_published_figures(name):
    stored, published = arrays(name), facts(name)
    num_members, num_classes = stored["member_logits"].shape[1:]
    found = evaluate_logits(stored["member_logits"], stored["labels"])
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
    for figure, value in expected.items():
        assert found[figure] == pytest.approx(value, abs=1e-6), figure


def test_figures_are_plain_numbers():
    found = evaluate_logits(*draw(50, 2, 8))
    accuracies = found.pop("member_accuracy")
    assert all(type(value) is float for value in [*found.values(), *accuracies])
    assert json.loads(json.dumps(found)) == found


def test_top5_against_scikit_learn_and_its_ties():
    member_logits, labels = draw(200, 2, 12, signal=0.5)
    scores = member_logits.mean(dim=1).numpy()
    expected = top_k_accuracy_score(labels.numpy(), scores, k=5, labels=range(12))
    assert evaluate_logits(member_logits, labels)["top5"] == pytest.approx(expected)
    tied = evaluate_logits(torch.zeros(8, 1, 8), torch.arange(8))
    assert tied["top5"] == 5 / 8
    assert tied["accuracy"] == 1 / 8


def test_one_member():
    member_logits, labels = draw(60, 1, 6)
    found = evaluate_logits(member_logits, labels)
    assert set(found["absent"]) == {"ratio_error", "disagreement", "mutual_information"}
    assert all("at least two; got 1" in reason for reason in found["absent"].values())
    assert found["member_accuracy"] == [found["accuracy"]]


def test_one_sample():
    found = evaluate_logits(torch.tensor([[[0.0] * 6 + [2.0]] * 2]), torch.tensor([6]))
    assert set(found["absent"]) == {"failure_auroc", "ratio_error"}
    assert "1 correct and 0 incorrect" in found["absent"]["failure_auroc"]
    assert found["accuracy"] == 1
    assert found["aurc"] == 0
    assert found["nll"] == pytest.approx(math.log(1 + 6 * math.exp(-2)))


def test_five_classes_have_no_top5():
    found = evaluate_logits(*draw(60, 2, 5))
    assert found["absent"] == {"top5": "top5 is always 1 with five classes or fewer; got 5."}


def test_no_errors():
    found = evaluate_logits(4 * torch.eye(7)[:, None].expand(7, 2, 7), torch.arange(7))
    assert set(found["absent"]) == {"failure_auroc", "ratio_error"}
    assert found["accuracy"] == found["top5"] == 1
    assert found["nll_calibrated"] == found["ece_calibrated"] == 0


def test_nothing_but_errors():
    found = evaluate_logits(torch.eye(7)[:, None].expand(7, 2, 7), torch.arange(7).roll(1))
    assert list(found["absent"]) == ["failure_auroc"]
    assert "0 correct and 7 incorrect" in found["absent"]["failure_auroc"]
    assert found["accuracy"] == found["ratio_error"] == 0
    assert found["aurc"] == 1
    assert found["nll_calibrated"] < found["nll"]


@pytest.mark.parametrize(
    "member_logits",
    [
        torch.zeros(6, 2, 7),  # every class ties
        torch.tensor([900.0] + [0.0] * 6).expand(6, 2, 7),  # one class, confidence exactly one
        1e30 * torch.randn(6, 2, 7, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_no_figure_is_ever_nan(member_logits):
    found = evaluate_logits(member_logits, torch.tensor([0, 0, 1, 2, 3, 6]))
    absent = found.pop("absent", {})
    assert sorted([*found, *absent]) == sorted(FIGURES)
    assert all(np.isfinite(value).all() for value in found.values())


def test_the_ensemble_is_the_mean_of_logits():
    member_logits, labels = draw(100, 3, 6)
    mean = member_logits.double().mean(dim=1, keepdim=True)
    ensemble, single = evaluate_logits(member_logits, labels), evaluate_logits(mean, labels)
    for name in set(single) - {"absent", "member_accuracy"}:
        assert ensemble[name] == pytest.approx(single[name], abs=1e-12), name


def test_gradients_and_precision_of_the_input_do_not_matter():
    member_logits, labels = draw(40, 2, 6)
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
def test_what_cannot_be_evaluated_is_refused(member_logits, labels, message):
    with pytest.raises(InputError, match=message) as raised:
        evaluate_logits(member_logits, labels)
    assert len(str(raised.value).splitlines()) <= 3


def test_an_unknown_average_is_refused():
    with pytest.raises(InputError, match="Did you mean 'logits'"):
        evaluate_logits(*draw(10, 2, 6), average="logit")


def parts(num_members=2, num_valid=80, num_test=240):
    logits, labels = draw(num_valid + num_test, num_members, 6, signal=1.0, seed=3)
    validation = (logits[:num_valid], labels[:num_valid]) if num_valid else None
    return validation, (logits[num_valid:], labels[num_valid:])


class TestParts:
    """Everything from the logits of both parts."""

    def test_both_averages_are_there_by_name(self):
        validation, test = parts()
        found = evaluate_splits(validation, test)
        assert found["test"] == evaluate_logits(*test)
        assert found["valid"] == evaluate_logits(*validation)
        mean = evaluate_logits(*test, average="probabilities")
        others = {"member_accuracy", "ratio_error", "disagreement", "mutual_information"}
        assert found["test_mean_probabilities"] == {
            name: value for name, value in mean.items() if name not in others
        }
        assert found["test"]["nll"] != found["test_mean_probabilities"]["nll"]
        assert "absent" not in found

    def test_intervals_hold_their_figures(self):
        found = evaluate_splits(*parts())
        assert set(found["intervals"]) == {"accuracy", "nll", "ece"}
        for name in ("accuracy", "nll"):
            low, high = found["intervals"][name]
            assert low < found["test"][name] < high

    def test_halves_are_scored_at_the_temperature_of_the_other(self):
        logits, labels = draw(200, 1, 6, signal=1.0, seed=5)
        logits = logits[:, 0].double()
        found = cross_fitted(logits, labels)
        order = torch.randperm(200, generator=make_generator(0, "halves"))
        first, second = order[:100].numpy(), order[100:].numpy()
        z, y = logits.numpy(), labels.numpy()
        temperatures = [oracle.temperature(z[half], y[half]) for half in (first, second)]
        assert found["temperatures"] == pytest.approx(temperatures, rel=1e-8)
        scaled = np.concatenate([z[first] / temperatures[1], z[second] / temperatures[0]])
        joined = np.concatenate([y[first], y[second]])
        assert found["num_images"] == 100
        errors = [
            oracle.temperature_error(z[half], temperature)
            for half, temperature in zip((first, second), temperatures, strict=True)
        ]
        assert found["temperature_errors"] == pytest.approx(errors)
        assert found["nll"] == pytest.approx(oracle.nll(scaled, joined))
        assert found["brier"] == pytest.approx(oracle.brier(scaled, joined))
        assert found["ece"] == pytest.approx(oracle.ece(*oracle.top(scaled, joined)))

    @pytest.mark.parametrize(
        ("settings", "absent", "reason"),
        [
            ({"num_members": 1}, "test_mean_probabilities", "one member"),
            ({"num_valid": 0}, "calibrated", "no validation split"),
            ({"num_test": 60}, "cross_fitted", "60 images"),
        ],
    )
    def test_what_cannot_be_told_is_absent_with_its_reason(self, settings, absent, reason):
        found = evaluate_splits(*parts(**settings))
        assert absent not in found
        assert reason in found["absent"][absent]

    def test_one_class_and_no_errors_leave_no_nan(self):
        logits = torch.zeros(120, 2, 6)
        logits[:, :, 2] = 5.0
        labels = torch.full((120,), 2)
        found = evaluate_splits((logits, labels), (logits, labels))
        assert set(found["absent"]) == {"calibrated", "cross_fitted"}
        assert "every image of one half is classified correctly" in found["absent"]["cross_fitted"]
        assert "nan" not in json.dumps(found).lower()


class TestCalibratedFigures:
    """The temperature of the validation split, applied to the test set."""

    @staticmethod
    def figures(num_valid, margin):
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(200, 4, generator=random)
        labels = torch.randint(4, (200,), generator=random)
        valid_labels = torch.arange(num_valid) % 4
        valid = margin * torch.eye(4)[valid_labels] + torch.randn(num_valid, 4, generator=random)
        model = Recorded()
        loaders = [(valid, valid_labels)], [(logits, labels)]
        return evaluate_splits(*(collect_member_logits(model, loader) for loader in loaders))

    def test_they_are_those_of_the_scaled_logits(self):
        figures = self.figures(100, 1.0)
        assert 0.3 < figures["calibrated"]["temperature"] < 3
        assert figures["calibrated"]["temperature"] == figures["valid"]["temperature"]
        assert figures["calibrated"]["num_images"] == 100
        assert 0.05 < figures["calibrated"]["temperature_error"] < 0.5
        assert figures["calibrated"]["nll"] != figures["test"]["nll"]

    @pytest.mark.parametrize(
        ("num_valid", "margin", "reason"),
        [(10, 1.0, "10 validation images"), (60, 90.0, "every validation image")],
    )
    def test_they_are_absent_with_a_reason(self, num_valid, margin, reason):
        figures = self.figures(num_valid, margin)
        assert "calibrated" not in figures
        assert reason in figures["absent"]["calibrated"]

    def test_the_training_mode_comes_back(self):
        model = Recorded().train()
        collect_member_logits(model, [(torch.zeros(2, 4), torch.zeros(2))])
        assert model.training


class Recorded(torch.nn.Module):
    """A network whose images are their own logits, for both members."""

    def member_logits(self, x):
        assert not self.training
        return torch.stack([x, x], dim=1)
