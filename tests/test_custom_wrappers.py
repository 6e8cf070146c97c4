"""Custom losses that derive from fastai's flattening wrapper, or look like it."""

import pytest
import torch
import torch.nn.functional as F
from custom_losses import draw_batch
from fastai.losses import BaseLoss, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from torch import nn

from mixmo_fastai.mixing.loss import MixMoLoss


@pytest.fixture
def batch():
    return draw_batch()


class WithFlatteningAttribute(nn.CrossEntropyLoss):
    """A custom loss with one of the two attributes of fastai's flattening losses."""

    def __init__(self, attribute):
        super().__init__()
        setattr(self, attribute, True)


class ScaledSoftLoss(CrossEntropyLossFlat):
    """A custom subclass of fastai's wrapper, with code of its own for soft targets."""

    def __call__(self, pred, targets):
        return 2 * F.cross_entropy(pred, targets, reduction=self.reduction)


def test_the_code_of_a_custom_wrapper_is_used_for_soft_targets(batch):
    pred, _, weights = batch
    soft = torch.rand(6, 3, 5).softmax(-1)
    loss, plain = MixMoLoss(ScaledSoftLoss()), MixMoLoss()
    torch.testing.assert_close(loss(pred, soft, weights), 2 * plain(pred, soft, weights))
    ensemble = pred[:, 0], soft[:, 0]
    torch.testing.assert_close(loss(*ensemble), 2 * plain(*ensemble))


class DoubledLoss(CrossEntropyLossFlat):
    """A custom subclass of fastai's wrapper that relies on its code."""

    def __call__(self, pred, targets):
        return 2 * super().__call__(pred, targets)


def test_a_custom_wrapper_may_call_the_code_of_fastai(batch):
    pred, _, weights = batch
    soft, base = torch.rand(6, 3, 5).softmax(-1), DoubledLoss()
    loss, plain = MixMoLoss(base), MixMoLoss()
    torch.testing.assert_close(loss(pred, soft, weights), 2 * plain(pred, soft, weights))
    torch.testing.assert_close(loss(pred[:, 0], soft[:, 0]), 2 * plain(pred[:, 0], soft[:, 0]))
    assert base.flatten


class DoubledSmoothing(LabelSmoothingCrossEntropyFlat):
    def __call__(self, pred, targets):
        return 2 * super().__call__(pred, targets)


def test_the_code_of_a_custom_smoothing_is_used_with_class_weights(batch):
    pred, targets, weights = batch
    smoothing = {"eps": 0.2, "weight": torch.linspace(0.5, 2.0, 5)}
    plain = LabelSmoothingCrossEntropyFlat(**smoothing)
    expected = 2 * sum(plain(pred[:, i], targets[:, i]) for i in range(3))
    loss = MixMoLoss(DoubledSmoothing(**smoothing))
    for _ in range(2):
        actual = loss(pred, targets, torch.ones_like(weights))
        torch.testing.assert_close(torch.Tensor(actual), torch.Tensor(expected))


class WithoutInit(BaseLoss):
    """A custom subclass of fastai's wrapper without its attributes."""

    reduction = "mean"

    def __init__(self):
        pass

    def __call__(self, pred, targets):
        return F.cross_entropy(pred, targets, reduction=self.reduction)


@pytest.mark.parametrize("is_soft", [False, True])
def test_a_custom_wrapper_needs_no_attributes_of_fastai(batch, is_soft):
    pred, targets, weights = batch
    targets = torch.rand(6, 3, 5).softmax(-1) if is_soft else targets
    actual = MixMoLoss(WithoutInit())(pred, targets, weights)
    torch.testing.assert_close(actual, MixMoLoss()(pred, targets, weights))


@pytest.mark.parametrize("attribute", ["flatten", "is_2d"])
def test_custom_losses_get_soft_targets_themselves(batch, attribute):
    pred, _, weights = batch
    soft = torch.rand(6, 3, 5).softmax(-1)
    actual = MixMoLoss(WithFlatteningAttribute(attribute))(pred, soft, weights)
    torch.testing.assert_close(actual, MixMoLoss()(pred, soft, weights))
