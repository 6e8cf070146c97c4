"""When a checkpoint is saved: often, and never for more than its share of the time."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from mixmo_fastai.runtime.signals import StopRequest
from mixmo_fastai.training import recording
from mixmo_fastai.training.recording import CheckpointCallback


class Clockwork:
    """A fit without a network: steps and saves take what they are said to take."""

    def __init__(self, monkeypatch, *, step, save):
        self.now, self.step, self.cost, self.saves = 0.0, step, save, []
        monkeypatch.setattr(recording, "time", SimpleNamespace(perf_counter=lambda: self.now))
        state = SimpleNamespace(save=self.save, history=SimpleNamespace(is_diverged=False))
        self.callback = CheckpointCallback(None, state, StopRequest())
        self.learn = self.callback.learn = SimpleNamespace(
            training=True, epoch=0, iter=0, n_epoch=0, dl=None
        )

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
def test_saving_takes_its_share_of_the_time_at_most(monkeypatch, save, step, steps):
    clock = Clockwork(monkeypatch, step=step, save=save)
    epochs = max(2, int(12 * save / 0.035 / (step * steps)))
    share = clock.run(epochs, steps)
    # The first and the last have no choice: nothing is known of their cost, or all is at stake.
    forced = 2 * save / clock.now
    assert share <= 0.035 + forced
    assert clock.saves[-1][1].epoch == epochs


def test_a_quick_save_is_made_at_every_epoch(monkeypatch):
    clock = Clockwork(monkeypatch, step=0.1, save=0.9)
    clock.run(20, 50)
    assert [position.epoch for _, position in clock.saves] == [*range(1, 21)]


def test_within_a_long_epoch_there_is_a_save_every_five_minutes(monkeypatch):
    clock = Clockwork(monkeypatch, step=1.0, save=2.0)
    clock.run(1, 3600)
    times = [0.0, *(now for now, _ in clock.saves)]
    assert max(after - before for before, after in pairwise(times)) <= 303
    assert len(clock.saves) == 11 + 1 + 1  # that of the last second, and that of the epoch
