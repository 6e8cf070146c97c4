"""Training never waits for a GPU within its steps, as a simulated one shows."""

from types import SimpleNamespace

import pytest
import torch
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Recorder
from simulated_gpu import Watch, learner_on_gpu

from mixmo_fastai.callbacks.deferred import DeferredRecorder
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.loggers.callback import LoggingCallback
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.recording import HistoryCallback
from mixmo_fastai.training.schedule import one_cycle


def waits(monkeypatch, folder, num_steps, *, recorder=None, logging=None, **settings):
    """What one epoch of so many steps, with its validation, waits for."""
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
        with Watch() as watch, learn.no_bar(), learn.no_logging():
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
        {"msda": "cutmix"},
        {"cbs": EMACallback(0.9)},
        {"ghost_batch_size": 8},
    ],
    ids=str,
)
def test_waiting_does_not_grow_with_the_steps(monkeypatch, tmp_path, settings):
    few = waits(monkeypatch, tmp_path / "few", 4, **settings)
    many = waits(monkeypatch, tmp_path / "many", 16, **settings)
    assert many == few
    # Into an epoch: its order, and the start of the smoothed loss; out of it: the losses once, the
    # epoch's figures. Validation has one batch here.
    assert few.count("to device") <= 3
    assert few.count("read") + few.count("to host") <= 7


class Noted:
    """A tracker that counts steps."""

    def __init__(self):
        self.num_steps, self.num_calls = 0, 0

    def log_steps(self, steps):
        self.num_steps, self.num_calls = self.num_steps + len(steps), self.num_calls + 1

    def log_metrics(self, kind, step, metrics):
        """Nothing that waits."""


def logging_to(tracker, steps_per_fetch):
    """A callback that logs every step, as in a run that goes on after its first batch."""
    recipe = resolve_recipe("digits", None, {})
    logging = LoggingCallback([], print)
    logging.trackers, logging.current_training = {"noted": tracker}, SimpleNamespace(recipe=recipe)
    logging.before_batch = lambda: setattr(logging.learn.recorder, "every", steps_per_fetch)
    return logging


@pytest.mark.slow
def test_loggers_wait_once_beside_each_fetch(monkeypatch, tmp_path):
    """Of sixteen steps there are losses thrice: after six, after twelve, and at the end."""
    found = []
    for tracker in (None, Noted()):
        logging = logging_to(tracker or Noted(), 6)
        logging.trackers = logging.trackers if tracker else {}
        seen = waits(monkeypatch, tmp_path / str(len(found)), 16, logging=logging)
        found.append(seen.count("to host") + seen.count("read"))
    assert (tracker.num_calls, tracker.num_steps >= 16) == (3, True)
    assert found[1] - found[0] == 3


@pytest.mark.slow
def test_losses_are_fetched_every_so_many_steps(monkeypatch, tmp_path):
    plain = waits(monkeypatch, tmp_path / "a", 16, recorder=DeferredRecorder())
    often = waits(monkeypatch, tmp_path / "b", 16, recorder=DeferredRecorder(every=5))
    assert often.count("to host") == plain.count("to host") + 3


@pytest.mark.slow
def test_the_watch_sees_fastais_own_recorder_wait(monkeypatch, tmp_path):
    few = waits(monkeypatch, tmp_path / "few", 4, recorder=Recorder())
    many = waits(monkeypatch, tmp_path / "many", 16, recorder=Recorder())
    assert many.count("to host") - few.count("to host") >= 12


def test_the_watch_sees_what_waits(monkeypatch):
    with learner_on_gpu(monkeypatch, 4), Watch() as watch:
        x = torch.zeros(3, device="cuda")
        x.sum().item()
        x.cpu()
        torch.zeros(3).to("cuda")
        assert watch.seen == ["read", "to host", "to device"]
        assert x.device.type == "cuda"
