import numpy as np
import oracle_metrics as oracle
import pytest
import torch

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.ood import UNCERTAINTIES, detection_metrics, separation_metrics


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
    for row, (confidence, entropy, information) in zip(
        logits.numpy(), zip(*(f(logits) for f in UNCERTAINTIES.values()), strict=True), strict=True
    ):
        p = oracle.softmax(row.mean(0))
        assert confidence.item() == pytest.approx(1 - p.max())
        assert entropy.item() == pytest.approx(oracle.entropy(p))
        assert information.item() == pytest.approx(oracle.mutual_information(row[None]))


def test_different_images_are_separated():
    actual = detection_metrics(draw_logits(80, 9.0), draw_logits(50, 0.0, seed=1))
    assert set(actual) == set(UNCERTAINTIES)
    for name in ("confidence", "entropy"):
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
    assert set(actual) == {"confidence", "entropy", "absent"}
    assert "at least two; got 1" in actual["absent"]["mutual_information"]


def test_invalid_logits_are_refused():
    with pytest.raises(InputError, match="out_logits must be finite"):
        detection_metrics(draw_logits(4, 1.0), torch.full((4, 2, 5), torch.nan))
    with pytest.raises(InputError, match="in_logits must have shape"):
        detection_metrics(torch.zeros(0, 2, 5), draw_logits(4, 1.0))
