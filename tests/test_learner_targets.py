"""Multi-label and regression targets of a `mixmo_learner`."""

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from learners import fit_and_list_changed_parameters, small_network
from torch import nn
from torch.utils.data import TensorDataset

from mixmo_fastai import mixmo_learner, to_mixmo
from mixmo_fastai.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_multi_label_targets_of_plain_loaders(dtype):
    images, labels = torch.rand(32, 3, 8, 8), torch.randint(2, (32, 4)).to(dtype)
    data = TensorDataset(images, labels)
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    with pytest.raises(InputError, match=r"class indices(.|\n)*BCEWithLogitsLossFlat"):
        mixmo_learner(dls, small_network(), num_classes=4)
    floats = TensorDataset(images, labels.float())
    dls = DataLoaders.from_dsets(floats, floats, bs=8, device="cpu", num_workers=0)
    learn = mixmo_learner(
        dls, small_network(), num_classes=4, loss_func=nn.BCEWithLogitsLoss(), seed=0
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        metric = learn.recorder.values[-1][2]
        probabilities, targets = learn.get_preds()
    assert ((probabilities > 0.5) == targets).float().mean() == pytest.approx(metric)


class WithLoss(TensorDataset):
    loss_func = BCEWithLogitsLossFlat()


def test_no_loss_means_that_of_the_data_as_in_a_learner():
    data = WithLoss(torch.rand(16, 3, 8, 8), torch.randint(2, (16, 4)).float())
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    learn = mixmo_learner(dls, small_network(), num_classes=4, loss_func=None)
    assert learn.loss_func.base is Learner(dls, small_network()).loss_func


def test_metrics_of_integer_multi_labels():
    data = TensorDataset(torch.rand(32, 3, 8, 8), torch.randint(2, (32, 4)))
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    learn = mixmo_learner(dls, small_network(), num_classes=4, loss_func=BCEWithLogitsLossFlat())
    fit_and_list_changed_parameters(learn)
    assert 0 < learn.recorder.values[-1][2] < 1


def test_regression_outputs_are_unchanged():
    data = TensorDataset(torch.rand(32, 3, 8, 8), torch.rand(32, 1))
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    learn = Learner(
        dls, nn.Sequential(*small_network()[:-1], nn.Linear(8, 1)), loss_func=nn.MSELoss()
    )
    with learn.no_bar():
        before = learn.get_preds(with_decoded=True)
        to_mixmo(learn, mix="sum")
        after = learn.get_preds(with_decoded=True)
    for converted, original in zip(after, before, strict=True):
        torch.testing.assert_close(converted, original, rtol=1e-4, atol=1e-5)
