"""Training steps never synchronise with the GPU, checked on a simulated GPU."""

from types import SimpleNamespace

import pytest
import torch
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Recorder
from simulated_gpu import SyncRecorder, learner_on_gpu

from mixmo_fastai.callbacks.deferred import DeferredRecorder
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.loggers.callback import LoggingCallback
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.schedule import one_cycle


def synchronisations(monkeypatch, folder, num_steps, *, recorder=None, logging=None, **settings):
    """Return the synchronisations of one epoch of `num_steps` steps, with validation."""
    with learner_on_gpu(monkeypatch, num_steps, **settings) as learn:
        if recorder is not None:
            learn.remove_cbs(Recorder)
            learn.remove_cbs(DeferredRecorder)
            learn.add_cb(recorder)
        assert len(learn.dls.train) >= num_steps
        history = HistoryCallback(create_run(resolve_recipe("digits", None, {}), folder), 16)
        rates = {"lr": one_cycle(1e-3, 1e-2, 1e-5, 0.25)}
        cbs = [ParamScheduler(rates)] + ([history] if recorder is None else [])
        cbs += [] if logging is None else [logging]
        with SyncRecorder() as watch, learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, cbs=cbs)
        assert watch.fused_steps == len(learn.opt.hypers) * len(learn.dls.train)
        assert learn.train_iter == len(learn.dls.train)
    return watch.seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mix": "patchup", "mix_prob": 1.0},
        {"mix": "cow", "input_repetition": 0.5},
        {"early_repetition": 1.0},
        {"msda": "cutmix"},
        {"cbs": EMACallback(0.9)},
        {"ghost_batch_size": 8},
    ],
    ids=str,
)
def test_number_of_synchronisations_does_not_depend_on_steps(monkeypatch, tmp_path, settings):
    few = synchronisations(monkeypatch, tmp_path / "few", 4, **settings)
    many = synchronisations(monkeypatch, tmp_path / "many", 16, **settings)
    assert many == few
    # At the start of an epoch: its order and the initial smoothed loss; at the end: all losses at
    # once and the epoch's metrics. Validation has one batch here.
    assert few.count("to device") <= 3
    assert few.count("read") + few.count("to host") <= 7


class CountingTracker:
    """A tracker that counts steps and calls."""

    def __init__(self):
        self.num_steps, self.num_calls = 0, 0

    def log_steps(self, steps):
        self.num_steps, self.num_calls = self.num_steps + len(steps), self.num_calls + 1

    def log_metrics(self, kind, step, metrics):
        """Do nothing."""


def logging_to(tracker, steps_per_fetch):
    """Return a callback that logs every step, as after the first batch of a run."""
    recipe = resolve_recipe("digits", None, {})
    logging = LoggingCallback([], print)
    logging.trackers, logging.current_training = (
        {"counting": tracker},
        SimpleNamespace(recipe=recipe),
    )
    logging.before_batch = lambda: setattr(logging.learn.recorder, "every", steps_per_fetch)
    return logging


@pytest.mark.slow
def test_loggers_synchronise_once_per_fetch(monkeypatch, tmp_path):
    """Of 16 steps, losses are fetched three times: after 6, after 12, and at the end."""
    counts = []
    for tracker in (None, CountingTracker()):
        logging = logging_to(tracker or CountingTracker(), 6)
        logging.trackers = logging.trackers if tracker else {}
        synchronised = synchronisations(
            monkeypatch, tmp_path / str(len(counts)), 16, logging=logging
        )
        counts.append(synchronised.count("to host") + synchronised.count("read"))
    assert (tracker.num_calls, tracker.num_steps >= 16) == (3, True)
    assert counts[1] - counts[0] == 3


@pytest.mark.slow
def test_losses_are_fetched_every_n_steps(monkeypatch, tmp_path):
    plain = synchronisations(monkeypatch, tmp_path / "a", 16, recorder=DeferredRecorder())
    frequent = synchronisations(monkeypatch, tmp_path / "b", 16, recorder=DeferredRecorder(every=5))
    assert frequent.count("to host") == plain.count("to host") + 3


@pytest.mark.slow
def test_fastai_recorder_is_detected(monkeypatch, tmp_path):
    few = synchronisations(monkeypatch, tmp_path / "few", 4, recorder=Recorder())
    many = synchronisations(monkeypatch, tmp_path / "many", 16, recorder=Recorder())
    assert many.count("to host") - few.count("to host") >= 12


def test_synchronising_operations_are_detected(monkeypatch):
    with learner_on_gpu(monkeypatch, 4), SyncRecorder() as watch:
        x = torch.zeros(3, device="cuda")
        x.sum().item()
        x.cpu()
        torch.zeros(3).to("cuda")
        assert watch.seen == ["read", "to host", "to device"]
        assert x.device.type == "cuda"
