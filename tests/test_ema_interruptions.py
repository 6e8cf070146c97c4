"""`EMACallback` after interruptions, and beside callbacks that change weights."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import Adam
from synthetic import mixmo_dls
from test_ema import (
    DECAY,
    Interrupt,
    WeightRecorder,
    all_equal,
    fit,
    float_tensors,
    make_learner,
)

from mixmo_fastai import EMACallback, mixmo_learner


@pytest.mark.parametrize("training", [False, True])
def test_weights_loaded_after_an_interruption_are_kept(training):
    interrupt = Interrupt(KeyboardInterrupt, training)
    learn = make_learner(EMACallback(DECAY), interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 1)
    learn.remove_cb(interrupt)
    loaded = {name: torch.full_like(t, 0.5) for name, t in learn.model.state_dict().items()}
    learn.model.load_state_dict(loaded)
    learn.remove_cb(learn.progress) if hasattr(learn, "progress") else None
    with learn.no_logging():
        learn.validate()
    assert all(bool((p == 0.5).all()) for p in learn.model.parameters())
    recorder = WeightRecorder()
    learn.add_cb(recorder)
    fit(learn, 1)
    assert all(bool((tensor == 0.5).all()) for tensor in recorder.steps[0].values())


@pytest.mark.parametrize("predict", [False, True])
def test_a_fit_after_an_interruption_starts_from_the_training_weights(predict):
    interrupt, recorder = Interrupt(KeyboardInterrupt, True), WeightRecorder()
    interrupt.order = 90  # the step is complete
    learn = make_learner(EMACallback(DECAY), interrupt, recorder)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 1)
    learn.remove_cbs([interrupt, recorder])
    last = float_tensors(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.get_preds() if predict else learn.validate()
    assert not all_equal(float_tensors(learn.model), last)  # the averages
    again = WeightRecorder()
    again.order = 90  # after EMACallback
    learn.add_cb(again)
    fit(learn, 1)
    assert all_equal(again.steps[0], last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("again", ["validate", "fit"])
def test_weights_trained_after_an_interruption_without_the_callback_are_kept(training, again):
    ema, interrupt = EMACallback(DECAY), Interrupt(KeyboardInterrupt, training)
    # fastai's optimizers write to the parameters' .data, which autograd does not count.
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, opt_func=Adam)
    learn.remove_cb(learn.progress)
    with pytest.raises(KeyboardInterrupt), learn.added_cbs([ema, interrupt]):
        learn.fit(1, 0.01)
    learn.remove_cbs([ema, interrupt])
    fit(learn, 1)
    trained, recorder = float_tensors(learn.model), WeightRecorder()
    recorder.order = 90  # after EMACallback
    with learn.no_logging(), learn.added_cbs([ema, recorder]):
        learn.validate() if again == "validate" else learn.fit(1, 0.01)
    seen = recorder.validated if again == "validate" else recorder.steps
    assert all_equal(seen[0], trained)


@pytest.mark.parametrize("event", ["after_pred", "before_backward", "after_step", "after_batch"])
@pytest.mark.parametrize("opt_func", [Adam, None])
def test_a_validation_after_an_interruption_uses_the_averages(event, opt_func):
    class InterruptAt(Callback):
        order, run_valid = 90, False

        def __call__(self, name):
            if name == event and self.learn.training and self.learn.iter == 2:
                raise KeyboardInterrupt

    ema, interrupt, recorder = EMACallback(DECAY), InterruptAt(), WeightRecorder()
    given = {} if opt_func is None else {"opt_func": opt_func}
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, cbs=ema, **given)
    learn.remove_cb(learn.progress)
    with pytest.raises(KeyboardInterrupt), learn.added_cbs([interrupt]):
        learn.fit(1, 0.01)
    learn.remove_cb(interrupt)
    averages = {name: tensor.clone() for name, tensor in ema.averages.items()}
    with learn.no_logging(), learn.added_cbs([recorder]):
        learn.validate()
    assert all_equal(averages, recorder.validated[0])


def test_a_forward_pass_after_validation_does_not_end_the_average():
    class Recalibrate(Callback):
        order = 60

        def after_validate(self):
            self.learn.model.train()(torch.randn(4, 3, 8, 8))  # changes running statistics

    plain, other = WeightRecorder(), WeightRecorder()
    fit(make_learner(EMACallback(DECAY), plain), 2)
    fit(make_learner(EMACallback(DECAY), other, Recalibrate()), 2)
    assert all_equal(plain.validated[-1], other.validated[-1])


@pytest.mark.parametrize("order", [0, 60])
def test_a_validation_within_an_epoch_uses_the_averages(order):
    class ValidateWithinEpoch(Callback):
        run_valid = False

        def after_batch(self):
            if self.learn.iter == 2:
                names = ("dl", "iter", "n_iter", "pct_train", "xb", "yb", "pred", "loss")
                before = {name: getattr(self.learn, name) for name in names}
                self.averages = {name: value.clone() for name, value in ema.averages.items()}
                self.learn.get_preds(inner=True)
                for name, value in before.items():
                    setattr(self.learn, name, value)
                self.learn.training = self.learn.model.train().training

    within, recorder, ema = ValidateWithinEpoch(), WeightRecorder(), EMACallback(DECAY)
    within.order = order
    learn = mixmo_learner(
        mixmo_dls(), "wrn10_1", seed=0, opt_func=Adam, cbs=[ema, within, recorder]
    )
    learn.remove_cb(learn.progress)
    fit(learn, 1)
    assert all_equal(within.averages, recorder.validated[0])


def test_the_averages_are_validated_although_a_later_callback_writes_to_the_weights():
    class Clip(Callback):
        order, run_valid = 60, False

        @torch.no_grad()
        def after_batch(self):
            for parameter in self.learn.model.parameters():
                parameter.clamp_(-100, 100)  # changes no value

    plain, clipped = WeightRecorder(), WeightRecorder()
    fit(make_learner(EMACallback(DECAY), plain), 2)
    fit(make_learner(EMACallback(DECAY), clipped, Clip()), 2)
    assert all_equal(clipped.validated[-1], plain.validated[-1])


def test_weights_loaded_between_two_epochs_are_kept():
    class Load(Callback):
        order = 61

        def after_epoch(self):
            if self.learn.epoch == 0:
                state = self.learn.model.state_dict()
                self.learn.model.load_state_dict(
                    {n: torch.full_like(t, 2) for n, t in state.items()}
                )

    class RecordStart(Callback):
        order = 90

        def before_train(self):
            starts.append(float_tensors(self.learn.model))

    starts: list = []
    fit(make_learner(EMACallback(DECAY), Load(), RecordStart()), 2)
    assert all(bool((tensor == 2).all()) for tensor in starts[1].values())
