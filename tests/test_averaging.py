import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
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


def test_an_interrupted_validation_leaves_the_weights_in_training():
    class Interrupt(Callback):
        run_train = False

        def after_pred(self):
            raise KeyboardInterrupt

    record, interrupt = Record(), Interrupt()
    made = learner(EMACallback(DECAY), record, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(made, 1)
    last = record.steps[-1]
    made.remove_cb(interrupt)
    first = []

    class First(Callback):
        order = 100

        def before_train(self):
            first.append(floats(self.learn.model))

    made.add_cb(First())
    fit(made, 1)
    assert same(first[0], last)


def test_a_fit_after_a_fit_starts_a_new_average():
    record = Record()
    made = learner(EMACallback(DECAY))
    fit(made, 1)
    after_first = floats(made.model)
    made.add_cb(record)
    fit(made, 1)
    assert same(record.steps[0], after_first)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(InputError, match="decay must be at least 0 and below 1"):
        EMACallback(decay)


def test_the_state_of_another_network_is_refused():
    ema = EMACallback(DECAY)
    made = learner(ema)
    state = {name: tensor[:1] for name, tensor in floats(made.model).items() if tensor.ndim}
    with pytest.raises(InputError, match="another network"):
        ema.load_state_tensors(state)
