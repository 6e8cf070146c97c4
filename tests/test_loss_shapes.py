"""Elementwise losses of other shapes are rejected instead of broadcast."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.losses import BaseLoss, MSELossFlat
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.loss import MixMoLoss

ELEMENTWISE_LOSSES = [
    *(nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()),
    *(F.mse_loss, F.l1_loss, partial(F.huber_loss, delta=2.0), F.binary_cross_entropy_with_logits),
    BaseLoss(nn.MSELoss, flatten=False),
]


@pytest.mark.parametrize("base", ELEMENTWISE_LOSSES)
def test_shape_mismatch_is_rejected_instead_of_broadcast(base):
    pred, targets = torch.rand(6, 3, 1), torch.rand(6, 3)
    message = (
        r"predictions \(B, 1\) do not match targets \(B,\).\nPass targets \(B, 1\), or flatten"
    )
    with pytest.raises(InputError, match=message):
        MixMoLoss(base)(pred, targets, torch.ones(6, 3))
    with pytest.raises(InputError, match=message):
        MixMoLoss(base)(pred[:, 0], targets[:, 0])
    with pytest.raises(
        InputError, match=r"\(B, 4\) do not match targets \(B,\).\nPass targets .B, 4.\.$"
    ):
        MixMoLoss(base)(torch.rand(6, 3, 4), targets, torch.ones(6, 3))
    matching = MixMoLoss(base)(pred, targets[..., None], torch.ones(6, 3))
    torch.testing.assert_close(matching, 3 * torch.Tensor(base(pred, targets[..., None])))


def test_regression_loss_with_class_targets_suggests_cross_entropy():
    with pytest.raises(InputError, match=r"Pass targets \(B, 4\), or .* CrossEntropyLossFlat\(\)"):
        MixMoLoss(nn.MSELoss())(torch.rand(6, 3, 4), torch.zeros(6, 3).long(), torch.ones(6, 3))


def test_flattening_losses_accept_a_column():
    pred, targets = torch.rand(6, 3, 1), torch.rand(6, 3)
    actual = MixMoLoss(MSELossFlat())(pred, targets, torch.ones(6, 3))
    torch.testing.assert_close(torch.Tensor(actual), 3 * (pred[..., 0] - targets).square().mean())
    with pytest.raises(InputError, match=r"\(B, 2\) do not match targets \(B,\)"):
        MixMoLoss(MSELossFlat())(torch.rand(6, 3, 2), targets, torch.ones(6, 3))


def test_a_wrapper_that_keeps_the_last_axis_must_not_broadcast():
    pred, targets = torch.rand(6, 3, 1), torch.rand(6, 3)
    loss = MixMoLoss(BaseLoss(nn.MSELoss, floatify=True))
    for batch in ((pred, targets, torch.ones(6, 3)), (pred[:, 0], targets[:, 0])):
        with pytest.raises(InputError, match=r"predictions \(B, 1\) do not match targets \(B,\)"):
            loss(*batch)


class MeanOfLosses(BaseLoss):
    """A custom subclass of fastai's wrapper that always returns a mean: called by sample."""

    def __call__(self, pred, targets):
        return super().__call__(pred, targets).mean()


def test_a_wrapper_that_is_called_by_sample_still_flattens():
    loss, batch = (
        MixMoLoss(MeanOfLosses(nn.MSELoss, is_2d=False)),
        (torch.rand(6, 3, 1), torch.rand(6, 3)),
    )
    expected = 3 * (batch[0][..., 0] - batch[1]).square().mean()
    for _ in range(2):
        torch.testing.assert_close(torch.Tensor(loss(*batch, torch.ones(6, 3))), expected)
    assert loss(batch[0][:, 0], batch[1][:, 0]).isfinite()


class SquaredError(nn.MSELoss):
    """A custom loss with the attributes of fastai's flattening losses, which flattens nothing."""

    flatten = is_2d = True


def test_a_custom_loss_that_does_not_flatten_must_not_broadcast():
    with pytest.raises(InputError, match=r"predictions \(B, 1\) do not match targets \(B,\)"):
        MixMoLoss(SquaredError())(torch.rand(6, 3, 1), torch.rand(6, 3), torch.ones(6, 3))


class CustomAbsoluteError(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, pred, targets):
        values = (pred - targets).abs()
        return values if self.reduction == "none" else values.mean()


@pytest.mark.parametrize("base", [CustomAbsoluteError(), lambda p, t: (p - t).square().mean()])
def test_custom_losses_that_broadcast_are_rejected(base):
    with pytest.raises(InputError, match=r"Predictions are \(B, 1\) and targets \(B,\)"):
        MixMoLoss(base)(torch.rand(6, 3, 1), torch.rand(6, 3), torch.ones(6, 3))
    pred, targets = torch.rand(6, 3, 1), torch.rand(6, 3, 1)
    actual = MixMoLoss(base)(pred, targets, torch.ones(6, 3))
    torch.testing.assert_close(actual, 3 * base(pred, targets))


def test_flattening_is_suggested_for_a_last_axis_of_one_only():
    targets = torch.rand(6, 3, 4)
    with pytest.raises(InputError, match="or flatten both"):
        MixMoLoss(nn.MSELoss())(torch.rand(6, 3, 4, 1), targets, torch.ones(6, 3))
    with pytest.raises(InputError, match=r"Pass targets \(B, 1, 4\)\.$"):
        MixMoLoss(nn.MSELoss())(torch.rand(6, 3, 1, 4), targets, torch.ones(6, 3))
