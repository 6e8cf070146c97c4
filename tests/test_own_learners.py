"""Learners with networks, targets and callbacks of the user's own."""

import pickle
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.schedule import minimum
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi
from fastai.torch_core import params
from learners import BatchRecorder, SkipBackward, make_learner, quiet, small_network, state
from synthetic import fastai_dls, mixmo_dls
from torch import nn
from torch.utils.data import TensorDataset

from mixmo_fastai import mixmo_learner, to_mixmo
from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.preview import preview_batch
from mixmo_fastai.metrics.fastai import MemberAccuracy
from mixmo_fastai.models.convert import convert_to_mixmo
from mixmo_fastai.models.readout import Readout


def loaders(targets):
    data = TensorDataset(torch.rand(len(targets), 3, 8, 8), targets)
    return DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)


class TestLoss:
    def test_callbacks_of_any_order_see_the_mean_over_members(self):
        class SeenLosses(Callback):
            run_valid = False

            def __init__(self, order):
                super().__init__()
                self.order, self.losses = order, []

            def after_loss(self):
                self.losses.append(self.learn.loss.item())

        early, late = SeenLosses(-10), SeenLosses(50)
        make_learner(cbs=[early, late, SkipBackward()]).fit(1, 0.0)
        assert early.losses == late.losses
        assert early.losses[0] < 1.6  # ln 3 is 1.1

    def test_the_loss_of_a_skipped_batch_is_the_mean_over_members(self):
        class Skip(Callback):
            run_valid = False

            def after_loss(self):
                raise CancelBatchException

        learn = make_learner(cbs=[Skip()])
        learn.fit(1, 0.0)
        assert learn.recorder.values[0][0] < 1.6


class TestEpochs:
    def test_a_continued_fit_draws_as_the_whole_one(self):
        def inputs_of(learn, **kwargs):
            recorder = BatchRecorder()
            with learn.added_cbs([recorder]):
                learn.fit(2, 0.0, **kwargs)
            return [seen[0] for seen in recorder.seen if seen[0].ndim == 5]

        whole = inputs_of(make_learner(cbs=[SkipBackward()]))
        learn = make_learner(cbs=[SkipBackward()])
        continued = inputs_of(learn, start_epoch=1)
        num_steps = len(learn.dls.train)
        assert len(continued) == num_steps
        assert all(map(torch.equal, continued, whole[num_steps:]))
        assert learn.mix_mo.epochs_trained == 2
        again = inputs_of(learn)  # another fit goes on with the next epochs
        assert not torch.equal(again[0], whole[0])
        assert not torch.equal(again[0], whole[num_steps])

    @pytest.mark.parametrize("end", ["lr_find", "interrupt"])
    def test_no_draws_are_pickled(self, end):
        class Interrupt(Callback):
            run_valid = False

            def after_batch(self):
                raise KeyboardInterrupt

        learn = make_learner()
        if end == "lr_find":
            learn.lr_find(num_it=12, show_plot=False, suggest_funcs=(minimum,))
            assert learn.mix_mo.draws is None
        else:
            with pytest.raises(KeyboardInterrupt), learn.added_cbs([Interrupt()]):
                learn.fit(1, 0.0)
            assert learn.mix_mo.draws is not None
        learn.mix_mo.learn = None
        assert pickle.loads(pickle.dumps(learn.mix_mo)).draws is None


class TestNetworks:
    def test_a_fused_network_can_replace_the_network_of_the_learner(self):
        for arch in ("wrn10_1", small_network()):
            learn = quiet(mixmo_learner(fastai_dls(), arch, seed=0))
            learn.remove_cb(MixMoCallback)
            advice = r"learn.model = learn.model.fuse\(\), then learn.create_opt\(\)"
            with pytest.raises(InputError, match=advice):
                learn.fit(1, 0.0)
            learn.model = learn.model.fuse()
            learn.create_opt()
            learn.metrics = [accuracy]
            learn.fit(1, 0.01)
            ((_, *validated),) = learn.recorder.values
            assert validated == pytest.approx([*learn.validate()], rel=1e-5)
            assert validated[1] > 0.2

    @pytest.mark.parametrize("convert", [mixmo_learner, to_mixmo])
    def test_the_splitter_of_ones_own_network_is_converted(self, convert):
        def splitter(model):
            yield params(model[:2])
            yield params(model[2:])

        if convert is mixmo_learner:
            learn = mixmo_learner(fastai_dls(), small_network(), splitter=splitter, seed=0)
        else:
            loss = CrossEntropyLossFlat()
            learn = Learner(fastai_dls(), small_network(), loss_func=loss, splitter=splitter)
            to_mixmo(learn, seed=0)
        quiet(learn).freeze()
        before = state(learn)
        learn.fit(1, 0.1)
        changed = {
            n.partition(".")[0] for n, t in state(learn).items() if not torch.equal(t, before[n])
        }
        assert changed == {"heads"}

    def test_splitters_of_the_mixmo_network_are_used_as_they_are(self):
        def splitter(model):
            return [params(model.encoders), [*params(model.core), *params(model.heads)]]

        learn = mixmo_learner(fastai_dls(), small_network(), splitter=splitter)
        assert learn.splitter is splitter

    @pytest.mark.parametrize("name", ["k", "n", "c"])
    def test_a_width_of_one_letter_is_no_number_of_classes(self, name):
        def build(width):
            return nn.Sequential(
                nn.Conv2d(3, 8 * width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(8 * width, 3),
            )  # fmt: skip

        functions = {
            "k": lambda k=4: build(k), "n": lambda n=4: build(n), "c": lambda c=4: build(c)
        }  # fmt: skip
        learn = mixmo_learner(fastai_dls(), functions[name])
        assert learn.model.encoders[0].out_channels == 32

    def test_a_bound_width_of_one_letter_is_no_number_of_classes(self):
        def build(num_classes, k=2):
            return nn.Sequential(
                nn.Conv2d(3, 8 * k, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(8 * k, num_classes),
            )  # fmt: skip

        learn = mixmo_learner(fastai_dls(), partial(build, k=4))
        assert learn.model.encoders[0].out_channels == 32

    def test_all_other_required_arguments_are_named(self):
        def build(n_in, n_out):
            return nn.Sequential(nn.Conv2d(n_in, 8, 8), nn.Flatten(), nn.Linear(8, n_out))

        with pytest.raises(InputError, match=r"requires n_in; only .* as n_out\.\nBind the rest"):
            mixmo_learner(fastai_dls(), build)

    @pytest.mark.parametrize(("channels", "groups"), [(3, 3), (4, 2)])
    def test_a_grouped_first_convolution_is_trained(self, channels, groups):
        network = small_network()
        network[0] = nn.Conv2d(channels, 12, 3, groups=groups)
        network[-1] = nn.Linear(12, 3)
        images, labels = torch.rand(32, channels, 8, 8), torch.randint(3, (32,))
        data = TensorDataset(images, labels)
        dls = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
        learn = quiet(Learner(dls, network, loss_func=CrossEntropyLossFlat()))
        to_mixmo(learn, seed=0)
        assert learn.model.in_channels == channels
        learn.fit(1, 0.01)
        assert torch.isfinite(learn.recorder.losses[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_the_mask_shape_of_a_derived_convolution_in_other_precisions(self, dtype):
        class Padded(nn.Conv2d):
            def forward(self, x):
                return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

        network = small_network()
        network[0] = Padded(3, 8, 3)
        model = convert_to_mixmo(network, image_size=8).to(dtype)
        assert model.mask_shape(8, 8) == (8, 8, 8)


class TestTargets:
    def test_classes_in_a_column(self):
        learn = Learner(
            loaders(torch.arange(48)[:, None] % 3),
            small_network(),
            loss_func=CrossEntropyLossFlat(),
            metrics=[accuracy, MemberAccuracy()],
        )
        to_mixmo(quiet(learn), seed=0, perturbation=0.0)
        *_, ensemble, members = learn.validate()
        assert members == pytest.approx(ensemble)  # equal members

    @pytest.mark.parametrize("column", [False, True])
    def test_one_label_that_an_image_has_or_not(self, column):
        targets = (torch.arange(48) % 2).float()
        network = small_network()
        network[-1] = nn.Linear(8, 1)
        learn = mixmo_learner(
            loaders(targets[:, None] if column else targets),
            network,
            num_classes=1,
            loss_func=BCEWithLogitsLossFlat(),
            perturbation=0.0,
        )
        assert learn.metrics[0].func is accuracy_multi
        _, ensemble, members = quiet(learn).validate()
        assert members == pytest.approx(ensemble)
        learn.fit(1, 0.01)

    def test_several_numbers_are_shown_as_numbers(self):
        targets = torch.stack([torch.full((48,), 1.5), torch.full((48,), -2.0)], dim=1)
        network = small_network()
        network[-1] = nn.Linear(8, 2)
        learn = mixmo_learner(loaders(targets), network, num_classes=2, loss_func=MSELossFlat())
        assert preview_batch(learn, 2).labels == [["1.5, -2"] * 2] * 2


def test_a_preview_does_not_change_the_readout():
    class Late(Readout):
        def __init__(self):
            super().__init__()
            self.progress = 0.0

        def set_progress(self, progress):
            self.progress = progress

        def forward(self, maps, masks):
            return maps.mean(dim=(2, 3)) * (1 + self.progress)

    learn = quiet(mixmo_learner(mixmo_dls(), "wrn10_1", readout=Late(), seed=0))
    learn.fit(1, 0.01)
    progress = learn.model.readout.progress
    assert progress > 0.5
    preview_batch(learn, 2)
    assert learn.model.readout.progress == progress
