import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.optimizer import Adam
from oracle import exponential_average
from synthetic import mixmo_dls

from mixmo_fastai import EMACallback, mixmo_learner
from mixmo_fastai.errors import InputError

DECAY = 0.8


def make_learner(ema=None, *cbs):
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, cbs=[*([ema] if ema else []), *cbs])
    learn.remove_cb(learn.progress)
    return learn


def float_tensors(model):
    state = model.state_dict()
    return {name: t.clone() for name, t in state.items() if t.is_floating_point()}


class WeightRecorder(Callback):
    """Record the weights after each step and those used in validation."""

    order, run_valid = 0, True

    def __init__(self):
        super().__init__()
        self.steps, self.validated = [], []

    def before_train(self):
        if not self.steps:
            self.steps.append(float_tensors(self.learn.model))

    def after_batch(self):
        if self.training:
            self.steps.append(float_tensors(self.learn.model))
        else:
            self.validated.append(float_tensors(self.learn.model))


def all_equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def fit(learn, epochs):
    with learn.no_logging():
        learn.fit(epochs, 0.05)


def test_averages_match_the_oracle():
    recorder = WeightRecorder()
    learn = make_learner(EMACallback(DECAY), recorder)
    fit(learn, 2)
    start, *steps = recorder.steps
    final = float_tensors(learn.model)
    assert not all_equal(final, steps[-1])
    for name, tensor in final.items():
        series = [step[name].double().numpy() for step in steps]
        expected = exponential_average(start[name].double().numpy(), series, DECAY)
        assert np.allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-6), name


def test_averaging_does_not_change_training():
    with_average, without = WeightRecorder(), WeightRecorder()
    fit(make_learner(EMACallback(DECAY), with_average), 2)
    fit(make_learner(None, without), 2)
    assert len(with_average.steps) == len(without.steps)
    assert all(all_equal(a, b) for a, b in zip(with_average.steps, without.steps, strict=True))


def test_validation_uses_the_averages():
    recorder = WeightRecorder()
    learn = make_learner(EMACallback(DECAY), recorder)
    fit(learn, 1)
    assert recorder.validated
    assert all(all_equal(seen, float_tensors(learn.model)) for seen in recorder.validated)


def test_zero_decay_keeps_the_last_weights():
    recorder = WeightRecorder()
    learn = make_learner(EMACallback(0.0), recorder)
    fit(learn, 1)
    assert all_equal(float_tensors(learn.model), recorder.steps[-1])


def test_validation_and_lr_find_do_not_change_the_averages(tmp_path):
    class NestedValidation(Callback):
        run_valid = False

        def after_epoch(self):
            if self.learn.epoch == 0 and not hasattr(self.learn, "nested"):
                self.learn.nested = True
                self.learn.validate()
                del self.learn.nested

    plain, nested = make_learner(EMACallback(DECAY)), make_learner(EMACallback(DECAY))
    nested.path = tmp_path
    with nested.no_logging(), nested.no_bar():
        nested.lr_find(num_it=8, show_plot=False, suggest_funcs=())
        nested.validate()
    nested.add_cb(NestedValidation())
    fit(plain, 2)
    fit(nested, 2)
    assert all_equal(float_tensors(plain.model), float_tensors(nested.model))


def test_early_stopping_leaves_the_averages():
    recorder = WeightRecorder()
    learn = make_learner(EMACallback(DECAY), recorder)
    learn.add_cb(EarlyStoppingCallback(monitor="valid_loss", min_delta=1e9, patience=1))
    fit(learn, 9)
    assert len(recorder.steps) < 1 + 4 * len(learn.dls.train)
    assert not all_equal(float_tensors(learn.model), recorder.steps[-1])
    assert all_equal(float_tensors(learn.model), recorder.validated[-1])


class Interrupt(Callback):
    """Raise an error after the first batch of validation or of training."""

    def __init__(self, error, training):
        super().__init__()
        self.error, self.in_training = error, training

    def after_batch(self):
        if self.training == self.in_training:
            raise self.error


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


def test_training_cancelled_in_validation_leaves_the_averages():
    recorder = WeightRecorder()
    interrupt = Interrupt(CancelFitException, False)
    learn = make_learner(EMACallback(DECAY), recorder, interrupt)
    fit(learn, 2)
    learn.remove_cb(interrupt)
    final = float_tensors(learn.model)
    assert all_equal(final, recorder.validated[-1])
    assert not all_equal(final, recorder.steps[-1])
    with learn.no_logging():
        learn.validate()
    assert all_equal(float_tensors(learn.model), final)


def test_save_model_callback_saves_the_averages(tmp_path):
    recorder = WeightRecorder()
    learn = make_learner(EMACallback(DECAY), recorder, SaveModelCallback(monitor="valid_loss"))
    learn.path = tmp_path
    with learn.no_logging(), redirect_stdout(io.StringIO()):
        learn.fit(2, 0.05)
    assert any(all_equal(float_tensors(learn.model), seen) for seen in recorder.validated)


def test_get_preds_within_an_epoch_does_not_change_the_averages():
    class PredictWithinEpoch(Callback):
        order, run_valid = 1000, False

        def after_batch(self):
            if self.learn.iter == 2 and not hasattr(self.learn, "gather_preds"):
                before = {
                    name: getattr(self.learn, name)
                    for name in ("dl", "iter", "n_iter", "pct_train")
                }
                self.learn.get_preds(inner=True)
                for name, value in before.items():
                    setattr(self.learn, name, value)
                self.learn.training = self.learn.model.train().training

    plain, nested = (
        make_learner(EMACallback(DECAY)),
        make_learner(EMACallback(DECAY), PredictWithinEpoch()),
    )
    recorders = WeightRecorder(), WeightRecorder()
    plain.add_cb(recorders[0])
    nested.add_cb(recorders[1])
    fit(plain, 1)
    fit(nested, 1)
    # The inner pass also triggers validation events, but the optimizer steps are equal.
    assert all_equal(recorders[0].steps[-1], recorders[1].steps[-1])
    assert all_equal(float_tensors(plain.model), float_tensors(nested.model))


def test_skipped_steps_are_not_counted():
    class Skip(Callback):
        run_valid = False

        def before_step(self):
            if self.learn.iter % 2 == 0:
                raise CancelStepException

    ema, recorder = EMACallback(DECAY), WeightRecorder()
    learn = make_learner(ema, recorder, Skip())

    class Count(Callback):
        run_valid = False

        def after_train(self):
            self.learn.counted = ema.num_steps

    learn.add_cb(Count())
    fit(learn, 1)
    assert learn.counted == len(learn.dls.train) // 2


def test_averages_of_bfloat16_weights_are_float32():
    ema = EMACallback(0.999)
    learn = make_learner(ema)
    learn.model.bfloat16()
    ema.before_fit()
    ema.before_train()
    assert {average.dtype for average in ema.averages.values()} == {torch.float32}
    start = {name: average.clone() for name, average in ema.averages.items()}
    with torch.no_grad():
        for parameter in learn.model.parameters():
            parameter.add_(1.0)
    ema.num_steps = 10_000  # late enough for a decay of 0.999
    ema.after_step()
    name = "heads.0.bias"
    assert (ema.averages[name] - start[name]).mean().item() == pytest.approx(1e-3, rel=0.1)


def test_second_fit_starts_from_the_averages():
    recorder = WeightRecorder()
    learn = make_learner(EMACallback(DECAY))
    fit(learn, 1)
    after_first = float_tensors(learn.model)
    learn.add_cb(recorder)
    fit(learn, 1)
    assert all_equal(recorder.steps[0], after_first)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2, float("nan"), "x", None])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(InputError, match="decay must be at least 0 and below 1"):
        EMACallback(decay)


def test_the_state_of_another_network_is_refused():
    ema = EMACallback(DECAY)
    learn = make_learner(ema)
    state = {name: tensor[:1] for name, tensor in float_tensors(learn.model).items() if tensor.ndim}
    with pytest.raises(InputError, match="another network"):
        ema.load_state_tensors(state, learn.model.state_dict())
