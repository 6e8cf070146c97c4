import pytest
import torch
from fastai.callback.core import Callback
from synthetic import mixmo_dls

from mixmo_fastai import EMACallback, mixmo_learner
from mixmo_fastai.callbacks.best_epoch import BestEpochCallback
from mixmo_fastai.errors import InputError


class Script(Callback):
    """Pretend what each epoch's validation found; note the weights it found it with."""

    order, run_valid = 56, False

    def __init__(self, records):
        super().__init__()
        self.records, self.weights = records, []

    def after_epoch(self):
        loss, accuracy = self.records[self.learn.epoch]
        self.learn.final_record = [0.0, loss, accuracy, accuracy]
        state = self.learn.model.state_dict()
        self.weights.append({name: tensor.clone() for name, tensor in state.items()})


def fit(records, *cbs):
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
    learn.remove_cb(learn.progress)
    best, script = BestEpochCallback(), Script(records)
    with learn.no_logging():
        learn.fit(len(records), 0.05, cbs=[best, script, *cbs])
    return learn, best, script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("records", "epoch"),
    [
        ([(1.0, 0.5), (2.0, 0.7), (0.5, 0.6)], 2),  # accuracy decides
        ([(1.0, 0.5), (0.8, 0.5), (0.9, 0.5)], 2),  # then the loss
        ([(1.0, 0.5), (1.0, 0.5)], 1),  # then the first
    ],
)
@pytest.mark.parametrize("averaged", [False, True])
def test_the_best_epoch_is_kept(records, epoch, averaged):
    learn, best, script = fit(records, *([EMACallback(0.5)] if averaged else []))
    assert best.number == epoch
    best.restore(learn.model)
    state = learn.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in script.weights[epoch - 1].items())


def test_nothing_is_restored_where_nothing_was_validated():
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
    with pytest.raises(InputError, match="No epoch was validated"):
        BestEpochCallback().restore(learn.model)


def test_its_state_comes_back():
    learn, best, script = fit([(1.0, 0.5), (2.0, 0.7)])
    again = BestEpochCallback()
    again.load_state_tensors(best.state_tensors(), learn.model.state_dict())
    assert (again.number, again.best) == (2, best.best)
    again.restore(learn.model)
    state = learn.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in script.weights[1].items())


def test_a_state_without_standing_is_refused():
    state = {"weight": torch.zeros(2)}
    with pytest.raises(InputError, match="another network: selection"):
        BestEpochCallback().load_state_tensors(state, state)
