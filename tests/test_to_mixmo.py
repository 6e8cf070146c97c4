"""`to_mixmo` converts a Learner, or leaves it unchanged."""

import copy

import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.vision.learner import vision_learner
from learners import small_network
from synthetic import fastai_dls
from torch import nn
from torchvision.models import resnet18

from mixmo_fastai import MixMoCallback, create_model, mixmo_learner, to_mixmo
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.errors import InputError

SCHEDULE = ("batch_repetitions", "early_repetition", "early_span")


def schedule_of(learn):
    return tuple(getattr(learn.mix_mo, name) for name in SCHEDULE)


class TestToMixmo:
    @pytest.mark.slow
    @pytest.mark.parametrize("fitted", [False, True])
    def test_vision_learner_is_converted(self, fitted, tmp_path):
        learn = vision_learner(
            fastai_dls(num_train=24), resnet18, pretrained=False, normalize=False,
            loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path,
        )  # fmt: skip
        learn.remove_cb(learn.progress)
        with learn.no_logging():
            if fitted:
                learn.fine_tune(1)
            before = learn.get_preds()[0]
            assert to_mixmo(learn, mix="linear", seed=0, batch_repetitions=2) is learn
            torch.testing.assert_close(learn.get_preds()[0], before, rtol=1e-3, atol=1e-4)
            weights = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
            learn.fit_one_cycle(1, 1e-2)
        changed = [n for n, p in learn.model.named_parameters() if not torch.equal(p, weights[n])]
        assert len(changed) == len(weights)
        assert (learn.mix_mo.mix, learn.mix_mo.batch_repetitions) == ("linear", 2)
        assert len(learn.opt.hypers) == 3  # the groups of fastai's ResNets
        assert learn.opt_func is Adam

    def test_mixmo_model_and_independent_members(self):
        model = create_model("wrn10_1", 3)
        learn = Learner(fastai_dls(), model, loss_func=CrossEntropyLossFlat())
        assert to_mixmo(learn).model is model
        learn = Learner(fastai_dls(), small_network(), loss_func=CrossEntropyLossFlat())
        encoders = to_mixmo(learn, independent=True, seed=0).model.encoders
        both = torch.stack([encoder.weight.flatten() for encoder in encoders]).detach()
        assert torch.corrcoef(both)[0, 1].abs() < 0.3

    def test_learner_is_unchanged_after_an_error(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        learn = Learner(fastai_dls(), model, loss_func=CrossEntropyLossFlat())
        for arguments, message in (
            ({}, "has no convolution"),
            ({"alpa": 1}, "Did you mean 'alpha'"),
            ({"alpha": -1}, "alpha"),
            ({"num_members": 1}, "member"),
        ):
            with pytest.raises(InputError, match=message):
                to_mixmo(learn, **arguments)
        assert learn.model is model
        assert isinstance(learn.loss_func, CrossEntropyLossFlat)
        assert not learn.cbs.filter(lambda cb: isinstance(cb, MixMoCallback))

    def test_network_with_too_few_outputs_is_rejected_before_any_change(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.append(nn.Linear(4, 2))
        learn = Learner(fastai_dls(), model, loss_func=CrossEntropyLossFlat())
        with pytest.raises(InputError, match="The network has 2 outputs, the data 3 classes"):
            to_mixmo(learn)
        assert learn.model is model
        own = Learner(fastai_dls(), model, loss_func=lambda pred, _: pred.square().mean())
        assert to_mixmo(own).model.num_members == 2  # as for an ordinal loss
        model[-1] = nn.Linear(4, 4)  # more outputs than classes are possible, as in any Learner
        assert to_mixmo(learn).model.num_members == 2

    def test_one_member_is_rejected_before_any_change(self):
        model = small_network()
        learn = Learner(fastai_dls(), model, loss_func=CrossEntropyLossFlat())
        with pytest.raises(InputError, match="one member"):
            to_mixmo(learn, num_members=1)
        assert learn.model is model
        assert to_mixmo(learn).model.num_members == 2

    def test_second_conversion_and_wrong_num_members_are_rejected(self):
        learn = Learner(fastai_dls(), create_model("wrn10_1", 3), loss_func=CrossEntropyLossFlat())
        with pytest.raises(InputError, match=r"num_members must be 2.*got 3"):
            to_mixmo(learn, num_members=3)
        to_mixmo(learn)
        with pytest.raises(InputError, match="already has a MixMoCallback"):
            to_mixmo(learn)


class TestDefaultMixing:
    """Trained networks are fine-tuned with other settings than those of new networks."""

    @property
    def of_fine_tuning(self):
        recipe = load_recipe("fine-tune/cut-mixmo")
        return tuple(getattr(recipe.mix, name) for name in SCHEDULE)

    published = (4, None, 0.4)

    def learner(self):
        return Learner(fastai_dls(), small_network(), loss_func=CrossEntropyLossFlat())

    def test_to_mixmo_has_those_of_the_recipe(self):
        assert schedule_of(to_mixmo(self.learner())) == self.of_fine_tuning
        learn = to_mixmo(self.learner(), batch_repetitions=4, early_repetition=None, early_span=0.4)
        assert schedule_of(learn) == self.published
        learn = to_mixmo(self.learner(), early_span=0.8)
        assert schedule_of(learn) == (*self.of_fine_tuning[:2], 0.8)
        assert schedule_of(to_mixmo(self.learner(), independent=True)) == self.published
        model = create_model("wrn10_1", 3)
        learn = Learner(fastai_dls(), model, loss_func=CrossEntropyLossFlat())
        assert schedule_of(to_mixmo(learn)) == self.published

    def test_mixmo_learner_has_them_for_trained_networks(self, tmp_path):
        assert schedule_of(mixmo_learner(fastai_dls(), small_network())) == self.of_fine_tuning
        learn = mixmo_learner(fastai_dls(), small_network(), batch_repetitions=1)
        assert schedule_of(learn) == (1, *self.of_fine_tuning[1:])
        trained = small_network()
        learn = mixmo_learner(fastai_dls(), lambda: copy.deepcopy(trained))
        assert schedule_of(learn) == self.of_fine_tuning
        weights = tmp_path / "weights.pt"
        torch.save(resnet18().state_dict(), weights)
        learn = mixmo_learner(fastai_dls(), "resnet18", weights=weights)
        assert schedule_of(learn) == self.of_fine_tuning

    def test_mixmo_learner_has_the_published_ones_for_new_networks(self):
        assert schedule_of(mixmo_learner(fastai_dls(), "wrn10_1")) == self.published
        assert (
            schedule_of(mixmo_learner(fastai_dls(), create_model("wrn10_1", 3))) == self.published
        )
        assert schedule_of(mixmo_learner(fastai_dls(), small_network)) == self.published
        learn = mixmo_learner(fastai_dls(), small_network(), independent=True)
        assert schedule_of(learn) == self.published
