"""fastai metrics: equal to `evaluate_logits` on the same logits, however they are batched."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from synthetic import mixmo_dls
from test_summary import draw_logits
from torch import nn

from mixmo_fastai import mixmo_learner
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.fastai import ECE, NLL, Brier, Disagreement, MemberAccuracy
from mixmo_fastai.metrics.members import MemberLogits
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.models import MixMoModel

NUM_SAMPLES = 150
OF_ENSEMBLE = ("nll", "brier", "ece")
KINDS = [NLL, Brier, ECE, MemberAccuracy, Disagreement]


class Stored(MixMoModel):
    """A network whose images (B, M, K) are the logits of its members."""

    def __init__(self, num_members):
        members = [nn.Conv2d(1, 1, 1) for _ in range(num_members)]
        super().__init__(members, nn.Identity(), [nn.Linear(1, 1) for _ in range(num_members)])

    def member_logits(self, x):
        return x


class Unchanged(nn.Module):
    """A plain network whose inputs are its logits."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


def keep(values, cpu):
    return values


def validated(model, inputs, targets, batch_size, metrics, loss=None, cbs=None):
    loader = DataLoader(list(zip(inputs, targets, strict=True)), bs=batch_size, num_workers=0)
    dls = DataLoaders(loader, loader, device=torch.device("cpu"))
    learn = Learner(dls, model, loss or nn.CrossEntropyLoss(), metrics=metrics, cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        values = learn.validate()[1:]
    return dict(zip(learn.metrics.attrgot("name"), values, strict=True)), learn


def expected_values(member_logits, labels):
    found = evaluate_logits(member_logits, labels)
    members = found["member_accuracy"]
    return {**found, "member_accuracy": sum(members) / len(members)}


@pytest.mark.parametrize("cbs", [None, MemberLogits()], ids=["second pass", "one pass"])
@pytest.mark.parametrize("num_members", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_they_equal_evaluate_logits(num_members, batch_size, cbs):
    member_logits, labels = draw_logits(NUM_SAMPLES, num_members, 6, signal=1.0)
    metrics = [kind() for kind in KINDS]
    network = Stored(num_members)
    found, _ = validated(network, member_logits, labels, batch_size, metrics, cbs=cbs)
    expected = expected_values(member_logits, labels)
    assert list(found) == ["nll", "brier", "ece", "member_accuracy", "disagreement"]
    if num_members == 1:
        assert math.isnan(found.pop("disagreement"))
        assert "disagreement" in expected["absent"]
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
        assert value > 0
    # On the very logits that the Learner has, without the rounding of their mean to float32.
    of_learner = evaluate_logits(member_logits.mean(dim=1, keepdim=True), labels)
    for name in OF_ENSEMBLE:
        assert found[name] == pytest.approx(of_learner[name], rel=1e-13), name


def own_loss(pred, target):
    return (pred.logsumexp(dim=1) - pred.gather(1, target[:, None])[:, 0]).mean()


LOSSES = [
    CrossEntropyLossFlat(),
    nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.arange(1.0, 7.0)),
    LabelSmoothingCrossEntropyFlat(),
    FocalLossFlat(),
    F.cross_entropy,
    own_loss,
]


@pytest.mark.parametrize("loss", LOSSES, ids=[type(loss).__name__ for loss in LOSSES])
def test_without_mixmo_and_with_any_loss_of_softmax_probabilities(loss):
    member_logits, labels = draw_logits(NUM_SAMPLES, 1, 6, signal=1.0)
    metrics = [NLL(), Brier(), ECE()]
    found, _ = validated(Unchanged(), member_logits[:, 0], labels, 64, metrics, loss)
    expected = evaluate_logits(member_logits, labels)
    for name in OF_ENSEMBLE:
        assert found[name] == pytest.approx(expected[name], rel=1e-13), name


def test_nll_is_the_validation_loss_of_cross_entropy():
    member_logits, labels = draw_logits(NUM_SAMPLES, 2, 6)
    found, learn = validated(Stored(2), member_logits, labels, 64, [NLL()])
    assert found["nll"] == pytest.approx(learn.final_record[0], rel=1e-6)


@pytest.mark.parametrize("num_bins", [1, 5, 40])
def test_bins_of_the_ece(num_bins):
    from mixmo_fastai.metrics.calibration import expected_calibration_error

    member_logits, labels = draw_logits(NUM_SAMPLES, 1, 6)
    found, learn = validated(Unchanged(), member_logits[:, 0], labels, 7, [ECE(num_bins)])
    expected = expected_calibration_error(member_logits[:, 0], labels, num_bins).item()
    assert found["ece"] == pytest.approx(expected, rel=1e-13)
    assert learn.metrics[0].sums.shape == (num_bins,)  # whatever the number of samples


def test_too_few_bins_are_refused():
    with pytest.raises(InputError, match="num_bins must be an integer, 1 or more; got 0"):
        ECE(0)


@pytest.mark.parametrize("kind", [NLL, Brier, ECE])
@pytest.mark.parametrize(
    ("targets", "loss", "described"),
    [
        (torch.ones(9, 6), BCEWithLogitsLossFlat(), "float32 targets (B, 6)"),
        (torch.ones(9, 6), nn.CrossEntropyLoss(), "float32 targets (B, 6)"),
        (torch.ones(9, 6), MSELossFlat(), "the loss 'MSELoss'"),
        (torch.zeros(9).long(), nn.MultiMarginLoss(), "the loss 'MultiMarginLoss'"),
        (torch.zeros(9).long(), nn.NLLLoss(), "the loss 'NLLLoss'"),
    ],
)
def test_other_losses_and_targets_are_refused(kind, targets, loss, described):
    logits = draw_logits(9, 1, 6)[0][:, 0]
    with pytest.raises(InputError, match=f"{kind.__name__} needs one class per image") as raised:
        validated(Unchanged(), logits, targets, 4, [kind()], loss)
    assert described in str(raised.value)
    assert f"Remove {kind.__name__}()" in str(raised.value)


@pytest.mark.parametrize("kind", [NLL, Brier, ECE])
def test_other_losses_are_refused_before_a_training_begins(kind):
    class NoStep(Callback):
        def before_train(self):
            pytest.fail("the training has begun")

    loss = nn.BCEWithLogitsLoss()
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", loss_func=loss, metrics=kind(), cbs=NoStep())
    with learn.no_bar(), pytest.raises(InputError) as raised:
        learn.fit(1, 0.05)
    message = str(raised.value)
    assert message.startswith(f"{kind.__name__} needs one class per image")
    assert "got the loss 'BCEWithLogitsLoss'" in message


@pytest.mark.parametrize("kind", [MemberAccuracy, Disagreement])
def test_a_network_without_members_is_refused(kind):
    member_logits, labels = draw_logits(9, 1, 6)
    with pytest.raises(InputError, match="needs a MixMo network; the Learner has a Unchanged"):
        validated(Unchanged(), member_logits[:, 0], labels, 4, [kind()])


def test_disagreement_refuses_several_labels_per_image():
    member_logits, _ = draw_logits(9, 2, 6)
    targets = torch.ones(9, 6)
    with pytest.raises(InputError, match=r"Disagreement needs .* got float32 targets \(B, 6\)"):
        validated(Stored(2), member_logits, targets, 4, [Disagreement()], BCEWithLogitsLossFlat())


@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_waits_for_the_device(kind):
    """On the meta device, which has no values, any read of a value fails."""
    pred, labels = torch.zeros(5, 6, device="meta"), torch.zeros(5, device="meta").long()
    members = MemberLogits()
    members.logits = torch.zeros(5, 3, 6, device="meta")
    learn = SimpleNamespace(
        model=Stored(3), pred=pred, y=labels, cbs=[members], training=False, to_detach=keep
    )
    metric = kind()
    metric.num_seen = 5  # the loss is checked at the first batch only
    metric.accumulate(learn)
    assert metric.num_seen == 10
    assert metric.sums.dtype == torch.float64
    with pytest.raises((RuntimeError, NotImplementedError)):
        metric.value  # noqa: B018


@pytest.mark.parametrize("kind", KINDS)
def test_sums_stay_small_and_start_again(kind):
    member_logits, labels = draw_logits(NUM_SAMPLES, 2, 6)
    metric = kind()
    assert metric.value is None
    found, learn = validated(Stored(2), member_logits, labels, 7, [metric])
    assert metric.sums.numel() <= 15
    again = dict(zip(found, learn.validate()[1:], strict=True))
    assert again == found
    assert pickle.loads(pickle.dumps(metric)).value == metric.value
    metric.reset()
    assert metric.value is None


def test_a_million_samples_do_not_lose_precision():
    """As sums in float32 would, from 2^24 on."""
    metric = MemberAccuracy()
    metric.sums, metric.num_seen = torch.tensor(2.0**24, dtype=torch.float64), 2**24
    members = MemberLogits()
    members.logits = torch.eye(3)[:, None]
    learn = SimpleNamespace(
        model=Stored(1),
        pred=torch.eye(3),
        y=torch.arange(3),
        cbs=[members],
        training=False,
        to_detach=keep,
    )
    metric.accumulate(learn)
    assert metric.value == 1


def test_member_accuracy_pickled_by_version_0_1_0():
    """It comes in exported Learners, with sums of another name."""
    metric = MemberAccuracy.__new__(MemberAccuracy)
    metric.__dict__.update(num_correct=torch.tensor(3.0), num_seen=0)
    assert metric.value is None
    member_logits, labels = draw_logits(NUM_SAMPLES, 2, 6)
    found, _ = validated(Stored(2), member_logits, labels, 64, [metric])
    assert found == pytest.approx(
        {"member_accuracy": expected_values(member_logits, labels)["member_accuracy"]}
    )


def test_training_metrics_are_those_of_the_members():
    class Record(Callback):
        run_valid, order = False, 60

        def __init__(self):
            super().__init__()
            self.pred, self.y = [], []

        def after_batch(self):
            self.pred.append(self.learn.pred.detach())
            self.y.append(self.learn.y)

    record = Record()
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, metrics=[k() for k in KINDS], cbs=record)
    learn.recorder.train_metrics = True
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.05)
    found = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    expected = evaluate_logits(torch.cat(record.pred)[:, None], torch.cat(record.y))
    for name in OF_ENSEMBLE:
        assert found[f"train_{name}"] == pytest.approx(expected[name], rel=1e-12), name
    assert found["train_member_accuracy"] == pytest.approx(expected["accuracy"])
    assert math.isnan(found["train_disagreement"])
    assert 0 <= found["valid_disagreement"] <= 1
