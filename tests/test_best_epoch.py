import pytest
import torch
from fastai.callback.core import Callback
from label_tables import write_images
from synthetic import mixmo_dls

from mixmo_fastai import EMACallback, mixmo_learner
from mixmo_fastai.callbacks.best_epoch import BestEpochCallback
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.training.prepare import prepare


class SimulatedValidation(Callback):
    """Replace the validation metrics of each epoch, and record the weights."""

    order, run_valid = 56, False

    def __init__(self, records):
        super().__init__()
        self.records, self.weights = records, []

    def after_epoch(self):
        loss, accuracy = self.records[self.learn.epoch]
        self.learn.final_record = [0.0, loss, accuracy, accuracy]
        state = self.learn.model.state_dict()
        self.weights.append({name: tensor.clone() for name, tensor in state.items()})


def fit(records, *cbs, by_loss=False):
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
    learn.remove_cb(learn.progress)
    best, simulated = BestEpochCallback(by_loss=by_loss), SimulatedValidation(records)
    with learn.no_logging():
        learn.fit(len(records), 0.05, cbs=[best, simulated, *cbs])
    return learn, best, simulated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("records", "epoch"),
    [
        ([(1.0, 0.5), (2.0, 0.7), (0.5, 0.6)], 2),  # highest accuracy
        ([(1.0, 0.5), (0.8, 0.5), (0.9, 0.5)], 2),  # then lowest loss
        ([(1.0, 0.5), (1.0, 0.5)], 1),  # then first epoch
    ],
)
@pytest.mark.parametrize("is_averaged", [False, True])
def test_best_epoch_is_restored(records, epoch, is_averaged):
    learn, best, simulated = fit(records, *([EMACallback(0.5)] if is_averaged else []))
    assert best.number == epoch
    best.restore(learn.model)
    state = learn.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in simulated.weights[epoch - 1].items())


def test_restore_without_validation_is_rejected():
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
    with pytest.raises(InputError, match="No epoch was validated"):
        BestEpochCallback().restore(learn.model)


def test_state_is_restored():
    learn, best, simulated = fit([(1.0, 0.5), (2.0, 0.7)])
    restored = BestEpochCallback()
    restored.load_state_tensors(best.state_tensors(), learn.model.state_dict())
    assert (restored.number, restored.best) == (2, best.best)
    restored.restore(learn.model)
    state = learn.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in simulated.weights[1].items())


def test_incomplete_state_is_rejected():
    state = {"weight": torch.zeros(2)}
    with pytest.raises(InputError, match="another network: selection"):
        BestEpochCallback().load_state_tensors(state, state)


def test_images_of_a_validation_folder_select_although_none_are_split_off(tmp_path):
    for split, count in (("train", 8), ("valid", 4), ("test", 2)):
        names = [f"{split}/{name}/{i}.png" for name in ("cat", "dog") for i in range(count)]
        write_images(tmp_path / "data", names)
    recipe = resolve_recipe(
        str(tmp_path / "data"),
        "small-cifar10/vanilla",
        {"train.epochs": 1, "train.batch_size": 4, "model.arch": "wrn10_1"},
        ["data.limit=0", "data.valid_split=0", "data.image_size=8", "train.select=best"],
    )
    assert len(prepare(recipe).learn.dls.valid.images) == 4  # the others calibrate


def test_a_first_epoch_without_a_finite_loss_is_replaced():
    _, best, _ = fit([(float("nan"), 0.5), (1.0, 0.5), (0.5, 0.4)], by_loss=True)
    assert best.number == 3
