"""`mixmo_learner` and the arguments of `MixMoCallback`."""

import pytest
import torch
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from learners import equal, make_learner, state
from synthetic import fastai_dls, mixmo_dls
from torch import nn

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import learner_from_recipe, mixmo_learner
from mixmo_fastai.metrics import fastai as metrics
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models import create_model


class TestInvalidInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mix": "cutmx"}, "Did you mean 'cutmix'"),
            ({"alpha": 0}, "alpha"),
            ({"mix_prob": 1.5}, "mix_prob must be from 0 to 1; got 1.5"),
            ({"decay_start": -0.1}, "decay_start"),
            ({"weight_root": 0.5}, "weight_root"),
            ({"batch_repetitions": 0}, "batch_repetitions"),
            ({"input_repetition": 2}, "input_repetition"),
            ({"mask_options": 5}, "mask_options must map names to values; got 5"),
            ({"mask_options": {"block_size": 3}}, "'cutmix'.\nIt has no options"),
            (
                {"mix": "patchup", "mask_options": {"block_size": 2}},
                "block_size must be an odd integer",
            ),
            ({"mix": "cow", "mask_options": {"sigma": 2}}, "Unknown option 'sigma'"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(InputError, match=message):
            MixMoCallback(**arguments)

    def test_other_models_are_refused(self):
        learn = Learner(fastai_dls(), nn.Linear(2, 2), loss_func=nn.CrossEntropyLoss())
        learn.add_cb(MixMoCallback())
        with pytest.raises(InputError, match=r"\AMixMoCallback needs a MixMoModel; .* Linear"):
            learn.fit(1)

    def test_optimizer_of_another_model_is_refused(self):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        learn = Learner(fastai_dls(), flat, loss_func=nn.CrossEntropyLoss())
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            learn.fit(1)
            learn.model = create_model("wrn10_1", 3)
            learn.add_cb(MixMoCallback())
            with pytest.raises(InputError, match=r"learn.create_opt\(\)"):
                learn.fit(1)
            learn.create_opt()
            learn.fit(1)

    def test_two_callbacks_are_refused(self):
        with pytest.raises(InputError, match="more than one MixMoCallback"):
            make_learner(cbs=[MixMoCallback()]).fit(1)

    def test_mixup_callback_of_fastai_is_refused(self):
        with pytest.raises(InputError, match="MixUp cannot be combined"):
            make_learner(cbs=[MixUp()]).fit(1)

    def test_mixing_kinds_with_one_member_are_refused(self):
        with pytest.raises(InputError, match="needs at least two members"):
            make_learner(num_members=1).fit(1)
        with pytest.raises(InputError, match="needs at least two members"):
            mixmo_learner(mixmo_dls(), "wrn10_1", num_members=1)

    def test_loaders_without_classes_require_num_classes(self):
        plain = torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)] * 4, batch_size=2)
        dls = DataLoaders(plain, plain)
        with pytest.raises(InputError, match="num_classes=10"):
            mixmo_learner(dls, "wrn10_1", loss_func=CrossEntropyLossFlat())


class TestMixmoLearner:
    def test_training_reaches_a_high_accuracy(self):
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            learn.fit_one_cycle(4, 0.05)
        _, ensemble, members = learn.validate()
        assert ensemble > 0.9
        assert members > 0.9

    def test_arguments_reach_callback_and_learner(self):
        learn = mixmo_learner(
            mixmo_dls(), "wrn10_1", mix="linear", num_members=3, alpha=5.0, seed=1, lr=0.25, wd=0.1
        )
        assert (learn.mix_mo.mix, learn.mix_mo.alpha, learn.lr, learn.wd) == (
            "linear",
            5,
            0.25,
            0.1,
        )
        assert learn.model.num_members == 3
        assert isinstance(learn.loss_func, MixMoLoss)

    def test_default_optimizer_is_the_published_one(self):
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=1)
        learn.create_opt()
        group = learn.opt.opt.param_groups[0]
        assert isinstance(learn.opt.opt, torch.optim.SGD)
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 6e-4)
        groups = learn.opt.opt.param_groups
        assert sum(len(g["params"]) for g in groups) == len(list(learn.model.parameters()))

    def test_seed_determines_the_initial_weights(self):
        first, second = (mixmo_learner(mixmo_dls(), "wrn10_1", seed=4) for _ in "ab")
        assert equal(state(first), state(second))

    @pytest.mark.filterwarnings("ignore:You are shadowing an attribute")
    def test_hooks_that_read_activations(self):
        learn = make_learner(cbs=[ActivationStats(with_hist=False)])
        learn.fit(1, 0.01)
        assert len(learn.activation_stats.stats) > 0

    def test_channels_are_read_from_fastai_loaders(self):
        learn = mixmo_learner(fastai_dls(), "wrn10_1", loss_func=CrossEntropyLossFlat())
        assert learn.model.in_channels == 3


class TestMemberAccuracy:
    def test_member_accuracy_is_the_mean_over_members(self):
        learn = make_learner()
        learn.metrics = [accuracy, metrics.MemberAccuracy()]
        learn.fit(1, 0.01)
        _, _, value = learn.validate(ds_idx=2)
        num_correct, num_seen = 0.0, 0
        learn.model.eval()
        for x, y in learn.dls[2]:
            logits = learn.model.member_logits(x)
            num_correct += (logits.argmax(2) == y[:, None]).float().mean(1).sum().item()
            num_seen += len(y)
        assert value == pytest.approx(num_correct / num_seen)


@pytest.mark.parametrize("convert", [lambda callback: callback, lambda callback: [callback]])
def test_learner_from_recipe_takes_one_callback_or_a_list(convert):
    callback = ActivationStats()
    learn = learner_from_recipe(
        Recipe(), mixmo_dls(), create_model("wrn10_1", 3), cbs=convert(callback)
    )
    assert callback in learn.cbs


def test_a_range_of_predictions_is_for_vision_learner():
    with pytest.raises(
        InputError, match=r"no argument 'y_range'\.\nPass it to vision_learner, and"
    ):
        mixmo_learner(mixmo_dls(), "wrn10_1", y_range=(0, 1))
