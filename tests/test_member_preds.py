import math

import numpy as np
import oracle_metrics
import pytest
import torch
import torch.nn.functional as F
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter
from fastai.layers import SigmoidRange
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from synthetic import fastai_dls, image_arrays, mixmo_dls
from torch import nn

from mixmo_fastai import MixMoCallback, create_model, member_preds, mixmo_learner, to_mixmo
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.fastai import MemberAccuracy


def without_output(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def package_learner(num_members=2, dls=None, **kwargs):
    mix = "sum" if num_members == 1 else "cutmix"
    dls = dls or mixmo_dls()
    return without_output(
        mixmo_learner(dls, "wrn10_1", mix=mix, num_members=num_members, seed=0, **kwargs)
    )


def user_learner():
    """Return a user's Learner that has not been fitted, with a torch loss."""
    model = create_model("wrn10_1", 3, 3, generator=torch.Generator().manual_seed(3))
    dls = fastai_dls()
    return without_output(
        Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy, cbs=MixMoCallback())
    )


def converted_learner():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    learn = Learner(fastai_dls(), nn.Sequential(*layers), CrossEntropyLossFlat())
    return without_output(to_mixmo(learn, independent=True, seed=0))


def expected_logits(learn, loader):
    with torch.no_grad():
        return torch.cat([learn.model.eval().member_logits(x) for x, *_ in loader]).as_subclass(
            torch.Tensor
        )


@pytest.mark.parametrize("make", [package_learner, user_learner, converted_learner])
def test_member_preds_equal_the_model_outputs(make):
    learn = make()
    predictions = member_preds(learn)
    expected = expected_logits(learn, learn.dls.valid)
    assert predictions.probabilities.shape == expected.shape
    assert expected.shape[::2] == (len(learn.dls.valid_ds), 3)
    assert type(predictions.probabilities) is torch.Tensor
    torch.testing.assert_close(predictions.probabilities, expected.softmax(2))
    assert torch.equal(predictions.votes, expected.argmax(2))
    assert torch.equal(predictions.targets, torch.cat([y for _, y in learn.dls.valid]))
    reference = oracle_metrics.mutual_information(expected.numpy())
    assert predictions.mutual_information.mean().item() == pytest.approx(reference, rel=1e-4)
    assert predictions.mutual_information.min() >= 0
    assert predictions.mutual_information.max() <= math.log(expected.shape[1])
    ensemble, targets = learn.get_preds()
    probabilities = predictions.probabilities.log().mean(1).softmax(1)
    torch.testing.assert_close(probabilities, ensemble)
    assert torch.equal(predictions.targets, targets.as_subclass(torch.Tensor))


def test_training_images_keep_their_order():
    learn = package_learner()
    predictions = member_preds(learn, ds_idx=0)
    assert len(predictions.targets) == len(learn.dls.train_ds)
    expected = expected_logits(learn, learn.dls.train.new(shuffle=False, drop_last=False))
    torch.testing.assert_close(predictions.probabilities, expected.softmax(2))


def test_shuffled_loader_yields_the_order_of_the_data():
    learn = user_learner()
    shuffled = learn.dls.valid.new(shuffle=True)
    predictions, expected = member_preds(learn, dl=shuffled), member_preds(learn)
    torch.testing.assert_close(predictions.probabilities, expected.probabilities)
    assert torch.equal(predictions.targets, expected.targets)


def test_images_without_targets():
    learn = package_learner()
    files = learn.dls.test_dl([learn.dls.valid_ds[i][0] for i in range(5)])
    predictions = member_preds(learn, dl=files)
    assert predictions.targets is None
    torch.testing.assert_close(predictions.probabilities, member_preds(learn).probabilities[:5])


def test_single_member_has_no_mutual_information():
    learn = package_learner(num_members=1)
    predictions = member_preds(learn)
    assert predictions.mutual_information is None
    torch.testing.assert_close(predictions.probabilities[:, 0], learn.get_preds()[0])


def test_learner_is_unchanged():
    learn = package_learner()
    learn.fit(1, 0.01)
    callbacks, metrics = [*learn.cbs], learn.validate()
    member_preds(learn)
    assert [*learn.cbs] == callbacks
    assert [*learn.validate()] == pytest.approx([*metrics])
    learn.fit(1, 0.01)
    assert learn.mix_mo.epochs_trained == 2


def block_dls(target_block, get_y):
    pixels, labels = image_arrays(24)
    images = [image.float() / 255 for image in pixels]
    block = DataBlock(
        (TransformBlock(), target_block),
        get_x=lambda i: images[i],
        get_y=lambda i: get_y(int(labels[i])),
        splitter=RandomSplitter(0.5, seed=0),
    )
    return block.dataloaders(range(24), bs=6, num_workers=0, device="cpu")


def test_multi_label_targets():
    dls = block_dls(MultiCategoryBlock(), lambda label: ["odd"] if label % 2 else ["even", "small"])
    learn = package_learner(dls=dls, loss_func=BCEWithLogitsLossFlat(thresh=0.6))
    predictions = member_preds(learn)
    expected = expected_logits(learn, dls.valid).sigmoid()
    torch.testing.assert_close(predictions.probabilities, expected)
    assert torch.equal(predictions.votes, expected > 0.6)
    assert predictions.targets.shape == (12, 3)
    p = expected.double().numpy()

    def entropy(q):
        return -(q * np.log(q) + (1 - q) * np.log(1 - q)).sum(-1)

    information = entropy(p.mean(1)) - entropy(p).mean(1)
    assert predictions.mutual_information.numpy() == pytest.approx(information, rel=1e-4, abs=1e-9)


def test_regression():
    learn = package_learner(dls=block_dls(RegressionBlock(n_out=1), float))
    predictions = member_preds(learn)
    expected = expected_logits(learn, learn.dls.valid)
    torch.testing.assert_close(predictions.probabilities, expected)
    assert torch.equal(predictions.votes, predictions.probabilities)
    assert predictions.mutual_information is None


def test_regression_with_a_sigmoid_range():
    """The members' predictions are in the range, like those of the ensemble."""
    dls = block_dls(RegressionBlock(n_out=1), float)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    network = nn.Sequential(body, SigmoidRange(2, 5))
    learn = to_mixmo(Learner(dls, network, MSELossFlat()), seed=0)
    predictions = member_preds(learn)
    expected = 2 + 3 * expected_logits(learn, dls.valid).sigmoid()
    torch.testing.assert_close(predictions.probabilities, expected)
    assert torch.equal(predictions.votes, predictions.probabilities)


def test_network_that_ends_with_a_sigmoid():
    """A probability below 0.5 is a negative decision, in training and in validation."""
    dls = block_dls(MultiCategoryBlock(), lambda label: ["odd"] if label % 2 else ["even", "small"])
    linear = nn.Linear(4, 3)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, -1.0)
    metrics = MemberAccuracy()
    learn = Learner(dls, nn.Sequential(body, nn.Sigmoid()), nn.BCELoss(), metrics=metrics)
    without_output(to_mixmo(learn, seed=0)).recorder.train_metrics = True
    learn.fit(1, 0.0)
    _, train_accuracy, _, valid_accuracy = learn.recorder.values[-1]
    targets = [torch.cat([y for _, y in part]) for part in (dls.train, dls.valid)]
    assert train_accuracy == pytest.approx(float((targets[0] == 0).float().mean()))
    assert valid_accuracy == pytest.approx(float((targets[1] == 0).float().mean()))


def test_custom_loss():
    learn = package_learner(loss_func=lambda pred, targets: F.cross_entropy(pred, targets.long()))
    learn.fit(1, 0.01)
    predictions = member_preds(learn)
    torch.testing.assert_close(
        predictions.probabilities.sum(2), torch.ones(predictions.votes.shape)
    )
    assert torch.equal(predictions.votes, predictions.probabilities.argmax(2))


def test_plain_learner_is_rejected():
    dls = DataLoaders(*fastai_dls())
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), nn.CrossEntropyLoss())
    with pytest.raises(InputError, match=r"the Learner has a Sequential.*\n.*to_mixmo"):
        member_preds(learn)
