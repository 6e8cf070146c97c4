"""Checkpoints are saved often, within a limited fraction of the training time."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from mixmo_fastai.runtime.signals import StopRequest
from mixmo_fastai.training import checkpointing
from mixmo_fastai.training.checkpointing import CheckpointCallback


class SimulatedFit:
    """A fit without a network, whose steps and saves take given times."""

    def __init__(self, monkeypatch, *, step, save):
        self.now, self.step, self.cost, self.saves = 0.0, step, save, []
        monkeypatch.setattr(checkpointing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        history, self.checks = SimpleNamespace(is_diverged=False), []
        state = SimpleNamespace(save=self.save, history=history, check_storable=self.check)
        self.callback = CheckpointCallback(None, state, StopRequest())
        self.learn = self.callback.learn = SimpleNamespace(
            training=True, epoch=0, iter=0, n_epoch=0, dl=None
        )

    def check(self):
        self.checks.append((self.learn.epoch, self.learn.iter))

    def save(self, store, position):
        self.now += self.cost
        self.saves.append((self.now, position))

    def run(self, epochs, steps):
        self.learn.n_epoch = epochs
        self.callback.before_fit()
        for self.learn.epoch in range(epochs):
            self.callback.before_epoch()
            self.callback.before_train()
            for self.learn.iter in range(steps):
                self.now += self.step
                self.callback.after_batch()
            self.callback.after_train()
            self.callback.after_epoch()
        return len(self.saves) * self.cost / self.now


@pytest.mark.slow
@pytest.mark.parametrize("save", [1.5, 10.0, 60.0])
@pytest.mark.parametrize(("step", "steps"), [(0.02, 500), (1.0, 3000), (0.5, 100_000)])
def test_saving_takes_a_limited_fraction_of_the_time(monkeypatch, save, step, steps):
    fit = SimulatedFit(monkeypatch, step=step, save=save)
    epochs = max(2, int(12 * save / 0.035 / (step * steps)))
    fraction = fit.run(epochs, steps)
    # The first save, whose cost is unknown, and the last save are always made.
    forced = 2 * save / fit.now
    assert fraction <= 0.035 + forced
    assert fit.saves[-1][1].epoch == epochs


def test_fast_saves_are_made_at_every_epoch(monkeypatch):
    fit = SimulatedFit(monkeypatch, step=0.1, save=0.9)
    fit.run(20, 50)
    assert [position.epoch for _, position in fit.saves] == [*range(1, 21)]
    assert fit.checks == [(0, 0)]


def test_long_epochs_are_saved_every_five_minutes(monkeypatch):
    fit = SimulatedFit(monkeypatch, step=1.0, save=2.0)
    fit.run(1, 3600)
    times = [0.0, *(now for now, _ in fit.saves)]
    assert max(after - before for before, after in pairwise(times)) <= 303
    assert len(fit.saves) == 11 + 1 + 1  # 11 regular saves, the last second, the end of the epoch
