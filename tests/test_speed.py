import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import CancelFitException, CancelValidException

from mixmo_fastai.config.load import override, recipe_from_mapping
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training import speed as module
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.speed import (
    MAX_STEPS,
    WARMUP_STEPS,
    ShorterRun,
    Speed,
    StepTimer,
    measure_speed,
    seconds_left,
    shorter_training,
    training_operations,
)
from mixmo_fastai.training.train import train

TINY = recipe_from_mapping(
    {
        "data": {"dataset": "digits", "limit": 48, "valid_split": 0.1},
        "model": {"arch": "wrn10_1"},
        "train": {"epochs": 2, "batch_size": 32, "device": "cpu"},
    },
    "here",
)
KINDS = {
    "plain": [],
    "streaming": ["data.loader=streaming", "data.num_workers=0"],
    "averaged": ["train.ema_decay=0.9"],
    "ghosts": ["model.ghost_batch_size=8"],
    "pixels": ["mix.msda=cutmix"],
    "bfloat16": ["train.precision=bfloat16"],
    "library": ["model.arch=resnet18"],
}


@pytest.fixture
def timed(monkeypatch):
    """Let even a tiny training be timed, briefly."""
    monkeypatch.setattr(module, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(module, "TIMED_SECONDS", 0.01)


def state_of(training):
    """Everything that a training reads, as values that compare."""
    learn, loader = training.learn, training.learn.dls.train
    callback = next(cb for cb in learn.cbs if type(cb).__name__ == "MixMoCallback")
    numbers = np.random.get_state()
    return {
        "weights": {k: v.clone() for k, v in learn.model.state_dict().items()},
        "gradients": [p.grad for p in learn.model.parameters()],
        "is_training": [m.training for m in learn.model.modules()],
        "draws": (random.getstate(), numbers[1].tolist(), numbers[2]),
        "torch": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "loader": (loader.epoch, loader.bs, loader.seed, len(loader), id(loader)),
        "order": loader.rng.getstate(),
        "learn": {name: id(value) for name, value in vars(learn).items()},
        "callbacks": [id(cb) for cb in learn.cbs],
        "callback": (callback.epochs_trained, callback.fit_seed, id(callback.learn)),
        "forward": learn.model.forward.__func__,
    }


def assert_unchanged(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name == "weights":
            assert all(torch.equal(v, after[name][k]) for k, v in value.items())
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_timing_changes_nothing(kind, timed):
    training = prepare(override(TINY, KINDS[kind]))
    before = state_of(training)
    found = measure_speed(training)
    assert found.is_timed
    assert found.images_per_second > 0
    assert_unchanged(before, state_of(training))


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_timing(tmp_path, timed):
    weights = []
    for is_timed in (False, True):
        training = prepare(TINY)
        if is_timed:
            measure_speed(training)
        run = create_run(training.recipe, tmp_path / str(is_timed))
        train(training, run)
        weights.append(run.weights.read_bytes())
    assert weights[0] == weights[1]


def test_a_training_of_seconds_is_not_timed(monkeypatch):
    monkeypatch.setattr(module, "_seconds_per_step", None)
    training = prepare(TINY)
    found = measure_speed(training)
    assert not found.is_timed
    assert seconds_left(training, found) < 10


def test_a_step_that_would_take_long_is_not_begun(monkeypatch):
    monkeypatch.setattr(module, "_seconds_per_step", None)
    monkeypatch.setattr(module, "CPU_THREAD_FLOPS", 1e6)
    training = prepare(override(TINY, ["train.epochs=1000"]))
    found = measure_speed(training)
    assert not found.is_timed
    operations = training_operations(training.learn.model, (1, 8, 8))
    assert found.images_per_second == pytest.approx(1e6 * torch.get_num_threads() / operations)


@pytest.mark.slow
def test_a_slow_network_is_timed_on_few_images(monkeypatch):
    sizes = []
    monkeypatch.setattr(module, "_seconds_per_step", lambda _, size: sizes.append(size) or 0.5)
    training = prepare(override(TINY, ["train.batch_size=160", "train.epochs=10000"]))
    operations = training_operations(training.learn.model, (1, 8, 8))
    for planned in (0.5, 10, 10_000):
        rate = planned * 4 * operations / module.TARGET_STEP_SECONDS / torch.get_num_threads()
        monkeypatch.setattr(module, "CPU_THREAD_FLOPS", 1.001 * rate)
        found = measure_speed(training)
        assert found.images_per_second == pytest.approx(sizes[-1] * 4 / 0.5)
    assert sizes == [1, 10, 40]


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()])
def test_what_cannot_be_timed_stops_no_run(error, timed, monkeypatch):
    def fail(*_, **__):
        raise error

    training = prepare(TINY)
    before = state_of(training)
    monkeypatch.setattr(BatchLoader, "batches", fail)
    assert measure_speed(training) is None
    assert_unchanged(before, state_of(training))


def test_compilation_is_not_timed(timed, monkeypatch):
    training = prepare(TINY)
    monkeypatch.setitem(
        vars(training), "acceleration", module.replace(training.acceleration, compiled=True)
    )
    monkeypatch.setattr(torch, "compile", None)
    assert measure_speed(training).is_lower_bound


# The clock


@pytest.fixture
def clock(monkeypatch):
    """A timer whose steps take as long as they are said to; the device is waited for in them."""
    now, waits = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device.type))

    def run(seconds, device="cpu"):
        timer = StepTimer()
        timer.learn = SimpleNamespace(loss=SimpleNamespace(device=torch.device(device)))
        timer.before_fit()
        for step in range(1000):
            now[0] += seconds(step)
            try:
                timer.after_batch()
            except CancelFitException:
                return timer, step + 1
        raise AssertionError("it never ended")

    return SimpleNamespace(run=run, waits=waits)


def test_the_first_steps_are_not_counted(clock):
    timer, made = clock.run(lambda step: 0.9 if step < WARMUP_STEPS else 0.1)
    assert timer.seconds / timer.steps == pytest.approx(0.1)
    assert made <= WARMUP_STEPS + 7


def test_quick_steps_come_to_an_end(clock):
    timer, made = clock.run(lambda step: 1e-4)
    assert (timer.steps, made) == (MAX_STEPS, WARMUP_STEPS + MAX_STEPS)
    assert timer.seconds == pytest.approx(1e-4 * MAX_STEPS)


@pytest.mark.parametrize(("seconds", "made"), [(30.0, 1), (1.5, 2)])
def test_a_slow_first_step_is_enough_on_a_cpu(clock, seconds, made):
    timer, steps = clock.run(lambda step: seconds)
    assert steps == made
    assert timer.seconds / timer.steps == pytest.approx(seconds)


def test_a_gpu_is_waited_for_and_its_first_steps_are_never_counted(clock):
    timer, _ = clock.run(lambda step: 30.0 if step < WARMUP_STEPS else 0.25, "cuda")
    assert timer.seconds / timer.steps == pytest.approx(0.25)
    assert clock.waits == ["cuda"] * (WARMUP_STEPS + 1)  # before the clock starts, and at the end


def test_validation_is_left_out():
    with pytest.raises(CancelValidException):
        StepTimer().before_validate()


# What follows from a speed


def test_the_time_counts_every_epoch_and_evaluation():
    training = prepare(TINY)
    valid, test = len(training.learn.dls.valid.images), len(training.learn.dls[2].images)
    images = 2 * 6 * 32 + (2 + 1) * valid / 3 + test / 3
    assert seconds_left(training, Speed(10.0)) == pytest.approx(images / 10)
    left = 6 * 32 + 2 * valid / 3 + test / 3
    assert seconds_left(training, Speed(10.0), epochs_done=1) == pytest.approx(left / 10)
    ensemble = prepare(override(TINY, ["model.num_nets=3"]))
    assert seconds_left(ensemble, Speed(10.0)) == pytest.approx(3 * images / 10)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (7, ShorterRun(None, 7)),
        (1, ShorterRun(None, 1)),
        (0.9, ShorterRun(None, 1, limit=50)),
        (0.01, ShorterRun(None, 1, limit=8)),  # one batch
    ],
)
def test_the_shorter_training_fits_into_twenty_minutes(epochs, expected):
    training = prepare(override(TINY, ["train.epochs=1000"]))
    valid = len(training.learn.dls.valid.images)
    rate = 1.0001 * epochs * (6 * 32 + valid / 3) / 1200
    assert shorter_training(training, Speed(rate)) == expected


@pytest.mark.slow
def test_the_shorter_training_has_a_smaller_network_if_there_is_one():
    wide, narrow = (
        prepare(override(TINY, [f"model.arch={arch}"])) for arch in ("wrn16_8", "wrn10_4")
    )
    own, least = (training_operations(t.learn.model, (1, 8, 8)) for t in (wide, narrow))
    rate = 3.01 * (6 * 32 + len(wide.learn.dls.valid.images) / 3) / 1200
    slower = rate * least / own / module.NARROW_NETWORK_EFFICIENCY
    assert shorter_training(wide, Speed(slower)) == ShorterRun("wrn10_4", 3)
    assert shorter_training(narrow, Speed(rate)) == ShorterRun(None, 3)
