"""Settings are compared by timing training steps in turn."""

from contextlib import suppress
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import CancelFitException
from training_states import TINY

from mixmo_fastai.training import speed, trials
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.trials import StepTimes

OPERATIONS = 1e9


@pytest.fixture
def machine(monkeypatch):
    """A clock that advances by the time of each step; what was run on it."""
    machine = SimpleNamespace(now=100.0, sizes=[], threads=[], timers=[], events=[])

    def copy_for_timing(_, size):
        machine.sizes.append(size)
        machine.events.append("copied")

    def time_steps(_, setting, timer):
        machine.now += setting.seconds
        machine.threads.append(setting.threads)
        machine.timers.append(
            (timer.warmup_steps, timer.timed_seconds, timer.max_steps, timer.long_warmup)
        )
        return setting.seconds

    monkeypatch.setattr(trials.time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(trials, "copy_for_timing", copy_for_timing)
    monkeypatch.setattr(trials, "time_steps", time_steps)
    monkeypatch.setattr(trials, "measure_on_copy", lambda _, measure: measure())
    for module in (trials, speed):
        monkeypatch.setattr(module, "operations_per_image", lambda _: OPERATIONS)
    return machine


def simulated_training(copies=2):
    mix = SimpleNamespace(batch_repetitions=copies)
    recipe = SimpleNamespace(loader_batch_size=100, mix=mix)
    acceleration = SimpleNamespace(threads=4)
    return SimpleNamespace(recipe=recipe, images_seen=800, acceleration=acceleration)


def compare(machine, run_seconds=1500.0, *, rounds=None, seconds=0.01, copies=2):
    """Compare one thread, the number that None stands for here, with two."""
    return trials.compare_settings(
        simulated_training(copies),
        [SimpleNamespace(threads=number, seconds=seconds) for number in (None, 2)],
        run_seconds=run_seconds,
        rounds=rounds,
        announce=lambda: machine.events.append("announced"),
    )


@pytest.mark.parametrize(
    ("run_seconds", "size", "step_seconds", "long_warmup"),
    [
        # A round of r s is planned as two steps with each setting, of s images in 2 copies:
        # r = 2 · (1 + 1/2) · 2 s · 1e9 / 40e9. The warm-up is long after 5 r / 4 s.
        (30.0, 1, 0.05, 0.5),  # r = 0.2: at least 0.5 s
        (150.0, 6, 0.25, 1.25),  # r = 1
        (1500.0, 66, 2.5, 2.0),  # r = 10: at most 2 s, which is the limit without comparison
        (4500.0, 100, 5.0, 2.0),  # r = 20 at most; no more images than in training
    ],
)
def test_steps_are_planned_from_the_duration_of_the_run(
    machine, run_seconds, size, step_seconds, long_warmup
):
    assert compare(machine, run_seconds).images == 2 * size
    assert machine.events == ["announced", "copied"]
    assert machine.sizes == [size]
    assert machine.timers == [pytest.approx((1, step_seconds, 4, long_warmup))] * (3 * 2)


@pytest.mark.parametrize("copies", [1, 2])
def test_nothing_is_announced_if_no_step_fits(machine, copies):
    """With one copy, one image would fit, but BatchNorm needs two."""
    assert compare(machine, run_seconds=20.0, copies=copies) is None
    assert machine.events == []


def test_nothing_is_timed_if_the_operations_are_unknown(machine, monkeypatch):
    assert trials.expected_seconds(simulated_training()) == 800 * 1e9 / (4 * 40e9)
    for module in (trials, speed):
        monkeypatch.setattr(module, "operations_per_image", lambda _: None)
    assert trials.expected_seconds(simulated_training()) == 0
    assert compare(machine) is None
    assert machine.events == []


def test_a_comparison_that_fails_has_no_result(machine, monkeypatch):
    monkeypatch.setattr(trials, "measure_on_copy", lambda *_: None)
    assert compare(machine) is None


@pytest.mark.parametrize(
    ("rounds", "seconds", "expected"),
    [
        (None, 15.0, 3),  # two rounds of 2 · 15 s take 2 · 30 s, twice as long as planned
        (None, 15.25, 2),
        (None, 500.0, 2),  # a single round may be a coincidence
        (6, 0.5, 6),
        (6, 10.0, 4),
        (6, 10.25, 3),
        (1, 500.0, 1),
    ],
)
def test_slow_steps_end_the_comparison(machine, rounds, seconds, expected):
    times = compare(machine, rounds=rounds, seconds=seconds)
    assert times.rounds == ((seconds, seconds),) * expected
    assert machine.threads == [None, 2] * expected


def test_a_run_is_expected_to_take_as_long_as_its_operations():
    training = prepare(TINY)
    operations = speed.training_operations(training.learn.model, (1, 8, 8))
    expected = operations * training.images_seen / speed.assumed_rate(training)
    assert trials.expected_seconds(training) == pytest.approx(expected)


def test_statistics():
    times = StepTimes(((1.0, 4.0), (2.0, 4.0), (6.0, 1.0)), 16)
    assert times.seconds == (2.0, 4.0)
    assert times.mean_seconds == (3.0, 3.0)
    assert times.ratios(1, 0) == [4.0, 2.0, 1 / 6]
    assert times.median_ratio(1, 0) == 2.0
    with pytest.raises(FrozenInstanceError):
        times.images = 32


def test_each_round_has_a_time_for_each_setting():
    times = StepTimes(((1.0, 4.0), (2.0,)), 16)
    for statistic in ("seconds", "mean_seconds"):
        with pytest.raises(ValueError, match="shorter"):
            getattr(times, statistic)


@pytest.mark.parametrize(("slowness", "spent"), [(0.9, 1.05), (4, 2), (50, 10)])
def test_slow_steps_take_a_limited_time(machine, monkeypatch, slowness, spent):
    """Of 30 s, a step is planned to take 2 s with one thread and 1 s with two, in five rounds.

    A warm-up of 2 s or more is timed itself, and is the only step.
    """

    def time_steps(_, setting, timer):
        timer.learn = SimpleNamespace(loss=torch.zeros(()))
        with suppress(CancelFitException):
            while True:
                timer.before_batch()
                machine.now += slowness * 2 / (setting.threads or 1)
                timer.after_batch()
        return timer.seconds / timer.steps

    monkeypatch.setattr(trials, "time_steps", time_steps)
    compare(machine, 1500.0, rounds=5)
    assert machine.now - 100 == pytest.approx(30 * spent, rel=0.01)
