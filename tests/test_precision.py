"""The choice between float32 and bfloat16 on a CPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_states import TINY, assert_unchanged, state_of

from mixmo_fastai.cli import plan
from mixmo_fastai.cli.program import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training import precision, speed, trials
from mixmo_fastai.training.precision import PrecisionTimes, choose_precision, measure_precisions
from mixmo_fastai.training.prepare import prepare

FIT = "fit digits --arch wrn10_1 --limit 48 --epochs 1 --batch-size 16 --device cpu"


def times(ratio):
    return PrecisionTimes(ratio, 1.0, ratio, 64, "a CPU")


@pytest.fixture
def short_runs(monkeypatch):
    """Measure the precisions even for tiny runs."""
    monkeypatch.setattr(precision, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(trials, "MAX_FRACTION", 1e3)
    monkeypatch.setattr(trials, "MAX_SECONDS", 0.5)


@pytest.mark.parametrize(
    ("ratio", "choice"), [(0.5, "float32"), (1.09, "float32"), (1.1, "bfloat16"), (2, "bfloat16")]
)
def test_the_faster_precision_becomes_part_of_the_recipe(monkeypatch, ratio, choice):
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: times(ratio))
    training = prepare(TINY)
    chosen, measured = choose_precision(training)
    assert measured.ratio == ratio
    train = replace(training.recipe.train, precision=choice)
    assert chosen.recipe == replace(training.recipe, train=train)
    assert chosen.acceleration.autocast == (torch.bfloat16 if choice == "bfloat16" else None)
    assert chosen.learn is training.learn


@pytest.mark.parametrize("setting", ["float32", "bfloat16"])
def test_a_given_precision_is_kept(monkeypatch, setting):
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: pytest.fail("measured"))
    training = prepare(override(TINY, [f"train.precision={setting}"]))
    assert choose_precision(training) == (training, None)


def test_nothing_is_measured_on_a_gpu(monkeypatch):
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: pytest.fail("measured"))
    training = SimpleNamespace(device=torch.device("cuda"), recipe=TINY)
    assert choose_precision(training) == (training, None)


def test_short_runs_and_unknown_operations_are_not_measured(monkeypatch):
    monkeypatch.setattr(trials, "copy_for_timing", lambda *_: pytest.fail("measured"))
    training = prepare(TINY)
    assert measure_precisions(training) is None
    assert choose_precision(training) == (training, None)
    monkeypatch.setattr(precision, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(speed, "operations_per_image", lambda _: None)
    assert measure_precisions(training) is None


def test_an_error_in_a_step_is_left_to_the_training(monkeypatch, short_runs):
    def fail(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(trials, "time_steps", fail)
    assert measure_precisions(prepare(TINY)) is None


@pytest.fixture(scope="module", params=["wrn10_1", "wrn16_4", "wrn28_10"])
def prepared(request):
    return prepare(override(TINY, [f"model.arch={request.param}"]))


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [100, 3_000, 10**6])
def test_measuring_takes_at_most_two_percent_of_the_expected_time(monkeypatch, prepared, epochs):
    """The simulated machine is as fast as assumed, so that times follow from the operations."""
    monkeypatch.setattr(precision, "MIN_RUN_SECONDS", 1.0)
    training = replace(prepared, recipe=override(prepared.recipe, [f"train.epochs={epochs}"]))
    operations = speed.operations_per_image(training)
    rate = speed.CPU_THREAD_FLOPS * torch.get_num_threads()
    seconds, sizes = 0.0, []

    def copy(_, size):
        sizes.append(size)

    def time_steps(learn, acceleration, timer):
        nonlocal seconds
        copies = training.recipe.mix.batch_repetitions
        step = operations * copies * sizes[-1] / rate
        num_timed = min(timer.max_steps, max(1, -(-timer.timed_seconds // step)))
        seconds += (timer.warmup_steps + num_timed) * step
        return step

    monkeypatch.setattr(trials, "copy_for_timing", copy)
    monkeypatch.setattr(trials, "time_steps", time_steps)
    run_seconds = operations * training.images_seen / rate
    measured = measure_precisions(training)
    assert (measured is None) == (not sizes)
    assert seconds <= 1.5 * min(0.02 * run_seconds, trials.MAX_SECONDS)
    if run_seconds > 3600:
        assert measured.ratio == 1.0


def test_precisions_alternate(monkeypatch, short_runs):
    autocasts = []
    monkeypatch.setattr(
        trials, "time_steps", lambda _, setting, __: autocasts.append(setting.autocast) or 1.0
    )
    measured = measure_precisions(prepare(TINY))
    assert autocasts == [None, torch.bfloat16] * trials.ROUNDS
    assert measured.ratio == 1.0


def test_measuring_does_not_change_the_run(short_runs):
    training = prepare(override(TINY, ["train.ema_decay=0.9"]))
    before = state_of(training)
    measured = measure_precisions(training)
    assert measured.float32 > 0
    assert measured.bfloat16 > 0
    assert_unchanged(before, state_of(training))


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1.84, "bfloat16, measured to be 1.84 times as fast as float32; change with --precision"),
        (0.5, "float32, measured to be 2.00 times as fast as bfloat16; change with --precision"),
        (1.05, "float32; bfloat16 was measured to be only 1.05 times as fast; change"),
    ],
)
def test_the_plan_shows_the_choice_and_the_run_stores_it(
    monkeypatch, tmp_path, capsys, ratio, text
):
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: times(ratio))
    folder = tmp_path / "run"
    assert program([*FIT.split(), "--out", str(folder)]) == 0
    assert f"Precision   {text}" in capsys.readouterr().out
    run = open_run(folder)
    stored = json.loads((folder / "environment.json").read_text())["measured_precision"]
    assert stored == times(ratio).as_dict()
    assert run.recipe().train.precision == stored["precision"]


@pytest.mark.parametrize("cpu", ["a CPU", "another CPU"])
def test_a_resumed_run_keeps_its_precision(monkeypatch, tmp_path, capsys, cpu):
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: times(2.0))
    folder = tmp_path / "run"
    assert program([*FIT.split(), "--out", str(folder)]) == 0
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("mixmo_fastai.runtime.devices.cpu_name", lambda: cpu)
    capsys.readouterr()
    assert program(["fit", "--resume", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "cpu, bfloat16" in out
    kept = "Precision   bfloat16 is kept; it was chosen on a CPU, this is another CPU"
    assert (kept in out) == (cpu == "another CPU")
    assert "measured" not in out


def test_a_changed_environment_file_is_ignored():
    run = SimpleNamespace(environment=lambda: {"measured_precision": {"precision": "bfloat16"}})
    recipe = override(TINY, ["train.precision=bfloat16"])
    training = SimpleNamespace(recipe=recipe, device=torch.device("cuda"))
    assert plan._precision_lines(training, run, resume=False) == []
    run.environment = lambda: {"measured_precision": 3}
    assert plan._precision_lines(training, run, resume=True) == []


@pytest.mark.parametrize(
    ("chosen", "capability", "has_bfloat16", "is_slow"),
    [
        ("bfloat16", "AVX2", False, True),
        ("bfloat16", "AVX512", False, True),
        ("bfloat16", "AVX512", True, False),
        ("bfloat16", "SVE256", False, False),
        ("float32", "AVX2", False, False),
    ],
)
def test_the_plan_warns_of_emulated_bfloat16(
    monkeypatch, chosen, capability, has_bfloat16, is_slow
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    run = SimpleNamespace(environment=dict)
    training = SimpleNamespace(
        recipe=override(TINY, [f"train.precision={chosen}"]), device=torch.device("cpu")
    )
    lines = plan._precision_lines(training, run, resume=False)
    assert len(lines) == is_slow
    assert not lines or "slower than float32 on this CPU" in lines[0]
