"""Errors of callbacks and losses name the mistake, and leave the Learner usable."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLoss
from fastai.vision.learner import vision_learner
from fastcore.basics import noop
from learners import make_learner, quiet, small_network
from synthetic import fastai_dls, mixmo_dls
from torch import nn
from torchvision.models import resnet18

from mixmo_fastai import MixMoCallback, mixmo_learner, to_mixmo
from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.distributed import shared
from mixmo_fastai.learner.member_preds import member_preds
from mixmo_fastai.models import convert_to_mixmo, create_model


def with_mixup(learn):
    learn.add_cb(MixUp())
    return lambda: learn.remove_cb(MixUp)


def fused(learn):
    learn.model = learn.model.eval().fuse()
    return lambda: learn.remove_cb(MixMoCallback)


@pytest.mark.parametrize("spoil", [with_mixup, fused])
@pytest.mark.parametrize("call", ["validate", "get_preds"])
def test_an_error_in_evaluation_leaves_the_learner_usable(spoil, call):
    """fastai would keep its lock, so that the next call would wait forever."""
    learn = make_learner()
    expected = [float(value) for value in learn.validate()]
    logger, callbacks = learn.logger, len(learn.cbs)
    mend = spoil(learn)
    for _ in range(2):
        with pytest.raises(InputError, match=r"remove_cb\((MixUp|MixMoCallback)\)") as error:
            getattr(learn, call)()
        assert len(str(error.value).splitlines()) <= 3
        assert not learn.lock.locked()
        assert learn.logger is logger
    mend()
    assert len(learn.cbs) == callbacks - (spoil is fused)
    torch.testing.assert_close([float(v) for v in learn.validate()], expected)


def test_an_error_that_was_mended_is_not_raised_again():
    learn = make_learner()
    second = MixMoCallback()
    learn.add_cb(second)
    with pytest.raises(InputError, match="more than one MixMoCallback"):
        learn.validate()
    learn.remove_cb(second)
    learn.validate()
    learn.fit(1)


class FailBeforeFit(Callback):
    def before_fit(self):
        raise RuntimeError("of another callback")


def test_errors_are_raised_before_training_although_another_callback_left_the_lock():
    learn = make_learner()
    learn.add_cb(FailBeforeFit())
    with pytest.raises(RuntimeError):
        learn.validate()
    assert learn.lock.locked()  # fastai's
    learn.remove_cb(FailBeforeFit)
    learn.add_cb(MixUp())
    before = [parameter.clone() for parameter in learn.model.parameters()]
    with pytest.raises(InputError, match="MixUp"):
        learn.fit(1, 0.1)
    for parameter, old in zip(learn.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_an_error_of_a_fit_is_raised_before_its_first_batch():
    learn = make_learner()
    seen = []

    class Count(Callback):
        def before_batch(self):
            seen.append(1)

    learn.add_cbs([Count(), MixUp()])
    with pytest.raises(InputError, match="MixUp"):
        learn.fit(1, 0.01)
    assert not seen


def test_a_callback_on_a_plain_network_can_be_replaced_by_a_conversion():
    learn = quiet(Learner(mixmo_dls(), small_network(), CrossEntropyLossFlat()))
    learn.add_cb(MixMoCallback())
    with pytest.raises(InputError, match=r"Remove it: learn.remove_cb\(MixMoCallback\)"):
        learn.fit(1)
    with pytest.raises(InputError, match=r"first remove it: learn.remove_cb\(MixMoCallback\)"):
        to_mixmo(learn)
    learn.remove_cb(MixMoCallback)
    to_mixmo(learn).fit(1)
    with pytest.raises(InputError, match="do not call to_mixmo again"):
        to_mixmo(learn)


def test_parts_of_a_network_have_no_positions():
    learn = vision_learner(
        fastai_dls(), resnet18, pretrained=False, n_out=3, loss_func=CrossEntropyLossFlat()
    )
    learn.model = convert_to_mixmo(learn.model)
    learn.add_cb(MixMoCallback())
    with pytest.raises(InputError, match=r"model\.core\.body\[0\]\..*to_mixmo\(learn\)"):
        learn.fit(1)
    assert isinstance(learn.model.core.body[0], nn.Module)


def test_weights_of_other_numbers_of_members_are_named():
    two, three = (create_model("wrn10_1", 3, num_members) for num_members in (2, 3))
    for model, other, count in ((two, three, 3), (three, two, 2)):
        with pytest.raises(
            InputError, match=rf"those of {count} members; .*\n.*num_members={count}"
        ):
            model.load_state_dict(other.state_dict())
        model.load_state_dict(dict(list(other.state_dict().items())[:1]), strict=False)


def pairs(labels, dtype=torch.float32):
    images = torch.arange(len(labels) * 3 * 8 * 8).view(-1, 3, 8, 8).remainder(256).to(dtype)
    data = [
        (image / 255 if dtype.is_floating_point else image, label)
        for image, label in zip(images, labels, strict=True)
    ]
    loaders = [DataLoader(data, bs=4, shuffle=shuffle) for shuffle in (False, False)]
    return DataLoaders(*loaders)


class TestLabels:
    @pytest.mark.parametrize("label", [3, 7, -1])
    def test_labels_of_the_first_batch_are_checked(self, label):
        dls = pairs(torch.tensor([0, 1, label, 2] * 2))
        message = rf"Labels must be from 0 to 2, .* got {label}\."
        with pytest.raises(InputError, match=message):
            mixmo_learner(dls, "wrn10_1", num_classes=3, loss_func=CrossEntropyLossFlat())
        learn = Learner(dls, small_network(), nn.CrossEntropyLoss())
        with pytest.raises(InputError, match=message):
            to_mixmo(learn)
        assert isinstance(learn.loss_func, nn.CrossEntropyLoss)

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, CrossEntropyLossFlat])
    def test_later_labels_are_checked_by_the_loss(self, loss):
        dls = pairs(torch.tensor([0, 1, 2, 0, 1, 2, 3, 0]))
        learn = quiet(mixmo_learner(dls, small_network(), loss_func=loss(), batch_repetitions=1))
        with pytest.raises(InputError, match=r"Labels must be from 0 to 2, .* got 3\."):
            learn.fit(1)
        with pytest.raises(InputError, match=r"Labels must be from 0 to 2, .* got 3\."):
            learn.validate()
        assert not learn.lock.locked()

    @pytest.mark.parametrize("ignored", [-100, 255])
    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, CrossEntropyLossFlat])
    def test_ignored_targets_are_no_labels(self, ignored, loss):
        dls = pairs(torch.tensor([0, 1, 2, ignored]))
        loss_func = loss(ignore_index=ignored)
        mixmo_learner(dls, small_network(), num_classes=3, loss_func=loss_func)


def test_a_network_of_ones_own_has_its_number_of_classes():
    dls = pairs(torch.tensor([0, 1, 2, 0]))
    learn = mixmo_learner(dls, small_network(), loss_func=CrossEntropyLossFlat())
    assert learn.model.heads[0].out_features == 3
    with pytest.raises(InputError, match="do not report the number of classes"):
        mixmo_learner(dls, "wrn10_1", loss_func=CrossEntropyLossFlat())


def test_integer_images_are_refused():
    dls = pairs(torch.tensor([0, 1, 2, 0]), torch.uint8)
    with pytest.raises(InputError, match=r"first batch holds torch\.uint8\.\nConvert"):
        mixmo_learner(dls, small_network(), loss_func=CrossEntropyLossFlat())


def test_loaders_of_others_are_not_shared():
    with (
        pytest.raises(
            InputError, match=r"shared needs the loaders of make_dataloaders.*\n.*distrib"
        ),
        shared(make_learner(fastai_dls())),
    ):
        pass


def test_a_folder_is_no_source():
    with pytest.raises(InputError, match=r"must be a DataSource; got str\.\nLoad one"):
        make_dataloaders("flowers", batch_size=4)


@pytest.mark.parametrize(
    ("loss", "activation"),
    [
        (CrossEntropyLossFlat(), lambda predictions: predictions),
        (nn.CrossEntropyLoss(), lambda logits: logits.softmax(dim=1)),
        (FocalLoss(), lambda logits: logits.softmax(dim=1)),
    ],
)
def test_predictions_before_and_after_a_conversion(loss, activation):
    learn = quiet(Learner(mixmo_dls(), small_network().eval(), loss))
    before, _ = learn.get_preds()
    logits, _ = learn.get_preds(act=noop)
    to_mixmo(learn)
    torch.testing.assert_close(learn.get_preds()[0], activation(before), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learn.get_preds(act=noop)[0], logits, atol=1e-5, rtol=1e-4)
    members = member_preds(learn).probabilities
    assert torch.allclose(members.sum(dim=2), torch.ones(()))
