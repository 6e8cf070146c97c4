"""`MixMoLoss` turns outputs into predictions as the loss it wraps does."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from custom_losses import CUSTOM_LOSSES, CustomCrossEntropy, FixedReductionLoss, power
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLoss,
    FocalLossFlat,
    MSELossFlat,
)
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.base_losses import is_shift_invariant, loss_name
from mixmo_fastai.mixing.loss import MixMoLoss


def test_activation_and_decodes_of_the_base_are_used():
    logits = torch.tensor([[0.0, 2.0]])
    assert MixMoLoss().activation(logits).sum().item() == pytest.approx(1)
    assert MixMoLoss().decodes(logits).tolist() == [1]
    multi = MixMoLoss(BCEWithLogitsLossFlat(thresh=0.9))
    torch.testing.assert_close(multi.activation(logits), logits.sigmoid())
    assert multi.decodes(logits.sigmoid()).tolist() == [[False, False]]


@pytest.mark.parametrize(
    "base", [nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_torch_cross_entropy_implies_softmax_and_argmax(base):
    logits = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(MixMoLoss(base).activation(logits), logits.softmax(1))
    assert MixMoLoss(base).decodes(logits.softmax(1)).tolist() == [1]


def test_focal_loss_of_fastai_implies_softmax_and_argmax():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    for base in (FocalLoss(), FocalLoss(gamma=1.0, weight=torch.ones(2)), FocalLossFlat()):
        loss = MixMoLoss(base)
        torch.testing.assert_close(loss.activation(logits), logits.softmax(1))
        assert loss.decodes(logits.softmax(1)).tolist() == [1, 0]


def test_attributes_are_those_of_the_base():
    loss = MixMoLoss(BCEWithLogitsLossFlat(thresh=0.9))
    probabilities = torch.tensor([[0.4, 0.8]])
    assert loss.thresh == 0.9
    loss.thresh = 0.3
    assert loss.base.thresh == 0.3
    assert "thresh" not in vars(loss)
    assert loss.decodes(probabilities).tolist() == [[True, True]]

    weighted = MixMoLoss(nn.CrossEntropyLoss(weight=torch.ones(2)))
    weighted.weight = torch.tensor([1.0, 0.0])
    assert weighted(torch.zeros(2, 2), torch.tensor([0, 1])).item() == pytest.approx(math.log(2))
    assert weighted.base.weight.tolist() == [1.0, 0.0]
    weighted.label_smoothing = 0.5
    assert weighted.base.label_smoothing == 0.5


def test_attributes_of_the_loss_itself_stay_there():
    loss = MixMoLoss(nn.CrossEntropyLoss())
    loss.reduction, loss.note, loss.training = "sum", "mine", False
    assert (loss.base.reduction, loss.note) == ("sum", "mine")
    assert loss.base.training
    assert not hasattr(loss.base, "note")
    base = loss.base = nn.MSELoss()
    assert loss.base is base
    with pytest.raises(AttributeError, match="unknown"):
        loss.unknown  # noqa: B018
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert (copied.note, type(copied.base)) == ("mine", nn.MSELoss)


def test_softmax_and_argmax_apply_to_the_last_axis():
    logits = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))  # (B, M, K)
    torch.testing.assert_close(MixMoLoss().activation(logits), logits.softmax(2))
    assert torch.equal(MixMoLoss().decodes(logits), logits.argmax(2))


def test_a_label_is_decided_above_one_half():
    probabilities = torch.tensor([[0.4, 0.5, 0.51]])
    assert MixMoLoss(nn.BCEWithLogitsLoss()).decodes(probabilities).tolist() == [
        [False, False, True]
    ]


@pytest.mark.parametrize("base", [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits])
def test_torch_binary_cross_entropy_implies_sigmoid_and_thresholds(base):
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    torch.testing.assert_close(MixMoLoss(base).activation(logits), logits.sigmoid())
    assert MixMoLoss(base).decodes(logits.sigmoid()).tolist() == [[True, True, False]]


@pytest.mark.parametrize("base", [nn.MSELoss(), F.l1_loss, nn.NLLLoss(), MSELossFlat()])
def test_other_losses_do_not_change_predictions(base):
    numbers = torch.tensor([[0.3], [-4.0]])
    assert torch.equal(MixMoLoss(base).activation(numbers), numbers)
    assert torch.equal(MixMoLoss(base).decodes(numbers), numbers)


def test_objects_that_are_not_losses_are_rejected():
    with pytest.raises(InputError, match=r"must be a loss.*got 'ce'"):
        MixMoLoss("ce")


@pytest.mark.parametrize(
    "base", [CUSTOM_LOSSES[0], FixedReductionLoss(), partial(power), CustomCrossEntropy()]
)
def test_softmax_is_detected_in_custom_losses(base):
    logits = torch.tensor([[0.0, 2.0, 1.0], [9.0, 2.0, 1.0]])
    torch.testing.assert_close(MixMoLoss(base).activation(logits), logits.softmax(1))
    assert MixMoLoss(base).decodes(logits.softmax(1)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "base",
    [
        lambda pred, targets: (pred - targets).square().mean(),
        lambda pred, targets: F.mse_loss(pred, targets.float()),
        lambda pred, targets: F.nll_loss(pred, targets.long()),
        lambda pred, targets: F.binary_cross_entropy(pred, targets.float()),
    ],
)
def test_custom_losses_without_softmax_do_not_change_predictions(base):
    numbers = torch.tensor([[0.3, 0.1], [-4.0, 0.2]])
    assert torch.equal(MixMoLoss(base).activation(numbers), numbers)
    assert torch.equal(MixMoLoss(base).decodes(numbers), numbers)


def test_custom_activation_is_used():
    def loss(pred, targets):
        return F.cross_entropy(pred, targets)

    loss.activation, loss.decodes = torch.tanh, torch.sign
    numbers = torch.tensor([[0.3, -0.1]])
    assert torch.equal(MixMoLoss(loss).activation(numbers), numbers.tanh())
    assert torch.equal(MixMoLoss(loss).decodes(numbers), numbers.sign())


def test_softmax_is_recognised_by_invariance_to_a_shift():
    device = torch.device("cpu")
    assert is_shift_invariant(nn.CrossEntropyLoss(), 1, device)
    assert is_shift_invariant(nn.CrossEntropyLoss(), 2, device)

    def nearly(pred, targets):
        return F.cross_entropy(pred, targets) + 1e-3 * pred.mean()

    assert not is_shift_invariant(nearly, 3, device)


def test_names_of_losses_are_those_of_torch_or_of_the_class():
    assert loss_name(MSELossFlat()) == "MSELoss"
    assert loss_name(CrossEntropyLossFlat()) == "CrossEntropyLossFlat"
    assert loss_name(partial(F.l1_loss, reduction="sum")) == "l1_loss"
