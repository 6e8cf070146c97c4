"""Calibration of the predictions of a Learner."""

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat

from mixmo_fastai import calibrate_learner, calibrated_preds, mixmo_learner
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.calibration import calibrate


def plain_learner(num_images=300, *, shuffle=False, loss=None, targets=None):
    """Return a Learner whose network returns its inputs, which are overconfident logits."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(num_images, 4, generator=generator)
    labels = torch.multinomial(true.softmax(dim=1), 1, generator=generator)[:, 0]
    items = [*zip(4 * true, labels if targets is None else targets, strict=True)]
    loaders = [DataLoader(items, bs=64, shuffle=shuffle) for _ in range(2)]
    dls = DataLoaders(*loaders, device="cpu")
    network = torch.nn.Linear(4, 4, bias=False)
    network.weight.data = torch.eye(4)
    return Learner(dls, network, loss or CrossEntropyLossFlat()), 4 * true, labels


def test_plain_network_is_calibrated():
    learn, logits, labels = plain_learner()
    with learn.no_bar():
        found = calibrate_learner(learn)
        probabilities, targets = calibrated_preds(learn, found)
        plain, _ = learn.get_preds()
    expected = calibrate(logits[:, None], labels, ["x"] * 300)
    assert found.scaling.temperature == pytest.approx(expected.scaling.temperature)
    assert found.scaling.temperature == pytest.approx(4, rel=0.3)
    assert torch.equal(targets, labels)
    torch.testing.assert_close(
        probabilities, (logits.double() / found.scaling.temperature).softmax(1)
    )
    assert bool((probabilities.amax(1) < plain.amax(1)).all())
    sets = found.sets(0.9, "raps")(probabilities)
    assert float(sets.gather(1, labels[:, None]).double().mean()) >= 0.9
    assert found.names[:2] == ("1/0", "1/1")


def test_other_loaders_and_methods():
    learn, _, _ = plain_learner(1000)
    with learn.no_bar():
        found = calibrate_learner(learn, dl=learn.dls.train, method="vector")
        assert found.scaling.method == "vector"
        assert found.names[0] == "dl/0"
        none = calibrate_learner(learn, method="none")
        probabilities, _ = calibrated_preds(learn, none)
        torch.testing.assert_close(probabilities.float(), learn.get_preds()[0])


def test_other_targets_are_refused():
    learn, _, _ = plain_learner(loss=BCEWithLogitsLossFlat(), targets=torch.zeros(300, 4))
    with learn.no_bar(), pytest.raises(InputError, match="needs one class per image"):
        calibrate_learner(learn)


def test_members_of_a_mixmo_network_are_calibrated():
    dls = make_dataloaders(load_source("digits"), batch_size=16, valid_split=0.2, device="cpu")
    learn = mixmo_learner(dls, "wrn10_1", seed=0)
    with learn.no_bar(), learn.no_logging():
        names = [type(callback).__name__ for callback in learn.cbs]
        found = calibrate_learner(learn)
        probabilities, labels = calibrated_preds(learn, found)
        plain, _ = learn.get_preds()
        assert [type(callback).__name__ for callback in learn.cbs] == names
    assert "mutual-information" in found.confidences
    assert torch.equal(probabilities.argmax(1), plain.argmax(1))
    assert torch.equal(labels, dls.valid.images.labels)
