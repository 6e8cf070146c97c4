from contextlib import nullcontext

import fastai.callback.schedule  # noqa: F401
import pytest
import torch
from fastai.callback.core import CancelFitException, FetchPredsCallback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Recorder
from fastai.metrics import accuracy
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai import defer_readbacks
from mixmo_fastai.callbacks.deferred import DeferredProgressCallback, DeferredRecorder


def make_learner(recorder, dls=None):
    torch.manual_seed(0)
    dls = dls or mixmo_dls(batch_size=5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(dls.train.one_batch()[0][0].numel(), 3))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy, default_cbs=True)
    learn.remove_cbs(ProgressCallback)
    learn.remove_cbs(Recorder)
    learn.add_cb(recorder)
    return learn


@pytest.mark.parametrize("every", [1, 7, 20, 1000])
def test_recorded_values_equal_those_of_fastai(every):
    records = []
    for recorder in (Recorder(), DeferredRecorder(every=every)):
        learn = make_learner(recorder)
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2)
        assert learn.recorder is recorder
        records.append(recorder)
    reference, deferred = records
    assert len(deferred.losses) == len(reference.losses) == 2 * 17
    assert torch.equal(torch.stack(deferred.losses), torch.stack(reference.losses))
    assert deferred.lrs == reference.lrs
    assert deferred.iters == reference.iters
    for actual, expected in zip(deferred.values, reference.values, strict=True):
        assert list(actual) == pytest.approx(list(expected))
    assert deferred.metric_names == reference.metric_names


def test_losses_are_fetched_in_groups():
    lengths = []
    recorder = DeferredRecorder(every=6)
    original = recorder.after_batch
    recorder.after_batch = lambda: (original(), lengths.append(len(recorder.fetched)))
    learn = make_learner(recorder)
    with learn.no_logging():
        learn.fit(1, 1e-3)
    training = lengths[:17]
    assert training == [0] * 5 + [6] * 6 + [12] * 6
    assert len(recorder.losses) == 17


def test_lr_find_works_with_the_deferred_recorder():
    learn = make_learner(DeferredRecorder())
    with learn.no_bar():
        suggestion = learn.lr_find(show_plot=False, num_it=30)
    assert 0 < suggestion.valley < 10
    assert len(learn.recorder.losses) == len(learn.recorder.lrs)


@pytest.mark.parametrize("error", [CancelFitException, KeyboardInterrupt, RuntimeError])
def test_interrupted_epoch_records_all_losses(error):
    learn = make_learner(DeferredRecorder())

    def stop():
        if learn.train_iter == 3:
            raise error("here")

    learn.recorder.before_batch = stop
    caught = nullcontext() if error is CancelFitException else pytest.raises(error)
    with learn.no_logging(), caught:
        learn.fit(1, 1e-3)
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == 3


def test_defer_readbacks_replaces_recorder_and_progress_bar():
    dls = mixmo_dls()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), nn.CrossEntropyLoss())
    learn.recorder.add_time = False
    assert defer_readbacks(learn) is learn
    assert type(learn.recorder) is DeferredRecorder
    assert type(learn.progress) is DeferredProgressCallback
    assert not learn.recorder.add_time
    assert len(learn.cbs.filter(lambda cb: isinstance(cb, Recorder))) == 1
    before = [*learn.cbs]
    defer_readbacks(learn)
    assert [*learn.cbs] == before


def test_defer_readbacks_adds_no_progress_bar():
    dls = mixmo_dls()
    learn = Learner(dls, nn.Flatten(), nn.CrossEntropyLoss())
    learn.remove_cbs(ProgressCallback)
    defer_readbacks(learn)
    assert not hasattr(learn, "progress")


def test_progress_bar_shows_the_latest_fetched_loss(capsys):
    learn = make_learner(DeferredRecorder(every=5))
    learn.add_cb(DeferredProgressCallback())
    shown = []
    original = learn.progress.after_batch
    learn.progress.after_batch = lambda: (original(), shown.append(learn.progress.pbar.comment))
    learn.fit(1, 1e-3)
    losses = [f"{loss.item():.4f}" for loss in learn.recorder.losses]
    assert shown[4:17] == [losses[4]] * 5 + [losses[9]] * 5 + [losses[14]] * 3


def test_losses_on_a_cpu_are_shown_at_each_step():
    learn = make_learner(DeferredRecorder())
    learn.add_cb(DeferredProgressCallback())
    shown = []
    original = learn.progress.after_batch
    learn.progress.after_batch = lambda: (original(), shown.append(learn.progress.pbar.comment))
    learn.fit(1, 1e-3)
    assert shown[:17] == [f"{loss.item():.4f}" for loss in learn.recorder.losses]


def test_deferred_progress_bar_remains_after_no_bar():
    """fastai's `no_bar` adds its own progress bar afterwards."""
    learn = defer_readbacks(make_learner(Recorder()))
    learn.add_cb(DeferredProgressCallback())
    with learn.no_bar():
        learn.fit(1, 1e-3)
    reads = []
    plain = ProgressCallback.after_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressCallback, "after_batch", lambda self: reads.append(plain(self)))
        learn.fit(1, 1e-3)
    assert type(learn.progress) is ProgressCallback
    assert not reads


def test_predictions_are_gathered_with_the_deferred_progress_bar():
    """fastai removes the recorder for this pass."""
    learn = make_learner(DeferredRecorder())
    learn.add_cb(DeferredProgressCallback())
    gather = FetchPredsCallback()
    learn.fit(1, 1e-3, cbs=gather)
    assert len(gather.preds[0]) == len(learn.dls.valid_ds)
