from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from custom_losses import (
    CLASS_WEIGHTS,
    CUSTOM_LOSSES,
    FASTAI_LOSSES_WITH_CLASS_WEIGHTS,
    DataDependentLoss,
    draw_batch,
)
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, loss_weights
from mixmo_fastai.mixing.loss import MixMoLoss


@pytest.fixture
def batch():
    return draw_batch()


BASES = [None, nn.CrossEntropyLoss(), CrossEntropyLossFlat(), F.cross_entropy]


@pytest.mark.parametrize("base", BASES)
def test_weighted_loss_equals_the_oracle(batch, base):
    pred, targets, weights = batch
    expected = oracle.loss(pred.numpy(), targets.numpy(), weights.numpy())
    assert MixMoLoss(base)(pred, targets, weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_soft_targets_equal_the_oracle(batch, base):
    pred, _, weights = batch
    soft = torch.rand(6, 3, 5).softmax(-1)
    expected = oracle.loss(pred.numpy(), soft.numpy(), weights.numpy())
    assert MixMoLoss(base)(pred, soft, weights).item() == pytest.approx(expected, rel=1e-5)
    ensemble = MixMoLoss(base)(pred[:, 0], soft[:, 0]).item()
    losses = [
        oracle.cross_entropy(p, t)
        for p, t in zip(pred[:, 0].numpy(), soft[:, 0].numpy(), strict=True)
    ]
    assert ensemble == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_ensemble_loss_is_the_base_loss(batch, base):
    pred, targets, _ = batch
    loss = MixMoLoss(base)(pred[:, 0], targets[:, 0])
    torch.testing.assert_close(torch.Tensor(loss), F.cross_entropy(pred[:, 0], targets[:, 0]))


def test_hard_and_one_hot_targets_agree(batch):
    pred, targets, weights = batch
    loss = MixMoLoss()
    one_hot = F.one_hot(targets, 5).float()
    torch.testing.assert_close(loss(pred, targets, weights), loss(pred, one_hot, weights))


@pytest.mark.parametrize(("reduction", "shape"), [("none", (6,)), ("sum", ()), ("mean", ())])
def test_reduction(batch, reduction, shape):
    pred, targets, weights = batch
    loss, unreduced = MixMoLoss(), MixMoLoss()
    loss.reduction, unreduced.reduction = reduction, "none"
    values = unreduced(pred, targets, weights)
    expected = {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]
    result = loss(pred, targets, weights)
    assert result.shape == shape
    torch.testing.assert_close(result, expected)
    assert loss.reduction == reduction


def test_reduction_is_restored_after_an_error(batch):
    pred, targets, weights = batch
    loss = MixMoLoss(CrossEntropyLossFlat())
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        loss(pred, targets + 1000, weights)
    assert loss.reduction == "mean"


def test_class_weights_and_label_smoothing_are_kept(batch):
    pred, targets, weights = batch
    class_weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    weighted = MixMoLoss(nn.CrossEntropyLoss(weight=class_weights))
    expected = F.cross_entropy(
        pred.flatten(0, 1), targets.flatten(), weight=class_weights, reduction="none"
    )
    total_weight = class_weights[targets].sum() / 3  # torch's normaliser for one member
    torch.testing.assert_close(
        weighted(pred, targets, weights), (weights * expected.view(6, 3)).sum() / total_weight
    )
    smooth = MixMoLoss(LabelSmoothingCrossEntropy(eps=0.1))
    expected = F.cross_entropy(
        pred.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(
        smooth(pred, targets, weights), (weights * expected.view(6, 3)).sum(1).mean()
    )


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
def test_loss_of_one_member_equals_the_base_loss(batch, base):
    pred = batch[0][:, :1].log_softmax(-1)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])[:, None]
    expected = torch.Tensor(base(pred[:, 0], targets[:, 0]))
    actual = torch.Tensor(MixMoLoss(base)(pred, targets, torch.ones(6, 1)))
    torch.testing.assert_close(actual, expected)


def test_ignored_targets_do_not_count(batch):
    pred, targets, weights = batch
    ignored = torch.cat([targets, torch.full_like(targets, -100)])
    actual = MixMoLoss()(pred.repeat(2, 1, 1), ignored, weights.repeat(2, 1))
    torch.testing.assert_close(actual, MixMoLoss()(pred, targets, weights))


def test_column_of_class_indices_is_not_soft_targets(batch):
    pred, targets, weights = batch
    loss = MixMoLoss(CrossEntropyLossFlat())
    actual = loss(pred, targets[..., None], weights)
    torch.testing.assert_close(actual, loss(pred, targets, weights))
    single = loss(pred[:, 0], targets[:, :1])
    torch.testing.assert_close(single, loss(pred[:, 0], targets[:, 0]))


def test_multi_label_base(batch):
    pred, _, weights = batch
    labels = (torch.rand(6, 3, 5) < 0.4).float()
    expected = F.binary_cross_entropy_with_logits(pred, labels, reduction="none").mean(2)
    loss = MixMoLoss(BCEWithLogitsLossFlat())(pred, labels, weights)
    torch.testing.assert_close(torch.Tensor(loss), (weights * expected).sum(1).mean())


def value_and_gradient(loss, pred, *args):
    pred = pred.clone().requires_grad_()
    value = torch.Tensor(loss(pred, *args))
    return value.detach(), torch.autograd.grad(value, pred)[0]


@pytest.mark.parametrize("base", [*FASTAI_LOSSES_WITH_CLASS_WEIGHTS, *CUSTOM_LOSSES])
def test_gradient_of_one_member_equals_that_of_the_base(batch, base):
    pred, targets, _ = batch
    expected = value_and_gradient(base, pred[:, 0], targets[:, 0])
    actual = value_and_gradient(MixMoLoss(base), pred[:, :1], targets[:, :1], torch.ones(6, 1))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1][:, 0], expected[1])


@pytest.mark.parametrize("base", [*FASTAI_LOSSES_WITH_CLASS_WEIGHTS, *CUSTOM_LOSSES])
def test_equal_weights_equal_the_base_loss_of_all_samples(batch, base):
    pred, targets, _ = batch
    base_results = value_and_gradient(base, pred.flatten(0, 1), targets.flatten())
    is_sum = getattr(base, "reduction", None) == "sum" or base in (
        CUSTOM_LOSSES[1],
        CUSTOM_LOSSES[-1],
    )
    results = value_and_gradient(MixMoLoss(base), pred, targets, torch.ones(6, 3))
    for actual, expected in zip(results, base_results, strict=True):
        factor = 1 if is_sum else 3
        torch.testing.assert_close(actual, (factor * expected).reshape(actual.shape))


@pytest.mark.parametrize(
    "base",
    [
        nn.BCEWithLogitsLoss(reduction="sum"),
        nn.MSELoss(reduction="sum"),
        nn.KLDivLoss(reduction="sum"),
        MSELossFlat(reduction="sum"),
        BCEWithLogitsLossFlat(reduction="sum"),
    ],
)
def test_sum_reduction_of_elementwise_losses(batch, base):
    pred = batch[0]
    targets = torch.rand_like(pred)
    expected = value_and_gradient(base, pred[:, 0], targets[:, 0])
    actual = value_and_gradient(MixMoLoss(base), pred[:, :1], targets[:, :1], torch.ones(6, 1))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1][:, 0], expected[1])


def test_label_smoothing_with_class_weights_equals_the_formula(batch):
    """Class weights apply to the target term, but not to the uniform term."""
    pred, targets, weights = batch
    uniform_term = -0.1 * pred.log_softmax(2).mean(2)
    target_term = F.nll_loss(
        pred.log_softmax(2).flatten(0, 1), targets.flatten(), CLASS_WEIGHTS, reduction="none"
    ).view(6, 3)
    total_weight = CLASS_WEIGHTS[targets].sum() / 3
    expected = (weights * uniform_term).sum(1).mean()
    expected += 0.9 * (weights * target_term).sum() / total_weight
    loss = MixMoLoss(LabelSmoothingCrossEntropyFlat(weight=CLASS_WEIGHTS))
    torch.testing.assert_close(loss(pred, targets, weights), expected)
    mixed = loss(pred, targets, weights, (targets + 1) % 5, torch.ones(6, 3))
    torch.testing.assert_close(mixed, expected)


def test_loss_without_reduction_is_weighted_per_sample(batch):
    pred, targets, weights = batch
    expected = value_and_gradient(MixMoLoss(), pred, targets, weights)
    for base in (
        CUSTOM_LOSSES[0],
        lambda p, t: F.nll_loss(p.log_softmax(1), t),
        DataDependentLoss(),
    ):
        loss = MixMoLoss(base)
        for _ in range(12):  # more batches than are checked
            actual = value_and_gradient(loss, pred, targets, weights)
            torch.testing.assert_close(actual, expected)


def test_mixed_labels_of_a_loss_without_reduction(batch):
    pred, targets, weights = batch
    msda_targets = (targets + 1) % 5, torch.rand(6, 3)
    actual = MixMoLoss(CUSTOM_LOSSES[0])(pred, targets, weights, *msda_targets)
    torch.testing.assert_close(actual, MixMoLoss()(pred, targets, weights, *msda_targets))


def test_per_sample_losses_for_interpretation(batch):
    pred, targets, _ = batch
    loss = MixMoLoss(CUSTOM_LOSSES[0])
    loss.reduction = "none"
    expected = F.cross_entropy(pred[:, 0], targets[:, 0], reduction="none")
    torch.testing.assert_close(loss(pred[:, 0], targets[:, 0]), expected)


BATCH_DEPENDENT_LOSSES = [
    lambda pred, targets: F.cross_entropy(pred, targets, weight=CLASS_WEIGHTS),
    lambda pred, targets: F.cross_entropy(pred - pred.mean(0), targets),
    lambda pred, targets: F.cross_entropy(pred / pred.std(0), targets),  # nan for one sample
    lambda pred, targets: F.cross_entropy(F.dropout(pred), targets),
]


@pytest.mark.parametrize("base", BATCH_DEPENDENT_LOSSES)
def test_batch_dependent_losses_are_rejected(batch, base):
    pred, targets, weights = batch
    with pytest.raises(InputError, match=r"'<lambda>' is not the mean or the sum.*\n.*weight_root"):
        MixMoLoss(base)(pred, targets, weights)
    with pytest.raises(InputError, match="msda=None"):
        MixMoLoss(base)(pred, targets, torch.ones(6, 3), targets, torch.ones(6, 3))


@pytest.mark.parametrize("base", BATCH_DEPENDENT_LOSSES[:3])
@pytest.mark.parametrize("num_members", [1, 3])
def test_batch_dependent_losses_work_with_equal_weights(batch, base, num_members):
    pred, targets = (tensor[:, :num_members] for tensor in batch[:2])
    expected = sum(base(pred[:, i], targets[:, i]) for i in range(num_members))
    actual = MixMoLoss(base)(pred, targets, torch.ones(6, num_members))
    torch.testing.assert_close(actual, expected)


def test_one_batch_can_reveal_a_batch_dependent_loss(batch):
    """A loss with class weights looks like a mean over samples until a rare class occurs."""
    pred, _, _ = batch
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0])

    def base(pred, targets):
        return F.cross_entropy(pred, targets, weight=weight)

    without_rare_class = torch.arange(18).reshape(6, 3) % 4
    with_rare_class = torch.where(torch.arange(6)[:, None] == 0, 4, without_rare_class)
    loss = MixMoLoss(base)
    for step in range(15):
        targets = without_rare_class if step in (0, 9) else with_rare_class
        expected = sum(base(pred[:, i], targets[:, i]) for i in range(3))
        torch.testing.assert_close(loss(pred, targets, torch.ones(6, 3)), expected)


def test_zero_losses_do_not_decide_the_reduction():
    def base(pred, targets):
        return (pred - targets).square().sum() / len(pred)

    loss, ones = MixMoLoss(base), torch.ones(4, 2)
    pred = torch.randn(4, 2, 3)
    assert loss(pred, pred, ones) == 0
    targets = torch.randn(4, 2, 3)
    expected = sum(base(pred[:, i], targets[:, i]) for i in range(2))
    torch.testing.assert_close(loss(pred, targets, ones), expected)


def test_checks_restore_the_rng_state(batch):
    before = torch.get_rng_state()
    with pytest.raises(InputError):
        MixMoLoss(BATCH_DEPENDENT_LOSSES[3])(*batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_loss_raises_no_error(batch):
    """A nan loss is returned, for fastai's callbacks to handle; the next batch is checked again."""
    pred, targets, weights = batch
    loss = MixMoLoss(CUSTOM_LOSSES[0])
    assert loss(pred * torch.nan, targets, weights).isnan()
    torch.testing.assert_close(loss(*batch), MixMoLoss()(*batch))


def test_batchmean_reduction_of_kl_divergence():
    random = torch.Generator().manual_seed(0)
    pred = torch.randn(6, 3, 5, generator=random).log_softmax(2)
    targets = torch.randn(6, 3, 5, generator=random).softmax(2)
    divergences = (targets * (targets.log() - pred)).sum(2)
    weights = loss_weights(draw_lam(6, 3, 2.0, generator=random), 3)
    for base in (nn.KLDivLoss(reduction="batchmean"), partial(F.kl_div, reduction="batchmean")):
        actual = MixMoLoss(base)(pred, targets, weights)
        torch.testing.assert_close(actual, (weights * divergences).sum(1).mean())
