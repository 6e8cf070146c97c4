from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import CancelFitException, CancelValidException
from training_states import TINY, assert_unchanged, state_of

from mixmo_fastai.config.load import override
from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training import speed as speed_module
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
from mixmo_fastai.training.trials import expected_seconds

KINDS = {
    "plain": [],
    "streaming": ["data.loader=streaming", "data.num_workers=0"],
    "EMA": ["train.ema_decay=0.9"],
    "ghost norm": ["model.ghost_batch_size=8"],
    "MSDA": ["mix.msda=cutmix"],
    "bfloat16": ["train.precision=bfloat16"],
    "torchvision": ["model.arch=resnet18"],
}


@pytest.fixture
def short_timing(monkeypatch):
    """Time even tiny trainings, for a short time."""
    monkeypatch.setattr(speed_module, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(speed_module, "TIMED_SECONDS", 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_timing_does_not_change_the_training(kind, short_timing):
    training = prepare(override(TINY, KINDS[kind]))
    before = state_of(training)
    speed = measure_speed(training)
    assert speed.is_timed
    assert speed.images_per_second > 0
    assert_unchanged(before, state_of(training))


@pytest.mark.slow
def test_timing_does_not_change_the_weights(tmp_path, short_timing):
    weights = []
    for is_timed in (False, True):
        training = prepare(TINY)
        if is_timed:
            measure_speed(training)
        run = create_run(training.recipe, tmp_path / str(is_timed))
        train(training, run)
        weights.append(run.weights.read_bytes())
    assert weights[0] == weights[1]


def test_short_trainings_are_not_timed(monkeypatch):
    monkeypatch.setattr(speed_module, "_seconds_per_step", None)
    training = prepare(TINY)
    speed = measure_speed(training)
    assert not speed.is_timed
    assert seconds_left(training, speed) < 10


def test_long_steps_are_estimated_without_timing(monkeypatch):
    monkeypatch.setattr(speed_module, "_seconds_per_step", None)
    monkeypatch.setattr(speed_module, "CPU_THREAD_FLOPS", 1e6)
    training = prepare(override(TINY, ["train.epochs=1000"]))
    speed = measure_speed(training)
    assert not speed.is_timed
    operations = training_operations(training.learn.model, (1, 8, 8))
    assert speed.images_per_second == pytest.approx(1e6 * torch.get_num_threads() / operations)


def test_operations_are_counted_once(monkeypatch):
    counted, count = [], speed_module.training_flops
    monkeypatch.setattr(
        speed_module,
        "training_flops",
        lambda *args, **more: counted.append(1) or count(*args, **more),
    )
    training = prepare(override(TINY, ["train.epochs=1000"]))
    assert speed_module.planned_size(training, 0.0, rate=1e9) == 0
    assert expected_seconds(training) > 0
    measure_speed(training)
    assert len(counted) == 1


@pytest.mark.slow
def test_slow_networks_are_timed_on_few_images(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        speed_module, "_seconds_per_step", lambda _, size: sizes.append(size) or 0.5
    )
    training = prepare(override(TINY, ["train.batch_size=160", "train.epochs=10000"]))
    operations = training_operations(training.learn.model, (1, 8, 8))
    for planned in (0.5, 10, 10_000):
        rate = planned * 4 * operations / speed_module.TARGET_STEP_SECONDS / torch.get_num_threads()
        monkeypatch.setattr(speed_module, "CPU_THREAD_FLOPS", 1.001 * rate)
        speed = measure_speed(training)
        assert speed.images_per_second == pytest.approx(sizes[-1] * 4 / 0.5)
    assert sizes == [1, 10, 40]


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()])
def test_errors_in_the_timing_are_ignored(error, short_timing, monkeypatch):
    def fail(*_, **__):
        raise error

    training = prepare(TINY)
    before = state_of(training)
    monkeypatch.setattr(BatchLoader, "batches", fail)
    assert measure_speed(training) is None
    assert_unchanged(before, state_of(training))


def test_compilation_is_not_timed(short_timing, monkeypatch):
    training = prepare(TINY)
    monkeypatch.setitem(
        vars(training), "acceleration", speed_module.replace(training.acceleration, compiled=True)
    )
    monkeypatch.setattr(torch, "compile", None)
    assert measure_speed(training).is_lower_bound


# StepTimer


@pytest.fixture
def simulated_timer(monkeypatch):
    """Run a `StepTimer` with given step times; count the synchronisations of the device."""
    now, synchronised = [0.0], []
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: synchronised.append(device.type))

    def run(seconds, device="cpu", start=0.0):
        timer = StepTimer()
        timer.learn = SimpleNamespace(loss=SimpleNamespace(device=torch.device(device)))
        now[0] += start
        for step in range(1000):
            timer.before_batch()
            now[0] += seconds(step)
            try:
                timer.after_batch()
            except CancelFitException:
                return timer, step + 1
        raise AssertionError("the timer did not end")

    return SimpleNamespace(run=run, synchronised=synchronised)


def test_warmup_steps_are_not_counted(simulated_timer):
    timer, num_steps = simulated_timer.run(lambda step: 0.9 if step < WARMUP_STEPS else 0.1)
    assert timer.seconds / timer.steps == pytest.approx(0.1)
    assert num_steps <= WARMUP_STEPS + 7


def test_start_of_worker_processes_is_not_counted(simulated_timer):
    timer, num_steps = simulated_timer.run(lambda step: 0.1, start=30.0)
    assert timer.seconds / timer.steps == pytest.approx(0.1)
    assert num_steps > WARMUP_STEPS


def test_number_of_fast_steps_is_limited(simulated_timer):
    timer, num_steps = simulated_timer.run(lambda step: 1e-4)
    assert (timer.steps, num_steps) == (MAX_STEPS, WARMUP_STEPS + MAX_STEPS)
    assert timer.seconds == pytest.approx(1e-4 * MAX_STEPS)


@pytest.mark.parametrize(("seconds", "num_steps"), [(30.0, 1), (1.5, 2)])
def test_few_slow_steps_are_enough_on_a_cpu(simulated_timer, seconds, num_steps):
    timer, steps = simulated_timer.run(lambda step: seconds)
    assert steps == num_steps
    assert timer.seconds / timer.steps == pytest.approx(seconds)


def test_gpu_is_synchronised_and_warmup_is_not_counted(simulated_timer):
    timer, _ = simulated_timer.run(lambda step: 30.0 if step < WARMUP_STEPS else 0.25, "cuda")
    assert timer.seconds / timer.steps == pytest.approx(0.25)
    assert simulated_timer.synchronised == ["cuda"] * (
        WARMUP_STEPS + 1
    )  # before the timing starts, and at the end


def test_validation_is_skipped():
    with pytest.raises(CancelValidException):
        StepTimer().before_validate()


# Estimates from a speed


def test_seconds_left_includes_epochs_and_evaluations():
    training = prepare(TINY)
    valid, test = len(training.learn.dls.valid.images), len(training.learn.dls[2].images)
    images = 2 * 6 * 32 + (2 + 1) * valid / 3 + test / 3
    assert seconds_left(training, Speed(10.0)) == pytest.approx(images / 10)
    images_left = 6 * 32 + 2 * valid / 3 + test / 3
    assert seconds_left(training, Speed(10.0), epochs_done=1) == pytest.approx(images_left / 10)
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
def test_shorter_training_takes_twenty_minutes(epochs, expected):
    training = prepare(override(TINY, ["train.epochs=1000"]))
    valid = len(training.learn.dls.valid.images)
    rate = 1.0001 * epochs * (6 * 32 + valid / 3) / 1200
    assert shorter_training(training, Speed(rate)) == expected


@pytest.mark.slow
def test_shorter_training_uses_a_smaller_network():
    wide, narrow = (
        prepare(override(TINY, [f"model.arch={arch}"])) for arch in ("wrn16_8", "wrn10_4")
    )
    wide_operations, narrow_operations = (
        training_operations(t.learn.model, (1, 8, 8)) for t in (wide, narrow)
    )
    rate = 3.01 * (6 * 32 + len(wide.learn.dls.valid.images) / 3) / 1200
    slow_rate = rate * narrow_operations / wide_operations / speed_module.NARROW_NETWORK_EFFICIENCY
    assert shorter_training(wide, Speed(slow_rate)) == ShorterRun("wrn10_4", 3)
    assert shorter_training(narrow, Speed(rate)) == ShorterRun(None, 3)
