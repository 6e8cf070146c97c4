import numpy as np
import oracle_metrics as oracle
import pytest
import torch

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.ood import UNCERTAINTIES, detection_metrics, separation_metrics


def draw(count, signal, *, num_members=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, num_members, 5, generator=random)
    logits[torch.arange(count), :, torch.arange(count) % 5] += signal
    return logits


@pytest.mark.parametrize("seed", range(3))
def test_separation_against_the_definitions(seed):
    random = np.random.default_rng(seed)
    own, other = random.normal(0, 1, 60).round(1), random.normal(1, 1, 40).round(1)  # with ties
    found = separation_metrics(own, other)
    scores = np.concatenate([own, other])
    is_other = np.arange(100) >= 60
    assert found["auroc"] == pytest.approx(oracle.failure_auroc(scores, is_other))
    assert found["aupr"] == pytest.approx(oracle.average_precision(scores, is_other))
    accepted = min(limit for limit in own if np.mean(own <= limit) >= 0.95)
    assert found["fpr95"] == pytest.approx(np.mean(other <= accepted))


def test_uncertainties_against_the_definitions():
    logits = draw(20, 1.0).double()
    for row, (confidence, entropy, information) in zip(
        logits.numpy(), zip(*(f(logits) for f in UNCERTAINTIES.values()), strict=True), strict=True
    ):
        p = oracle.softmax(row.mean(0))
        assert confidence.item() == pytest.approx(1 - p.max())
        assert entropy.item() == pytest.approx(oracle.entropy(p))
        assert information.item() == pytest.approx(oracle.mutual_information(row[None]))


def test_images_that_stand_out_are_told_apart():
    found = detection_metrics(draw(80, 9.0), draw(50, 0.0, seed=1))
    assert set(found) == set(UNCERTAINTIES)
    for name in ("confidence", "entropy"):
        assert found[name]["auroc"] > 0.95
        assert found[name]["fpr95"] < 0.3


def test_the_same_images_are_chance():
    own = draw(400, 2.0)
    for figures in detection_metrics(own, own).values():
        assert figures["auroc"] == pytest.approx(0.5)
        assert figures["aupr"] == pytest.approx(0.5, abs=0.05)
        assert figures["fpr95"] == pytest.approx(0.95, abs=0.01)


def test_one_member_has_no_information():
    found = detection_metrics(draw(20, 2.0, num_members=1), draw(20, 0.0, num_members=1))
    assert set(found) == {"confidence", "entropy", "absent"}
    assert "at least two; got 1" in found["absent"]["mutual_information"]


def test_what_is_no_logits_is_refused():
    with pytest.raises(InputError, match="out_logits must be finite"):
        detection_metrics(draw(4, 1.0), torch.full((4, 2, 5), torch.nan))
    with pytest.raises(InputError, match="in_logits must have shape"):
        detection_metrics(torch.zeros(0, 2, 5), draw(4, 1.0))
