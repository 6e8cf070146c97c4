"""Learners that cannot train a MixMo network are rejected early and stay unchanged."""

from functools import partial

import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from synthetic import fastai_dls, mixmo_dls
from torch import nn
from torch.utils.data import TensorDataset

from mixmo_fastai import MixMoCallback, create_model, mixmo_learner, to_mixmo
from mixmo_fastai.errors import InputError


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def loaders(num_inputs, num_targets):
    images = [torch.rand(32, 3, 8, 8) for _ in range(num_inputs)]
    targets = [torch.randint(3, (32,)) for _ in range(num_targets)]
    data = TensorDataset(*images, *targets)
    dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    dls.n_inp = num_inputs
    return dls


def learner(dls=None, model=None, **kwargs):
    kwargs = {"loss_func": CrossEntropyLossFlat(), **kwargs}
    learn = Learner(dls or fastai_dls(), model or small_network(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def attributes_and_tensors(learn):
    tensors = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    return {**vars(learn), "cbs": [*learn.cbs]}, tensors


def assert_rejected(learn, call, message):
    attributes, tensors = attributes_and_tensors(learn)
    with pytest.raises(InputError, match=message) as caught:
        call(learn)
    assert len(str(caught.value).splitlines()) <= 3
    now, tensors_now = attributes_and_tensors(learn)
    assert now == attributes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_now.items())


BATCH_ERRORS = {
    (1, 2): r"yields 1 input and 2 targets.\nTrain a Learner for each target",
    (2, 1): r"yields 2 inputs and 1 target.\nNetworks of several inputs are not",
    (1, 0): r"yields 1 input and 0 targets.\nPass loaders of pairs",
}


@pytest.mark.parametrize("counts", BATCH_ERRORS)
def test_batches_that_are_not_pairs_are_rejected(counts):
    message = BATCH_ERRORS[counts]
    assert_rejected(learner(loaders(*counts)), to_mixmo, message)
    with pytest.raises(InputError, match=message):
        mixmo_learner(
            loaders(*counts), small_network(), num_classes=3, loss_func=CrossEntropyLossFlat()
        )
    manual = learner(loaders(*counts), create_model("wrn10_1", 3), cbs=MixMoCallback(seed=0))
    before = {name: tensor.clone() for name, tensor in manual.model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        manual.fit(1)
    now = manual.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_fastai_mix_callbacks_are_rejected(mix):
    message = rf"fastai's {mix.__name__} cannot be combined.*\n.*remove_cb\({mix.__name__}\)"
    hint = f"msda='{mix.__name__.lower()}'"
    learn = learner(cbs=mix())
    assert_rejected(learn, to_mixmo, message)
    learn.remove_cb(mix)
    to_mixmo(learn)
    with pytest.raises(InputError, match=hint):
        learn.fit(1, cbs=mix())
    for callbacks in (mix, mix(), [mix()]):
        with pytest.raises(InputError, match=message):
            mixmo_learner(mixmo_dls(), "wrn10_1", cbs=callbacks)


def test_second_mixmo_callback_is_rejected():
    with pytest.raises(InputError, match="must not contain a MixMoCallback"):
        mixmo_learner(mixmo_dls(), "wrn10_1", cbs=[MixMoCallback("linear")])


def test_optimizer_of_the_original_network_is_rejected():
    model = small_network()
    optimizer = OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.1))
    assert_rejected(
        learner(model=model, opt_func=optimizer), to_mixmo, "opt_func must be a function"
    )
    with pytest.raises(InputError, match="opt_func must be a function"):
        mixmo_learner(mixmo_dls(), model, opt_func=optimizer)
    mixmo_model = create_model("wrn10_1", 3)
    matching = OptimWrapper(opt=torch.optim.SGD(mixmo_model.parameters(), lr=0.1))
    learn = mixmo_learner(mixmo_dls(), mixmo_model, opt_func=matching)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    factory = partial(OptimWrapper, opt=torch.optim.SGD)
    assert to_mixmo(learner(opt_func=factory)).opt is None


def converted_learner():
    return to_mixmo(learner(), seed=0)


def package_learner():
    learn = mixmo_learner(mixmo_dls(), small_network(), seed=0)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def manual_learner():
    learn = learner(model=create_model("wrn10_1", 3), cbs=MixMoCallback(seed=0))
    learn.fit(1)
    return learn


@pytest.mark.parametrize("make", [converted_learner, package_learner, manual_learner])
def test_fit_without_the_callback_is_rejected(make):
    learn = make()
    learn.remove_cb(MixMoCallback)
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    with pytest.raises(InputError, match=r"2 members.*no MixMoCallback.*\n.*add_cb") as caught:
        learn.fit(1)
    assert len(str(caught.value).splitlines()) == 3
    now = learn.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert len(learn.validate()) >= 1
    learn.add_cb(MixMoCallback("linear"))
    learn.fit(1)
    assert learn.mix_mo.epochs_trained == 1


def test_fused_network_trains_without_the_callback():
    learn = converted_learner()
    learn.remove_cb(MixMoCallback)
    learn.model = learn.model.fuse()
    learn.create_opt()
    learn.fit(1)
    assert isinstance(learn.model, nn.Sequential)


def test_one_member_needs_no_callback():
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", mix="sum", num_members=1, seed=0)
    learn.remove_cb(MixMoCallback)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fitted", [True, False])
def test_loading_weights_saved_before_the_conversion(tmp_path, strict, fitted):
    learn = learner(path=tmp_path)
    if fitted:
        learn.fit(1)
    learn.save("before")
    predicted = learn.get_preds()[0]
    to_mixmo(learn, seed=0)
    learn.create_opt()
    assert_rejected(
        learn,
        lambda learner: learner.load("before", strict=strict),
        r"saved before.*\n.*to_mixmo\(learn",
    )
    learn.save("after")
    assert learn.load("after") is learn
    again = to_mixmo(learner(path=tmp_path).load("before", with_opt=fitted), seed=0)
    torch.testing.assert_close(again.get_preds()[0], predicted, rtol=1e-3, atol=1e-4)


def test_torch_rejects_weights_of_another_network():
    model = to_mixmo(learner()).model
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"elsewhere": torch.zeros(1)})
