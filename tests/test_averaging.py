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


def learner(ema=None, *cbs):
    made = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, cbs=[*([ema] if ema else []), *cbs])
    made.remove_cb(made.progress)
    return made


def floats(model):
    state = model.state_dict()
    return {name: t.clone() for name, t in state.items() if t.is_floating_point()}


class Record(Callback):
    """Keep the weights after each step, and what each validation saw."""

    order, run_valid = 0, True

    def __init__(self):
        super().__init__()
        self.steps, self.validated = [], []

    def before_train(self):
        if not self.steps:
            self.steps.append(floats(self.learn.model))

    def after_batch(self):
        if self.training:
            self.steps.append(floats(self.learn.model))
        else:
            self.validated.append(floats(self.learn.model))


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def fit(made, epochs):
    with made.no_logging():
        made.fit(epochs, 0.05)


def test_it_is_the_average_of_the_oracle():
    record = Record()
    made = learner(EMACallback(DECAY), record)
    fit(made, 2)
    start, *steps = record.steps
    left = floats(made.model)
    assert not same(left, steps[-1])
    for name, tensor in left.items():
        series = [step[name].double().numpy() for step in steps]
        expected = exponential_average(start[name].double().numpy(), series, DECAY)
        assert np.allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-6), name


def test_training_itself_is_as_without_it():
    with_average, without = Record(), Record()
    fit(learner(EMACallback(DECAY), with_average), 2)
    fit(learner(None, without), 2)
    assert len(with_average.steps) == len(without.steps)
    assert all(same(a, b) for a, b in zip(with_average.steps, without.steps, strict=True))


def test_validation_sees_the_averages():
    record = Record()
    made = learner(EMACallback(DECAY), record)
    fit(made, 1)
    assert record.validated
    assert all(same(seen, floats(made.model)) for seen in record.validated)


def test_no_decay_is_no_average():
    record = Record()
    made = learner(EMACallback(0.0), record)
    fit(made, 1)
    assert same(floats(made.model), record.steps[-1])


def test_a_validation_or_a_search_between_steps_changes_nothing(tmp_path):
    class ValidateInside(Callback):
        run_valid = False

        def after_epoch(self):
            if self.learn.epoch == 0 and not hasattr(self.learn, "inside"):
                self.learn.inside = True
                self.learn.validate()
                del self.learn.inside

    plain, nested = learner(EMACallback(DECAY)), learner(EMACallback(DECAY))
    nested.path = tmp_path
    with nested.no_logging(), nested.no_bar():
        nested.lr_find(num_it=8, show_plot=False, suggest_funcs=())
        nested.validate()
    nested.add_cb(ValidateInside())
    fit(plain, 2)
    fit(nested, 2)
    assert same(floats(plain.model), floats(nested.model))


def test_an_early_end_of_training_leaves_the_averages():
    record = Record()
    made = learner(EMACallback(DECAY), record)
    made.add_cb(EarlyStoppingCallback(monitor="valid_loss", min_delta=1e9, patience=1))
    fit(made, 9)
    assert len(record.steps) < 1 + 4 * len(made.dls.train)
    assert not same(floats(made.model), record.steps[-1])
    assert same(floats(made.model), record.validated[-1])


class Interrupt(Callback):
    """Stop in the first validation, or after a step of training."""

    def __init__(self, error, training):
        super().__init__()
        self.error, self.in_training = error, training

    def after_batch(self):
        if self.training == self.in_training:
            raise self.error


@pytest.mark.parametrize("training", [False, True])
def test_after_an_interruption_loaded_weights_are_left_alone(training):
    interrupt = Interrupt(KeyboardInterrupt, training)
    made = learner(EMACallback(DECAY), interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(made, 1)
    made.remove_cb(interrupt)
    loaded = {name: torch.full_like(t, 0.5) for name, t in made.model.state_dict().items()}
    made.model.load_state_dict(loaded)
    made.remove_cb(made.progress) if hasattr(made, "progress") else None
    with made.no_logging():
        made.validate()
    assert all(bool((p == 0.5).all()) for p in made.model.parameters())
    record = Record()
    made.add_cb(record)
    fit(made, 1)
    assert all(bool((tensor == 0.5).all()) for tensor in record.steps[0].values())


def test_an_end_of_training_in_a_validation_leaves_the_averages_for_good():
    record = Record()
    interrupt = Interrupt(CancelFitException, False)
    made = learner(EMACallback(DECAY), record, interrupt)
    fit(made, 2)
    made.remove_cb(interrupt)
    left = floats(made.model)
    assert same(left, record.validated[-1])
    assert not same(left, record.steps[-1])
    with made.no_logging():
        made.validate()
    assert same(floats(made.model), left)


def test_the_best_epoch_of_fastai_is_saved_as_it_was_validated(tmp_path):
    record = Record()
    made = learner(EMACallback(DECAY), record, SaveModelCallback(monitor="valid_loss"))
    made.path = tmp_path
    with made.no_logging(), redirect_stdout(io.StringIO()):
        made.fit(2, 0.05)
    assert any(same(floats(made.model), seen) for seen in record.validated)


def test_predictions_in_the_middle_of_an_epoch_change_nothing():
    class MiddlePass(Callback):
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

    plain, nested = learner(EMACallback(DECAY)), learner(EMACallback(DECAY), MiddlePass())
    before = Record(), Record()
    plain.add_cb(before[0])
    nested.add_cb(before[1])
    fit(plain, 1)
    fit(nested, 1)
    # The optimizer steps are the same; the inner pass sends validations of its own.
    assert same(before[0].steps[-1], before[1].steps[-1])
    assert same(floats(plain.model), floats(nested.model))


def test_skipped_steps_do_not_count():
    class Skip(Callback):
        run_valid = False

        def before_step(self):
            if self.learn.iter % 2 == 0:
                raise CancelStepException

    ema, record = EMACallback(DECAY), Record()
    made = learner(ema, record, Skip())

    class Count(Callback):
        run_valid = False

        def after_train(self):
            self.learn.counted = ema.num_steps

    made.add_cb(Count())
    fit(made, 1)
    assert made.counted == len(made.dls.train) // 2


def test_averages_of_half_precision_are_kept_in_single():
    ema = EMACallback(0.999)
    made = learner(ema)
    made.model.bfloat16()
    ema.before_fit()
    ema.before_train()
    assert {average.dtype for average in ema.averages.values()} == {torch.float32}
    start = {name: average.clone() for name, average in ema.averages.items()}
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(1.0)
    ema.num_steps = 10_000  # past the start, with steps of a thousandth
    ema.after_step()
    name = "heads.0.bias"
    assert (ema.averages[name] - start[name]).mean().item() == pytest.approx(1e-3, rel=0.1)


def test_a_fit_after_a_fit_starts_a_new_average():
    record = Record()
    made = learner(EMACallback(DECAY))
    fit(made, 1)
    after_first = floats(made.model)
    made.add_cb(record)
    fit(made, 1)
    assert same(record.steps[0], after_first)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2, float("nan"), "x", None])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(InputError, match="decay must be a number, at least 0 and below 1"):
        EMACallback(decay)


def test_the_state_of_another_network_is_refused():
    ema = EMACallback(DECAY)
    made = learner(ema)
    state = {name: tensor[:1] for name, tensor in floats(made.model).items() if tensor.ndim}
    with pytest.raises(InputError, match="another network"):
        ema.load_state_tensors(state, made.model.state_dict())
