import math

import numpy as np
import oracle_metrics as oracle
import pytest
import torch
from golden import arrays, facts, needs_golden

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.diversity import (
    accuracy_by_agreement,
    disagreement,
    mean_probability_logits,
    member_accuracies,
    mutual_information,
    ratio_error,
)


def draw_logits(num_samples, num_members, num_classes, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_samples, num_members, num_classes, generator=random)
    return logits, torch.randint(num_classes, (num_samples,), generator=random)


def make_logits(predictions, num_classes=3):
    """Return member logits (N, M, K) that predict the classes (N, M)."""
    return torch.nn.functional.one_hot(torch.tensor(predictions), num_classes).float()


@pytest.mark.parametrize("size", [(40, 2, 3), (60, 3, 4), (90, 5, 10)])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_match_the_oracle(size, seed):
    logits, labels = draw_logits(*size, seed=seed)
    z, y = logits.numpy(), labels.numpy()
    accuracies = member_accuracies(logits, labels)
    assert accuracies.tolist() == pytest.approx(oracle.member_accuracy(z, y))
    assert ratio_error(logits, labels).item() == pytest.approx(oracle.ratio_error(z, y))
    assert disagreement(logits).item() == pytest.approx(oracle.disagreement(z))
    information = mutual_information(logits).item()
    assert information == pytest.approx(oracle.mutual_information(z), rel=1e-10)


@needs_golden
@pytest.mark.parametrize("name", ["metrics_k10_m2", "metrics_k20_m3"])
def test_metrics_match_the_published_implementation(name):
    stored, expected = arrays(name), facts(name)
    logits, labels = stored["member_logits"], stored["labels"]
    ratio = ratio_error(logits, labels).item()
    assert ratio == pytest.approx(expected["diversity_ratioerrors"], abs=1e-9)
    accuracies = member_accuracies(logits, labels).tolist()
    published = [expected[f"accuracy_{m}"] for m in range(logits.shape[1])]
    assert accuracies == pytest.approx(published, abs=1e-9)
    assert np.mean(accuracies) == pytest.approx(expected["accuracy_mean"], abs=1e-9)


def test_metrics_of_a_small_example():
    labels = torch.tensor([0, 0, 0, 0, 0])
    logits = make_logits(
        [[1, 1], [1, 2], [0, 1], [0, 2], [1, 0]]
    )  # two common errors, three individual errors
    assert ratio_error(logits, labels).item() == 1.5
    assert disagreement(logits).item() == 0.8
    assert member_accuracies(logits, labels).tolist() == [0.4, 0.2]


def test_diversity_does_not_depend_on_the_order_of_members():
    logits, labels = draw_logits(80, 4, 5)
    permuted = logits[:, [2, 0, 3, 1]]
    assert ratio_error(permuted, labels).item() == pytest.approx(ratio_error(logits, labels).item())
    assert disagreement(permuted).item() == pytest.approx(disagreement(logits).item())


def test_equal_members_have_no_diversity():
    logits, labels = draw_logits(30, 1, 4)
    copies = logits.expand(30, 3, 4)
    assert ratio_error(copies, labels).item() == 0
    assert disagreement(copies).item() == 0
    assert mutual_information(copies).item() < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_mutual_information_is_never_negative(seed):
    logits, _ = draw_logits(1, 1, 4, seed=seed)
    assert 0 <= mutual_information(logits.expand(1, 3, 4)).item() < 1e-12


def test_mutual_information_of_confident_disagreeing_members_is_log_m():
    logits = 1e4 * torch.eye(3).expand(7, 3, 3)
    assert mutual_information(logits).item() == pytest.approx(math.log(3), rel=1e-12)


def test_diversity_of_one_member_is_refused():
    logits, labels = draw_logits(5, 1, 3)
    with pytest.raises(InputError, match=r"mutual_information compares members.*got 1"):
        mutual_information(logits)
    with pytest.raises(InputError, match=r"ratio_error compares members.*got 1"):
        ratio_error(logits, labels)
    with pytest.raises(InputError, match=r"disagreement compares members.*got 1"):
        disagreement(logits)


@pytest.mark.parametrize(
    "predictions",
    [
        [[0, 0], [0, 0]],  # no errors
        [[0, 1], [1, 0]],  # no common errors
        [[1, 1, 0], [1, 1, 0]],  # common errors in one of three pairs
    ],
)
def test_ratio_error_is_undefined_without_common_errors(predictions):
    with pytest.raises(InputError, match="got a pair without common errors"):
        ratio_error(make_logits(predictions), torch.tensor([0, 0]))


@pytest.mark.parametrize("metric", [member_accuracies, ratio_error])
def test_invalid_labels_are_refused(metric):
    logits, labels = draw_logits(6, 2, 3)
    with pytest.raises(InputError, match=r"labels must be in 0 … 2.*got 5 at index 5"):
        metric(logits, labels.index_fill(0, torch.tensor([5]), 5))
    with pytest.raises(InputError, match=r"labels must have shape.*N = 6"):
        metric(logits, labels[:4])


@pytest.mark.parametrize("metric", [disagreement, mutual_information])
def test_invalid_logits_are_refused(metric):
    with pytest.raises(InputError, match=r"member_logits must have shape \(N, M, K\).*\(6, 3\)"):
        metric(torch.zeros(6, 3))
    with pytest.raises(InputError, match=r"member_logits must be finite; got inf.*\(0, 1, 0\)"):
        metric(torch.tensor([[[0.0, 0.0], [torch.inf, 0.0]]]))


def test_accuracy_by_agreement():
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 3, 4, generator=random)
    labels = torch.randint(0, 4, (200,), generator=random)
    counts, accuracy = accuracy_by_agreement(logits, labels)
    predictions, ensemble = logits.argmax(2), logits.double().mean(1).argmax(1)
    for number in range(4):
        group = [i for i in range(200) if (predictions[i] == ensemble[i]).sum() == number]
        assert counts[number] == len(group)
        num_correct = sum(bool(ensemble[i] == labels[i]) for i in group)
        assert accuracy[number] == pytest.approx(num_correct / max(len(group), 1))
    assert counts[0] > 0  # all members differ from the ensemble


def test_agreement_of_one_image():
    counts, accuracy = accuracy_by_agreement(make_logits([[0, 0, 1]], 5), torch.tensor([0]))
    assert counts.tolist() == [0, 0, 1, 0]  # two of three members predict the ensemble's class
    assert accuracy.tolist() == [0, 0, 1, 0]
    counts, accuracy = accuracy_by_agreement(make_logits([[0, 0, 1]], 5), torch.tensor([1]))
    assert (counts.tolist(), accuracy.tolist()) == ([0, 0, 1, 0], [0, 0, 0, 0])


def test_mean_probabilities_as_logits():
    logits, _ = draw_logits(20, 3, 5)
    actual = mean_probability_logits(logits)
    torch.testing.assert_close(actual.exp(), logits.double().softmax(dim=2).mean(dim=1))
