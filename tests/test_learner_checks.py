"""What cannot train a MixMo network is refused at once, in words, and changes nothing."""

from functools import partial

import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from synthetic import foreign_dls, mixmo_dls
from torch import nn
from torch.utils.data import TensorDataset

from mixmo_fastai import MixMoCallback, create_model, mixmo_learner, to_mixmo
from mixmo_fastai.errors import InputError


def small():
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
    learn = Learner(dls or foreign_dls(), model or small(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def everything_of(learn):
    tensors = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    return {**vars(learn), "cbs": [*learn.cbs]}, tensors


def assert_refused(learn, call, message):
    attributes, tensors = everything_of(learn)
    with pytest.raises(InputError, match=message) as caught:
        call(learn)
    assert len(str(caught.value).splitlines()) <= 3
    now, tensors_now = everything_of(learn)
    assert now == attributes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_now.items())


BATCHES = {
    (1, 2): r"yields 1 input and 2 targets.\nTrain a Learner for each target",
    (2, 1): r"yields 2 inputs and 1 target.\nJoin the inputs",
    (1, 0): r"yields 1 input and 0 targets.\nPass loaders of pairs",
}


@pytest.mark.parametrize("counts", BATCHES)
def test_batches_of_more_than_a_pair(counts):
    message = BATCHES[counts]
    assert_refused(learner(loaders(*counts)), to_mixmo, message)
    with pytest.raises(InputError, match=message):
        mixmo_learner(loaders(*counts), small(), num_classes=3, loss_func=CrossEntropyLossFlat())
    by_hand = learner(loaders(*counts), create_model("wrn10_1", 3), cbs=MixMoCallback(seed=0))
    before = {name: tensor.clone() for name, tensor in by_hand.model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        by_hand.fit(1)
    now = by_hand.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_fastais_mix_callbacks(mix):
    message = rf"fastai's {mix.__name__} cannot be combined.*\n.*remove_cb\({mix.__name__}\)"
    hint = f"msda='{mix.__name__.lower()}'"
    learn = learner(cbs=mix())
    assert_refused(learn, to_mixmo, message)
    learn.remove_cb(mix)
    to_mixmo(learn)
    with pytest.raises(InputError, match=hint):
        learn.fit(1, cbs=mix())
    for given in (mix, mix(), [mix()]):
        with pytest.raises(InputError, match=message):
            mixmo_learner(mixmo_dls(), "wrn10_1", cbs=given)


def test_a_second_mixmo_callback():
    with pytest.raises(InputError, match="must not contain a MixMoCallback"):
        mixmo_learner(mixmo_dls(), "wrn10_1", cbs=[MixMoCallback("linear")])


def test_an_optimizer_made_for_the_network_before():
    model = small()
    made = OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.1))
    assert_refused(learner(model=model, opt_func=made), to_mixmo, "opt_func must be a function")
    with pytest.raises(InputError, match="opt_func must be a function"):
        mixmo_learner(mixmo_dls(), model, opt_func=made)
    own = create_model("wrn10_1", 3)
    fits = OptimWrapper(opt=torch.optim.SGD(own.parameters(), lr=0.1))
    learn = mixmo_learner(mixmo_dls(), own, opt_func=fits)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    made_later = partial(OptimWrapper, opt=torch.optim.SGD)
    assert to_mixmo(learner(opt_func=made_later)).opt is None


def converted():
    return to_mixmo(learner(), seed=0)


def of_ours():
    learn = mixmo_learner(mixmo_dls(), small(), seed=0)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def by_hand():
    learn = learner(model=create_model("wrn10_1", 3), cbs=MixMoCallback(seed=0))
    learn.fit(1)
    return learn


@pytest.mark.parametrize("make", [converted, of_ours, by_hand])
def test_a_fit_without_the_callback(make):
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


def test_the_plain_network_may_go_on_without_the_callback():
    learn = converted()
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
def test_weights_from_before_the_conversion(tmp_path, strict, fitted):
    learn = learner(path=tmp_path)
    if fitted:
        learn.fit(1)
    learn.save("before")
    predicted = learn.get_preds()[0]
    to_mixmo(learn, seed=0)
    learn.create_opt()
    assert_refused(
        learn, lambda each: each.load("before", strict=strict), r"saved before.*\n.*to_mixmo\(learn"
    )
    learn.save("after")
    assert learn.load("after") is learn
    again = to_mixmo(learner(path=tmp_path).load("before", with_opt=fitted), seed=0)
    torch.testing.assert_close(again.get_preds()[0], predicted, rtol=1e-3, atol=1e-4)


def test_weights_of_another_network_are_torchs_to_refuse():
    model = to_mixmo(learner()).model
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"elsewhere": torch.zeros(1)})
