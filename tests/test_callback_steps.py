"""Small decisions of `MixMoCallback` in a fit: progress, copies, processes, metrics, companions."""

from types import SimpleNamespace

import pytest
import torch
from fastai.callback import schedule  # noqa: F401  # adds lr_find to each Learner
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import AvgMetric, Learner, Recorder
from fastai.losses import CrossEntropyLossFlat
from fasttransform import Transform
from learners import BatchRecorder, SkipBackward, make_learner, small_network
from synthetic import fastai_dls, mixmo_dls

from mixmo_fastai.callbacks import mixmo
from mixmo_fastai.callbacks.mixmo import MixMoCallback, MixMoGuard, add_companions
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.fastai import MemberAccuracy
from mixmo_fastai.metrics.members import MemberLogits
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.runtime.processes import Processes


def test_the_readout_knows_the_progress_of_training(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(mixmo, "set_readout_progress", lambda _, progress: seen.append(progress))
    learn = make_learner(mixmo_dls(batch_size=40), cbs=[SkipBackward()], path=tmp_path)
    learn.fit(2, 0.0)
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75])  # two steps an epoch
    seen.clear()
    learn.lr_find(num_it=3, show_plot=False, stop_div=False, suggest_funcs=())
    assert set(seen) == {1.0}


class AddNoise(Transform):
    """Make each copy of an image distinct."""

    def encodes(self, x: torch.Tensor):
        return x + torch.rand_like(x) * 0.1 if x.is_floating_point() else x


def test_two_copies_of_an_image_are_augmented_separately():
    """One copy for each of two members; a batch of one copy would show images as they are."""
    recorder = BatchRecorder()
    callback = MixMoCallback(seed=0, batch_repetitions=1)
    dls = fastai_dls(after_batch=[AddNoise()])
    make_learner(dls, callback=callback, cbs=[recorder, SkipBackward()]).fit(1, 0.0)
    assert len(recorder.seen[0][0].flatten(0, 1).flatten(1).unique(dim=0)) == 12 * 2


@pytest.mark.parametrize(("count", "fits"), [(1, True), (2, True), (5, False), (24, True)])
def test_batches_are_split_evenly_among_processes(monkeypatch, count, fits):
    """A batch has 12 images, each twice."""
    monkeypatch.setattr(mixmo, "process_group", lambda: Processes(0, count))
    callback = MixMoCallback(seed=0, batch_repetitions=2)
    recorder = BatchRecorder()
    learn = make_learner(callback=callback, cbs=[recorder, SkipBackward()])
    if fits:
        learn.fit(1, 0.0)
        assert len(recorder.seen[0][0]) == 24 // count
    else:
        with pytest.raises(InputError, match="24 images cannot be split evenly among 5 processes"):
            learn.fit(1, 0.0)


def test_loaders_inside_of_fastais_distributed_loader_are_rejected():
    learn = make_learner()

    class Wrapped(Callback):
        order = 8

        def before_train(self):
            self.learn.dl = SimpleNamespace(dl=self.learn.dls.train)

    with pytest.raises(InputError, match="distrib_ctx must not split them"):
        learn.fit(1, 0.0, cbs=Wrapped())


class Shapes(Callback):
    """Record the shapes that fastai's metrics of the training set get."""

    order, run_valid = 49, False  # before the Recorder

    def __init__(self):
        super().__init__()
        self.seen = set()

    def after_batch(self):
        shapes = [tuple(each.shape) for each in (self.learn.pred, *self.learn.yb)]
        self.seen.add(tuple(shapes))
        assert self.learn.yb[0].dtype == torch.int64  # classes, not the weights of the loss


@pytest.mark.parametrize("train_metrics", [False, True])
def test_training_metrics_get_one_row_per_image_and_member(train_metrics):
    shapes = Shapes()
    callback = MixMoCallback(seed=0, batch_repetitions=1)
    learn = make_learner(callback=callback, cbs=[shapes, SkipBackward()])
    learn.recorder.train_metrics = train_metrics
    learn.fit(1, 0.0)
    as_seen_by_the_network = ((12, 2, 3), (12, 2), (12, 2))  # with the weights of the loss
    assert shapes.seen == {((24, 3), (24,)) if train_metrics else as_seen_by_the_network}


class SkipSecondBatch(Callback):
    order, run_valid = 20, False

    def before_batch(self):
        if self.learn.iter == 1:
            raise CancelBatchException


def test_training_metrics_with_a_skipped_batch_count_the_batch_before_again():
    """As in any Learner of fastai."""
    seen = []

    def rows(preds, targets):
        seen.append((preds.clone(), targets.clone()))
        return preds.sum()

    learn = make_learner(cbs=[SkipSecondBatch(), SkipBackward()])
    learn.metrics = learn.metrics + [AvgMetric(rows)]
    learn.recorder.train_metrics = True
    learn.fit(1, 0.0)
    (first, targets), (again, same) = seen[:2]
    assert len(first) == len(targets) == 96
    assert torch.equal(first, again)
    assert torch.equal(targets, same)


def test_a_recorder_is_not_required():
    shapes = Shapes()
    learn = make_learner(cbs=[shapes, SkipBackward()])
    learn.remove_cb(Recorder)
    learn.fit(1, 0.0)
    assert shapes.seen == {((48, 2, 3), (48, 2), (48, 2))}


def test_epochs_of_a_rate_search_are_not_counted(tmp_path):
    learn = make_learner(mixmo_dls(batch_size=40), cbs=[SkipBackward()], path=tmp_path)
    learn.fit(1, 0.0)
    learn.lr_find(num_it=5, show_plot=False, stop_div=False, suggest_funcs=())
    learn.fit(2, 0.0)
    assert learn.mix_mo.epochs_trained == 3
    assert learn.mix_mo.draws is None
    callback = MixMoCallback(seed=0)
    callback.epochs_trained = 4
    callback.learn = SimpleNamespace(epoch=2)
    assert callback._epoch == 4
    callback.learn.lr_finder = None
    assert callback._epoch == 6
    assert callback.current_mix_prob() == 0.5
    with pytest.raises(AssertionError, match="before_train was not called"):
        _ = callback._epoch_draws


class TestChecks:
    def test_other_networks_are_rejected(self):
        learn = Learner(
            fastai_dls(), small_network(), loss_func=CrossEntropyLossFlat(), cbs=MixMoCallback()
        )
        learn.remove_cb(learn.progress)
        with pytest.raises(InputError, match="needs a MixMoModel; the Learner has a Sequential"):
            learn.fit(1)

    def test_a_second_callback_is_rejected(self):
        learn = make_learner(cbs=[MixMoCallback("linear")])
        with pytest.raises(InputError, match="more than one MixMoCallback"):
            learn.fit(1)

    def test_the_loss_is_wrapped_once(self):
        learn = make_learner(cbs=[SkipBackward()])
        learn.fit(1, 0.0)
        wrapped = learn.loss_func
        assert isinstance(wrapped, MixMoLoss)
        learn.fit(1, 0.0)
        assert learn.loss_func is wrapped

    def test_only_metrics_of_this_package_are_checked(self, monkeypatch):
        checked, metric = [], MemberAccuracy()
        monkeypatch.setattr(metric, "check", checked.append)
        learn = make_learner(cbs=[SkipBackward()])  # has fastai's accuracy, without `check`
        learn.metrics = [*learn.metrics, metric]
        learn.fit(1, 0.0)
        assert checked == [learn]

    def test_mask_options_must_be_a_mapping(self):
        with pytest.raises(InputError, match="mask_options must map names to values"):
            MixMoCallback("patchup", mask_options=[("block_size", 3)])
        assert MixMoCallback("patchup", mask_options={"block_size": 3}).mask_options == {
            "block_size": 3
        }
        assert MixMoCallback().mask_options == {}
        with pytest.raises(InputError, match="'size' of mask kind"):
            MixMoCallback(lambda area, shape, generator: area, mask_options={"size": 3})

    def test_masks_of_named_kinds_are_drawn_to_check_their_options(self):
        with pytest.raises(InputError, match="block_size must be an odd integer"):
            MixMoCallback("patchup", mask_options={"block_size": 4})

        def fails(area, shape, generator):
            raise AssertionError("called without features")

        assert MixMoCallback(fails).mix is fails  # may need features of another size

    def test_numbers_out_of_range_are_rejected(self):
        for name in ("mix_prob", "decay_start", "early_span", "msda_prob", "input_repetition"):
            with pytest.raises(InputError, match=name):
                MixMoCallback(**{name: 1.5})
        for options in ({"msda": "none"}, {"msda": None}, {"early_repetition": 0.0}):
            assert MixMoCallback(**options).msda is None
        assert MixMoCallback(msda="mixup").msda == "mixup"


class TestGuard:
    def test_it_is_added_once(self):
        learn = make_learner()
        for _ in range(2):
            add_companions(learn)
            for kind in (MixMoGuard, MemberLogits):
                assert sum(isinstance(callback, kind) for callback in learn.cbs) == 1

    @pytest.mark.parametrize("num_members", [1, 2, 3])
    def test_several_members_are_not_trained_without_the_callback(self, num_members):
        callback = MixMoCallback("sum", seed=0)
        learn = make_learner(callback=callback, num_members=num_members, cbs=[SkipBackward()])
        learn.add_cb(MixMoGuard())
        learn.fit(1, 0.0)
        learn.remove_cb(callback)
        if num_members == 1:
            learn.fit(1, 0.0)
        else:
            with pytest.raises(InputError, match=f"has {num_members} members, but the Learner has"):
                learn.fit(1, 0.0)

    def test_other_networks_are_trained(self):
        learn = Learner(fastai_dls(), small_network(), loss_func=CrossEntropyLossFlat())
        learn.remove_cb(learn.progress)
        learn.add_cb(MixMoGuard())
        with learn.no_logging():
            learn.fit(1, 0.0)
        assert learn.epoch == 0
