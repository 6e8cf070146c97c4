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


def learner(recorder, dls=None):
    torch.manual_seed(0)
    dls = dls or mixmo_dls(batch_size=5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(dls.train.one_batch()[0][0].numel(), 3))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy, default_cbs=True)
    learn.remove_cbs(ProgressCallback)
    learn.remove_cbs(Recorder)
    learn.add_cb(recorder)
    return learn


@pytest.mark.parametrize("every", [1, 7, 20, 1000])
def test_the_record_is_fastais(every):
    records = []
    for recorder in (Recorder(), DeferredRecorder(every=every)):
        learn = learner(recorder)
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2)
        assert learn.recorder is recorder
        records.append(recorder)
    fastais, ours = records
    assert len(ours.losses) == len(fastais.losses) == 2 * 17
    assert torch.equal(torch.stack(ours.losses), torch.stack(fastais.losses))
    assert ours.lrs == fastais.lrs
    assert ours.iters == fastais.iters
    for own, theirs in zip(ours.values, fastais.values, strict=True):
        assert list(own) == pytest.approx(list(theirs))
    assert ours.metric_names == fastais.metric_names


def test_losses_come_several_at_a_time():
    lengths = []
    recorder = DeferredRecorder(every=6)
    own = recorder.after_batch
    recorder.after_batch = lambda: (own(), lengths.append(len(recorder.fetched)))
    learn = learner(recorder)
    with learn.no_logging():
        learn.fit(1, 1e-3)
    training = lengths[:17]
    assert training == [0] * 5 + [6] * 6 + [12] * 6
    assert len(recorder.losses) == 17


def test_a_search_for_a_learning_rate_works():
    learn = learner(DeferredRecorder())
    with learn.no_bar():
        found = learn.lr_find(show_plot=False, num_it=30)
    assert 0 < found.valley < 10
    assert len(learn.recorder.losses) == len(learn.recorder.lrs)


@pytest.mark.parametrize("error", [CancelFitException, KeyboardInterrupt, RuntimeError])
def test_an_epoch_cut_short_loses_no_loss(error):
    learn = learner(DeferredRecorder())

    def stop():
        if learn.train_iter == 3:
            raise error("here")

    learn.recorder.before_batch = stop
    caught = nullcontext() if error is CancelFitException else pytest.raises(error)
    with learn.no_logging(), caught:
        learn.fit(1, 1e-3)
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == 3


def test_any_learner_can_have_it():
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


def test_a_learner_without_a_bar_gets_none():
    dls = mixmo_dls()
    learn = Learner(dls, nn.Flatten(), nn.CrossEntropyLoss())
    learn.remove_cbs(ProgressCallback)
    defer_readbacks(learn)
    assert not hasattr(learn, "progress")


def test_the_bar_shows_a_fetched_loss(capsys):
    learn = learner(DeferredRecorder(every=5))
    learn.add_cb(DeferredProgressCallback())
    shown = []
    own = learn.progress.after_batch
    learn.progress.after_batch = lambda: (own(), shown.append(learn.progress.pbar.comment))
    learn.fit(1, 1e-3)
    losses = [f"{loss.item():.4f}" for loss in learn.recorder.losses]
    assert shown[4:17] == [losses[4]] * 5 + [losses[9]] * 5 + [losses[14]] * 3


def test_losses_of_a_cpu_are_shown_as_they_come():
    learn = learner(DeferredRecorder())
    learn.add_cb(DeferredProgressCallback())
    shown = []
    own = learn.progress.after_batch
    learn.progress.after_batch = lambda: (own(), shown.append(learn.progress.pbar.comment))
    learn.fit(1, 1e-3)
    assert shown[:17] == [f"{loss.item():.4f}" for loss in learn.recorder.losses]


def test_a_plain_bar_does_not_come_back():
    """fastai's `no_bar` puts one back."""
    learn = defer_readbacks(learner(Recorder()))
    learn.add_cb(DeferredProgressCallback())
    with learn.no_bar():
        learn.fit(1, 1e-3)
    learn.fit(1, 1e-3)
    assert type(learn.progress) is DeferredProgressCallback


def test_predictions_are_gathered_beside_the_bar():
    """fastai then leaves the recorder out."""
    learn = learner(DeferredRecorder())
    learn.add_cb(DeferredProgressCallback())
    gather = FetchPredsCallback()
    learn.fit(1, 1e-3, cbs=gather)
    assert len(gather.preds[0]) == len(learn.dls.valid_ds)
