"""Member logits in a validation: kept for metrics, invisible to everything else."""

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.metrics import accuracy
from synthetic import fastai_dls
from torch import nn

from mixmo_fastai import member_preds, mixmo_learner, to_mixmo
from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.metrics.fastai import Disagreement, MemberAccuracy
from mixmo_fastai.metrics.members import MemberLogits


def make_learner(*cbs, num_members=2):
    metrics = [accuracy, MemberAccuracy(), Disagreement()]
    mix = "cutmix" if num_members == 2 else "sum"
    learn = mixmo_learner(
        fastai_dls(),
        "wrn10_1",
        loss_func=nn.CrossEntropyLoss(),
        metrics=metrics,
        mix=mix,
        num_members=num_members,
        cbs=cbs,
        seed=1,
    )
    learn.remove_cb(learn.progress)
    return learn


class Observer(Callback):
    """Record what other callbacks see in validation."""

    run_train = False

    def __init__(self, order):
        super().__init__()
        self.order, self.seen = order, []

    def before_batch(self):
        assert self.x.ndim == 4
        assert len(self.xb) == 1

    def after_pred(self):
        self.seen.append(self.pred.clone())
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.pred)

    def after_batch(self):
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.pred)
        assert len(self.xb) == 1
        assert torch.equal(self.learn.member_logits.logits.mean(dim=1), self.pred)


@pytest.mark.parametrize("order", [-99, 0, 9, 999])
def test_other_callbacks_see_the_predictions_of_the_ensemble(order):
    observer = Observer(order)
    learn = make_learner(observer)
    learn.validate()
    learn.model.eval()
    with torch.no_grad():
        expected = [learn.model(x) for x, _ in learn.dls.valid]
    assert len(observer.seen) == len(expected) > 1
    assert all(torch.equal(*pair) for pair in zip(observer.seen, expected, strict=True))


@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_metrics_of_members_need_no_second_pass(num_members):
    learn, num_passes = make_learner(num_members=num_members), 0

    def count(*_):
        nonlocal num_passes
        num_passes += 1

    learn.model.heads[0].register_forward_hook(count)
    with_callback = learn.validate()
    assert num_passes == len(learn.dls.valid)
    learn.remove_cbs([MixMoCallback, MemberLogits])
    without = learn.validate()
    num_metrics = 2 if num_members > 1 else 1  # Disagreement of one member is nan without logits
    assert num_passes == (2 + num_metrics) * len(learn.dls.valid)
    assert with_callback[:3] == without[:3]
    assert num_members == 1 or with_callback[3] == without[3]


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_learner_that_lost_the_callback_gets_it_again(run):
    learn = make_learner()
    learn.remove_cb(MemberLogits)
    learn.fit(1, 0.01) if run == "fit" else learn.validate()
    assert sum(isinstance(cb, MemberLogits) for cb in learn.cbs) == 1


def test_a_converted_learner_has_the_callback():
    learn = make_learner()
    learn.model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    learn.remove_cbs([MixMoCallback, MemberLogits])
    to_mixmo(learn)
    assert sum(isinstance(cb, MemberLogits) for cb in learn.cbs) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelBatchException])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss"])
def test_after_an_interruption_the_network_returns_the_ensemble(error, event):
    def stop(self):
        raise error

    learn = make_learner()
    learn.metrics = []
    interrupting = type("Interrupting", (Callback,), {"run_train": False, event: stop})()
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, 0.01, cbs=interrupting)
    else:
        learn.fit(1, 0.01, cbs=interrupting)
        assert learn.member_logits.logits is None
    assert learn.model.eval()(torch.zeros(2, 3, 8, 8)).ndim == 2


def test_a_forward_pass_of_the_user_needs_no_further_argument():
    learn = make_learner()
    expected = learn.validate()
    original = learn.model.forward
    learn.model.forward = lambda inputs, masks=None: original(inputs, masks)
    assert learn.validate() == expected


def test_member_preds_do_not_change_the_learner():
    learn = make_learner()
    expected = member_preds(learn).probabilities
    learn.remove_cb(MemberLogits)
    callbacks = list(learn.cbs)
    assert torch.equal(member_preds(learn).probabilities, expected)
    assert list(learn.cbs) == callbacks


@pytest.mark.slow
def test_a_compiled_network_gives_its_members():
    learn = make_learner()
    expected = learn.validate()
    torch._dynamo.reset()
    try:
        learn.model = torch.compile(learn.model, backend="eager", fullgraph=True)
        assert learn.validate() == expected
    finally:
        torch._dynamo.reset()
