"""The recorded loss is that of each member; its gradient is that of their sum."""

import fastai.callback.fp16
import oracle
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from learners import make_learner

from mixmo_fastai.callbacks.deferred import DeferredRecorder, defer_readbacks
from mixmo_fastai.callbacks.mixmo import MixMoCallback


class LossRecorder(Callback):
    """Record the batch, loss and gradients of each step."""

    order, run_valid = 40, False  # before the Recorder

    def __init__(self):
        super().__init__()
        self.batches, self.losses, self.gradients = [], [], []

    def after_pred(self):
        self.batches.append((self.learn.pred.detach().clone(), *self.learn.yb))

    def before_step(self):
        self.gradients.append([p.grad.clone() for p in self.learn.model.parameters()])

    def after_batch(self):
        self.losses.append(self.learn.loss.detach())


class TestRecordedLoss:
    @pytest.mark.parametrize("num_members", [1, 2, 3])
    @pytest.mark.parametrize("recorder", [Recorder, DeferredRecorder])
    def test_recorded_loss_is_per_member(self, num_members, recorder):
        loss_recorder = LossRecorder()
        mix = "sum" if num_members == 1 else "cutmix"
        learn = make_learner(
            cbs=[loss_recorder], num_members=num_members, callback=MixMoCallback(mix, seed=0)
        )
        if recorder is DeferredRecorder:
            defer_readbacks(learn)
        learn.fit(1, 0.01)
        assert type(learn.recorder) is recorder
        expected = [
            oracle.loss(*(part.numpy() for part in batch)) / num_members
            for batch in loss_recorder.batches
        ]
        assert [loss.item() for loss in loss_recorder.losses] == pytest.approx(expected, rel=1e-5)
        smooth, count = 0.0, 0
        for value, found in zip(expected, learn.recorder.losses, strict=True):
            smooth, count = 0.02 * value + 0.98 * smooth, count + 1
            assert found.item() == pytest.approx(smooth / (1 - 0.98**count), rel=1e-4)
        assert learn.recorder.values[0][0] == pytest.approx(learn.recorder.losses[-1].item())

    @pytest.mark.parametrize("num_members", [2, 3])
    def test_gradient_is_that_of_the_sum_over_members(self, num_members):
        recorder = LossRecorder()
        learn = make_learner(cbs=[recorder], num_members=num_members)

        class ByHand(Callback):
            order = 41

            def before_step(self):
                loss = learn.loss_func(learn.model(*learn.xb), *learn.yb)
                by_hand = torch.autograd.grad(loss, [*learn.model.parameters()])
                for actual, expected in zip(recorder.gradients[-1], by_hand, strict=True):
                    assert torch.equal(actual, expected)

        learn.fit(1, 0.01, cbs=ByHand())
        assert len(recorder.gradients) == len(learn.dls.train)

    @pytest.mark.parametrize("num_members", [1, 2, 4])
    def test_recorded_loss_is_comparable_with_the_validation_loss(self, num_members):
        mix = "sum" if num_members == 1 else "cutmix"
        learn = make_learner(num_members=num_members, callback=MixMoCallback(mix, seed=0))
        learn.fit(1, 0.0)
        train, valid, *_ = learn.recorder.values[0]
        assert train == pytest.approx(valid, rel=0.4)

    def test_lr_find_records_the_loss_per_member(self, tmp_path):
        recorder = LossRecorder()
        learn = make_learner(cbs=[recorder], path=tmp_path)
        learn.lr_find(show_plot=False, num_it=10, start_lr=1e-8, end_lr=1e-7)
        losses = [oracle.loss(*(part.numpy() for part in batch)) / 2 for batch in recorder.batches]
        assert learn.recorder.losses[0].item() == pytest.approx(losses[0], rel=1e-4)

    def test_callbacks_monitor_the_recorded_loss(self):
        """`min_delta` distinguishes the recorded loss from the sum over members."""
        watch = EarlyStoppingCallback(monitor="train_loss", min_delta=0.2, patience=1)
        learn = make_learner(cbs=[watch])
        learn.fit(3, 0.0)
        assert watch.best == pytest.approx(learn.recorder.values[0][0])
        assert watch.best < 1.6  # ln 3 is 1.1
        assert learn.epoch == 1

    def test_terminate_on_nan_callback_stops_training(self):
        class Fail(Callback):
            order, run_valid = 8, False

            def after_loss(self):
                if self.learn.train_iter == 3:
                    self.learn.loss = self.learn.loss * float("inf")

        learn = make_learner(cbs=[Fail(), TerminateOnNaNCallback()])
        learn.fit(2, 0.01)
        assert learn.train_iter < len(learn.dls.train)

    def test_accumulated_gradients_are_those_of_the_sum_over_batches(self):
        """Make one step per two batches; with a learning rate of 0 the weights do not change."""
        recorder = LossRecorder()
        accumulated = make_learner(cbs=[recorder, GradientAccumulation(96)])
        accumulated.fit(1, 0.0)
        plain = LossRecorder()
        make_learner(cbs=[plain]).fit(1, 0.0)
        assert [*map(float, recorder.losses)] == pytest.approx(
            [*map(float, plain.losses)], rel=1e-5
        )
        for together, first, second in zip(
            recorder.gradients[0], plain.gradients[0], plain.gradients[1], strict=True
        ):
            torch.testing.assert_close(together, (first + second) / 2, rtol=1e-3, atol=1e-5)

    def test_recorded_loss_in_mixed_precision(self, monkeypatch):
        monkeypatch.setattr(
            fastai.callback.fp16, "autocast", lambda *_, dtype: torch.autocast("cpu", dtype=dtype)
        )
        recorder = LossRecorder()
        make_learner(cbs=[recorder]).to_bf16().fit(1, 0.0)
        expected = [
            oracle.loss(*(part.numpy() for part in batch)) / 2 for batch in recorder.batches
        ]
        assert [loss.item() for loss in recorder.losses] == pytest.approx(expected, rel=1e-4)
