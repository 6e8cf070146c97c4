import numpy as np
import oracle_metrics as oracle
import pytest
import torch

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics import bootstrap
from mixmo_fastai.metrics.ood import (
    UNCERTAINTIES,
    detection_metrics,
    energy_uncertainty,
    max_logit_uncertainty,
    separation_metrics,
)


def draw_logits(count, signal, *, num_members=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, num_members, 5, generator=random)
    logits[torch.arange(count), :, torch.arange(count) % 5] += signal
    return logits


@pytest.mark.parametrize("seed", range(3))
def test_separation_metrics_match_their_definitions(seed):
    random = np.random.default_rng(seed)
    in_scores, out_scores = (
        random.normal(0, 1, 60).round(1),
        random.normal(1, 1, 40).round(1),
    )  # with ties
    actual = separation_metrics(in_scores, out_scores)
    scores = np.concatenate([in_scores, out_scores])
    is_out = np.arange(100) >= 60
    assert actual["auroc"] == pytest.approx(oracle.failure_auroc(scores, is_out))
    assert actual["aupr"] == pytest.approx(oracle.average_precision(scores, is_out))
    accepted = min(limit for limit in in_scores if np.mean(in_scores <= limit) >= 0.95)
    assert actual["fpr95"] == pytest.approx(np.mean(out_scores <= accepted))


def test_uncertainties_match_their_definitions():
    logits = draw_logits(20, 1.0).double()
    scores = {name: function(logits) for name, function in UNCERTAINTIES.items()}
    for i, row in enumerate(logits.numpy()):
        z = row.mean(0)
        expected = {
            "confidence": 1 - oracle.softmax(z).max(),
            "max_logit": -sorted(z)[-1],
            "entropy": oracle.entropy(oracle.softmax(z)),
            "energy": oracle.energy(z),
            "mutual_information": oracle.mutual_information(row[None]),
        }
        actual = {name: values[i].item() for name, values in scores.items()}
        assert actual == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_energy_and_max_logit_do_not_overflow(dtype):
    logits = torch.tensor([[[3e4, -3e4]], [[-3e4, -3e4]]], dtype=dtype)
    exact = logits.double()[:, 0]
    for function in (energy_uncertainty, max_logit_uncertainty):
        assert function(logits).dtype == torch.float64
    assert max_logit_uncertainty(logits).tolist() == (-exact.amax(dim=1)).tolist()
    expected = [oracle.energy(row) for row in exact.numpy()]
    assert energy_uncertainty(logits).tolist() == pytest.approx(expected, rel=1e-12)


def test_energy_and_max_logit_see_what_probabilities_hide():
    """Adding a constant to an image's logits changes its energy, but not its probabilities."""
    logits = draw_logits(60, 3.0).double()
    smaller = logits - 4  # unfamiliar images: the same probabilities, less evidence for each class
    actual = detection_metrics(logits, smaller)
    for name in ("confidence", "entropy", "mutual_information"):
        assert actual[name]["auroc"] == pytest.approx(0.5, abs=0.01)
    for name in ("max_logit", "energy"):
        assert actual[name]["auroc"] > 0.95


@pytest.mark.parametrize("function", [energy_uncertainty, max_logit_uncertainty])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(4, 5), "must have shape"),
        (torch.zeros(4, 2, 1), "K ≥ 2"),
        (torch.full((1, 2, 3), torch.inf), "must be finite"),
    ],
)
def test_energy_and_max_logit_check_their_argument(function, logits, message):
    with pytest.raises(InputError, match=message):
        function(logits)


def test_intervals_match_resampled_aurocs(monkeypatch):
    """The same images drawn one by one, and the AUROC of each resample counted over all pairs."""
    random, drawn = torch.Generator().manual_seed(1), []
    in_scores = {"a": torch.randn(30, generator=random).mul(3).round()}  # with ties
    out_scores = {"a": torch.randn(20, generator=random).mul(3).round() + 1}
    draw = bootstrap.draw_counts
    monkeypatch.setattr(
        bootstrap, "draw_counts", lambda *args, **kw: drawn.append(draw(*args, **kw)) or drawn[-1]
    )
    actual = bootstrap.auroc_intervals(in_scores, out_scores, num_resamples=250, level=0.9)["a"]
    assert [len(counts) for counts in drawn] == [100, 100, 100, 100, 50, 50]
    aurocs = []
    for counts_in, counts_out in zip(drawn[::2], drawn[1::2], strict=True):
        for count_in, count_out in zip(counts_in, counts_out, strict=True):
            inside = in_scores["a"].repeat_interleave(count_in.long()).numpy()
            outside = out_scores["a"].repeat_interleave(count_out.long()).numpy()
            assert (len(inside), len(outside)) == (30, 20)
            pairs = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
            aurocs.append(np.mean(pairs))
    assert actual == pytest.approx(np.quantile(aurocs, [0.05, 0.95]))


def test_intervals_have_the_width_of_the_closed_form():
    """DeLong, DeLong, Clarke-Pearson 1988: the variance of a Mann-Whitney statistic."""
    random = torch.Generator().manual_seed(2)
    inside, outside = torch.randn(800, generator=random), torch.randn(500, generator=random) + 1
    low, high = bootstrap.auroc_intervals({"a": inside}, {"a": outside})["a"]
    pairs = (outside[:, None] > inside).double()
    variance = pairs.mean(dim=1).var() / 500 + pairs.mean(dim=0).var() / 800
    assert high - low == pytest.approx(2 * 1.96 * variance.sqrt().item(), rel=0.1)
    assert (low + high) / 2 == pytest.approx(pairs.mean().item(), abs=0.002)


def test_different_images_are_separated():
    actual = detection_metrics(draw_logits(80, 9.0), draw_logits(50, 0.0, seed=1))
    assert set(actual) == set(UNCERTAINTIES)
    for name in ("confidence", "max_logit", "entropy", "energy"):
        assert actual[name]["auroc"] > 0.95
        assert actual[name]["fpr95"] < 0.3


def test_equal_images_are_at_chance_level():
    logits = draw_logits(400, 2.0)
    for metrics in detection_metrics(logits, logits).values():
        assert metrics["auroc"] == pytest.approx(0.5)
        assert metrics["aupr"] == pytest.approx(0.5, abs=0.05)
        assert metrics["fpr95"] == pytest.approx(0.95, abs=0.01)


def test_one_member_has_no_mutual_information():
    actual = detection_metrics(
        draw_logits(20, 2.0, num_members=1), draw_logits(20, 0.0, num_members=1)
    )
    assert set(actual) == {"confidence", "max_logit", "entropy", "energy", "absent"}
    assert "at least two; got 1" in actual["absent"]["mutual_information"]


def test_invalid_logits_are_refused():
    with pytest.raises(InputError, match="out_logits must be finite"):
        detection_metrics(draw_logits(4, 1.0), torch.full((4, 2, 5), torch.nan))
    with pytest.raises(InputError, match="in_logits must have shape"):
        detection_metrics(torch.zeros(0, 2, 5), draw_logits(4, 1.0))
