from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    LabelSmoothingCrossEntropy,
    MSELossFlat,
)
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.losses import MixMoLoss
from mixmo_fastai.mixing import draw_lam, loss_weights


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    pred = torch.randn(6, 3, 5, generator=random)
    targets = torch.randint(5, (6, 3), generator=random)
    return pred, targets, loss_weights(draw_lam(6, 3, 2.0, generator=random), 3)


BASES = [None, nn.CrossEntropyLoss(), CrossEntropyLossFlat(), F.cross_entropy]


@pytest.mark.parametrize("base", BASES)
def test_members_loss_against_the_oracle(batch, base):
    pred, targets, weights = batch
    expected = oracle.loss(pred.numpy(), targets.numpy(), weights.numpy())
    assert MixMoLoss(base)(pred, targets, weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_soft_targets_against_the_oracle(batch, base):
    pred, _, weights = batch
    soft = torch.rand(6, 3, 5).softmax(-1)
    expected = oracle.loss(pred.numpy(), soft.numpy(), weights.numpy())
    assert MixMoLoss(base)(pred, soft, weights).item() == pytest.approx(expected, rel=1e-5)
    ensemble = MixMoLoss(base)(pred[:, 0], soft[:, 0]).item()
    rows = [
        oracle.cross_entropy(p, t)
        for p, t in zip(pred[:, 0].numpy(), soft[:, 0].numpy(), strict=True)
    ]
    assert ensemble == pytest.approx(np.mean(rows), rel=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_ensemble_loss_is_the_base_loss(batch, base):
    pred, targets, _ = batch
    loss = MixMoLoss(base)(pred[:, 0], targets[:, 0])
    torch.testing.assert_close(torch.Tensor(loss), F.cross_entropy(pred[:, 0], targets[:, 0]))


def test_hard_and_one_hot_targets_agree(batch):
    pred, targets, weights = batch
    loss = MixMoLoss()
    hot = F.one_hot(targets, 5).float()
    torch.testing.assert_close(loss(pred, targets, weights), loss(pred, hot, weights))


@pytest.mark.parametrize(("reduction", "shape"), [("none", (6,)), ("sum", ()), ("mean", ())])
def test_reduction(batch, reduction, shape):
    pred, targets, weights = batch
    loss, none = MixMoLoss(), MixMoLoss()
    loss.reduction, none.reduction = reduction, "none"
    values = none(pred, targets, weights)
    expected = {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]
    result = loss(pred, targets, weights)
    assert result.shape == shape
    torch.testing.assert_close(result, expected)
    assert loss.reduction == reduction


def test_the_base_keeps_its_reduction_after_an_error(batch):
    pred, targets, weights = batch
    loss = MixMoLoss(CrossEntropyLossFlat())
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        loss(pred, targets + 1000, weights)
    assert loss.reduction == "mean"


def test_class_weights_and_label_smoothing_carry_over(batch):
    pred, targets, weights = batch
    class_weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    weighted = MixMoLoss(nn.CrossEntropyLoss(weight=class_weights))
    expected = F.cross_entropy(
        pred.flatten(0, 1), targets.flatten(), weight=class_weights, reduction="none"
    )
    counted = class_weights[targets].sum() / 3  # as torch counts the images of one member
    torch.testing.assert_close(
        weighted(pred, targets, weights), (weights * expected.view(6, 3)).sum() / counted
    )
    smooth = MixMoLoss(LabelSmoothingCrossEntropy(eps=0.1))
    expected = F.cross_entropy(
        pred.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(
        smooth(pred, targets, weights), (weights * expected.view(6, 3)).sum(1).mean()
    )


CLASS_WEIGHTS = torch.tensor([1.0, 9.0, 4.0, 1.0, 7.0])


@pytest.mark.parametrize(
    "base",
    [
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        CrossEntropyLossFlat(weight=CLASS_WEIGHTS),
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=2),
        CrossEntropyLossFlat(weight=CLASS_WEIGHTS, ignore_index=1),
        nn.NLLLoss(weight=CLASS_WEIGHTS),
        partial(F.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=0),
        partial(F.nll_loss, ignore_index=0),
        F.cross_entropy,
        LabelSmoothingCrossEntropy(),
    ],
)
def test_one_member_has_the_loss_that_the_base_gives(batch, base):
    pred = batch[0][:, :1].log_softmax(-1)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])[:, None]
    expected = torch.Tensor(base(pred[:, 0], targets[:, 0]))
    found = torch.Tensor(MixMoLoss(base)(pred, targets, torch.ones(6, 1)))
    torch.testing.assert_close(found, expected)


def test_targets_that_a_base_ignores_count_for_nothing(batch):
    pred, targets, weights = batch
    ignored = torch.cat([targets, torch.full_like(targets, -100)])
    found = MixMoLoss()(pred.repeat(2, 1, 1), ignored, weights.repeat(2, 1))
    torch.testing.assert_close(found, MixMoLoss()(pred, targets, weights))


def test_classes_in_a_column_are_no_soft_targets(batch):
    pred, targets, weights = batch
    loss = MixMoLoss(CrossEntropyLossFlat())
    found = loss(pred, targets[..., None], weights)
    torch.testing.assert_close(found, loss(pred, targets, weights))
    alone = loss(pred[:, 0], targets[:, :1])
    torch.testing.assert_close(alone, loss(pred[:, 0], targets[:, 0]))


def test_multi_label_base(batch):
    pred, _, weights = batch
    labels = (torch.rand(6, 3, 5) < 0.4).float()
    expected = F.binary_cross_entropy_with_logits(pred, labels, reduction="none").mean(2)
    loss = MixMoLoss(BCEWithLogitsLossFlat())(pred, labels, weights)
    torch.testing.assert_close(torch.Tensor(loss), (weights * expected).sum(1).mean())


def test_inference_helpers_of_the_base_carry_over():
    logits = torch.tensor([[0.0, 2.0]])
    assert MixMoLoss().activation(logits).sum().item() == pytest.approx(1)
    assert MixMoLoss().decodes(logits).tolist() == [1]
    multi = MixMoLoss(BCEWithLogitsLossFlat(thresh=0.9))
    torch.testing.assert_close(multi.activation(logits), logits.sigmoid())
    assert multi.decodes(logits.sigmoid()).tolist() == [[False, False]]


@pytest.mark.parametrize(
    "base", [nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_cross_entropy_of_torch_gives_probabilities_and_classes(base):
    logits = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(MixMoLoss(base).activation(logits), logits.softmax(1))
    assert MixMoLoss(base).decodes(logits.softmax(1)).tolist() == [1]


@pytest.mark.parametrize("base", [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits])
def test_binary_cross_entropy_of_torch_decides_label_by_label(base):
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    torch.testing.assert_close(MixMoLoss(base).activation(logits), logits.sigmoid())
    assert MixMoLoss(base).decodes(logits.sigmoid()).tolist() == [[True, True, False]]


@pytest.mark.parametrize("base", [nn.MSELoss(), F.l1_loss, nn.NLLLoss(), MSELossFlat()])
def test_other_losses_leave_predictions_as_they_are(base):
    numbers = torch.tensor([[0.3], [-4.0]])
    assert torch.equal(MixMoLoss(base).activation(numbers), numbers)
    assert torch.equal(MixMoLoss(base).decodes(numbers), numbers)


def test_what_is_no_loss_is_refused():
    with pytest.raises(InputError, match=r"must be a loss.*got 'ce'"):
        MixMoLoss("ce")


def test_a_loss_that_cannot_be_unreduced_is_refused():
    def my_loss(pred, y):
        return pred.mean()

    with pytest.raises(InputError, match="'my_loss' cannot give one loss per sample"):
        MixMoLoss(my_loss)
