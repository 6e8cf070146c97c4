"""Settings are compared by timing training steps in turn."""

from dataclasses import replace
from functools import partial

from training_states import TINY

from mixmo_fastai.config.load import override
from mixmo_fastai.training import trials
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.trials import StepTimes


def compare(monkeypatch, seconds, epochs=8):
    """Compare with steps that take a given time by number of threads."""
    now, blocks = [0.0], []
    monkeypatch.setattr(trials.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trials, "copy_for_timing", lambda *_: None)

    def time_steps(_, setting, timer):
        step = seconds[setting.threads]
        is_long = step >= timer.long_warmup
        now[0] += step * (1 if is_long else 2)
        blocks.append(setting.threads)
        return step

    monkeypatch.setattr(trials, "time_steps", time_steps)
    training = prepare(
        override(TINY, ["data.limit=0", "model.arch=wrn10_2", f"train.epochs={epochs}"])
    )
    settings = [replace(training.acceleration, threads=number) for number in seconds]
    run_seconds = trials.expected_seconds(training)
    times = trials.compare_settings(training, settings, run_seconds=run_seconds, rounds=5)
    return times, blocks, now[0]


def test_settings_alternate(monkeypatch):
    times, blocks, _ = compare(monkeypatch, {1: 0.03, 2: 0.02})
    assert blocks == [1, 2] * 5
    assert times.rounds == ((0.03, 0.02),) * 5


def test_slow_steps_end_the_comparison(monkeypatch):
    """On busy cores a step of two threads was measured to take 50 times as long."""
    times, blocks, spent = compare(monkeypatch, {1: 0.03, 2: 1.5})
    assert blocks == [1, 2] * 2
    assert times.rounds == ((0.03, 1.5),) * 2
    assert spent < 4


def test_it_is_announced_only_if_a_step_fits(monkeypatch):
    monkeypatch.setattr(trials, "_measure", lambda *_: [(1.0,)])
    training, announced = prepare(TINY), []
    for seconds in (1e-9, 1e9):
        trials.compare_settings(
            training,
            [replace(training.acceleration, threads=1)],
            run_seconds=seconds,
            announce=partial(announced.append, seconds),
        )
    assert announced == [1e9]


def test_statistics():
    times = StepTimes(((1.0, 4.0), (2.0, 4.0), (6.0, 1.0)), 16)
    assert times.seconds == (2.0, 4.0)
    assert times.mean_seconds == (3.0, 3.0)
    assert times.ratios(1, 0) == [4.0, 2.0, 1 / 6]
    assert times.median_ratio(1, 0) == 2.0
