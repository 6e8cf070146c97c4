import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
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
