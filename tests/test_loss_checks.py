"""How `MixMoLoss` finds out how a loss averages over samples, and how it weights each sample."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from custom_losses import (
    CLASS_WEIGHTS,
    CUSTOM_LOSSES,
    CustomCrossEntropy,
    IgnoredReductionLoss,
    draw_batch,
)
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.base_losses import mean_divisor
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.mixing.per_sample import BatchLoss, ensure_reduction, matching_averages


@pytest.fixture
def batch():
    return draw_batch()


def centred(pred, targets):
    """Cross-entropy of logits that depend on the other samples."""
    return F.cross_entropy(pred - pred.mean(0), targets)


def weighted(pred, targets):
    """Cross-entropy whose divisor depends on the targets."""
    return F.cross_entropy(pred, targets, weight=CLASS_WEIGHTS)


def test_a_loss_is_checked_on_the_first_ten_batches(batch):
    assert MixMoLoss().checks_left == 0
    assert MixMoLoss.checks_left == 0  # of losses exported by version 0.1.0
    loss = MixMoLoss(CUSTOM_LOSSES[0])
    left = [loss.checks_left]
    for _ in range(12):
        loss(*batch)
        left.append(loss.checks_left)
    assert left == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]


def test_one_counterexample_ends_the_checks(batch):
    pred, targets, _ = batch
    loss = MixMoLoss(centred)
    loss(pred, targets, torch.ones(6, 3))
    assert (loss.checks_left, loss.averages) == (0, ())


@pytest.mark.parametrize(("size", "num_members"), [(6, 3), (2, 1), (1, 2)])
def test_a_loss_that_ignores_its_reduction_is_weighted_per_sample(batch, size, num_members):
    pred, targets, weights = (tensor[:size, :num_members] for tensor in batch)
    actual = MixMoLoss(IgnoredReductionLoss())(pred, targets, weights)
    expected = MixMoLoss(nn.CrossEntropyLoss(label_smoothing=0.2))(pred, targets, weights)
    torch.testing.assert_close(actual, expected)


def test_a_batch_of_one_sample_shows_nothing_about_the_reduction(batch):
    base = CustomCrossEntropy()
    loss = MixMoLoss(base)
    loss(*(tensor[:1, :1] for tensor in batch))
    assert loss.base is base


def test_batch_dependent_losses_work_with_one_image(batch):
    pred, targets, weights = (tensor[:1] for tensor in batch)
    members = [weighted(pred[:, i], targets[:, i]) for i in range(3)]
    expected = sum(w * member for w, member in zip(weights[0], members, strict=True))
    torch.testing.assert_close(MixMoLoss(weighted)(pred, targets, weights), expected)


def test_pasted_targets_need_the_weights_of_the_own_ones(batch):
    with pytest.raises(InputError, match="own_weights is required with pasted_targets"):
        MixMoLoss()(*batch, batch[1])


def test_flattening_losses_convert_labels_that_are_integers(batch):
    pred, _, weights = batch
    labels = (torch.rand(6, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.4).long()
    actual = MixMoLoss(BCEWithLogitsLossFlat())(pred, labels, weights)
    expected = MixMoLoss(nn.BCEWithLogitsLoss())(pred, labels.float(), weights)
    torch.testing.assert_close(torch.Tensor(actual), expected)


def test_tensors_of_losses_that_are_no_modules_are_moved():
    loss = MixMoLoss(CrossEntropyLossFlat(weight=CLASS_WEIGHTS)).to(torch.float64)
    assert loss.base.func.weight.dtype == torch.float64
    function = MixMoLoss(CUSTOM_LOSSES[0]).to("cpu")  # has no tensors to move
    assert function.base.function is CUSTOM_LOSSES[0]


@pytest.mark.parametrize("base", [F.cross_entropy, partial(F.cross_entropy), nn.NLLLoss()])
def test_ignored_targets_are_not_in_the_divisor(base):
    base = ensure_reduction(base)
    assert mean_divisor(base, torch.tensor([0, -100, 1])).item() == 2
    assert mean_divisor(base, torch.tensor([0, 100, 1])).item() == 3


def test_ignored_targets_need_no_class_weight():
    base = nn.CrossEntropyLoss(weight=torch.tensor([2.0]))  # of a single class
    assert mean_divisor(base, torch.tensor([0, -100])).item() == 2


def test_batches_are_vectorised_if_possible():
    calls = []

    def squares(pred, targets):
        calls.append(len(pred))
        return (pred - targets).square().mean()

    def with_branch(pred, targets):
        return squares(pred, targets) if float(pred.sum()) > -1e9 else pred.sum()

    pred, targets = torch.arange(10.0).view(5, 2), torch.zeros(5, 2)
    expected = pred.square().mean(dim=1)
    for function, num_calls in ((squares, [1, 1]), (with_branch, [5, 5])):
        loss = BatchLoss(function)
        loss.reduction = "none"
        for number in num_calls:
            calls.clear()
            torch.testing.assert_close(loss(pred, targets), expected)
            assert calls == [1] * number


def test_a_loss_that_cannot_be_vectorised_is_tried_once():
    attempts = []

    def loss(pred, targets):
        attempts.append(len(attempts))
        return pred.sum() if float(pred.sum()) > 0 else -pred.sum()

    per_sample = BatchLoss(loss)
    per_sample.reduction = "none"
    for number in (4, 7):  # the first time, one attempt more than there are samples
        per_sample(torch.ones(3, 2), torch.zeros(3, 2))
        assert len(attempts) == number
    with pytest.raises(ValueError, match="shorter"):
        per_sample(torch.ones(3, 2), torch.zeros(2, 2))


def test_averages_match_up_to_rounding():
    losses = torch.tensor([[1.0], [3.0]])
    assert matching_averages(torch.tensor(2.0), losses) == ["values", "samples"]
    assert matching_averages(torch.tensor(2.0003), losses) == ["values", "samples"]
    assert matching_averages(torch.tensor(2.001), losses) == []
    assert matching_averages(torch.tensor(0.0), 0 * losses) == ["values", "samples", "nothing"]
