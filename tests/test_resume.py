"""A run that was interrupted and resumed equals an uninterrupted run bit by bit."""

import json
import shutil

import pytest
from fastai.callback.core import Callback
from safetensors.torch import load_file
from short_runs import EVERYTHING, STEPS, TINY, Watch, assert_same, fit
from unmixing_example import TARGETS

from mixmo_fastai.config.choices import READOUTS
from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import MASK_KINDS
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.lr_find import search_lr
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow

SCHEDULES = ("one-cycle", "published", "flat-cosine", "fine-tune")
FEW_STEPS = "data.limit=24"  # three per epoch


@pytest.mark.parametrize("num_members", [2, 3])
def test_checkpoints_store_the_loss_as_sum_over_members(tmp_path, num_members):
    """The format is that of version 0.1.0, although recorded losses are per member."""

    class SmoothLosses(Callback):
        order = 63

        def __init__(self):
            super().__init__()
            self.values = []

        def after_batch(self):
            if self.learn.training:
                self.values.append(self.learn.recorder.smooth_loss.val.item())

    run = create_run(override(TINY, [f"model.num_members={num_members}"]), tmp_path / "run")
    stop, before, after = StopRequest(), SmoothLosses(), SmoothLosses()
    with pytest.raises(InterruptedBySignal):
        train(prepare(run.recipe()), run, cbs=[before, Watch(stop, (1, 2))], stop=stop)
    saved = CheckpointStore(run.checkpoint).newest().path
    state, history = (json.loads((saved / f"{n}.json").read_text()) for n in ("state", "history"))
    assert state["smooth_loss"] == num_members * before.values[-1]
    (row,) = history["rows"]
    assert history["loss_sums"][0] / 2 == pytest.approx(
        num_members * float(row["train_loss"]), rel=0.25
    )
    train(prepare(run.recipe()), run, cbs=[after], resume=True)
    uninterrupted = SmoothLosses()
    fresh = create_run(run.recipe(), tmp_path / "uninterrupted")
    train(prepare(fresh.recipe()), fresh, cbs=[uninterrupted])
    assert before.values + after.values == uninterrupted.values


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that trains uninterrupted runs, cached, with their steps."""
    runs = {}

    def get(*assignments):
        if assignments not in runs:
            run = create_run(
                override(TINY, assignments), tmp_path_factory.mktemp("uninterrupted") / "run"
            )
            runs[assignments] = run, fit(run)
        return runs[assignments]

    return get


STOPS = [(epoch, step) for epoch in range(3) for step in range(1, STEPS + 1)]


def check_stop_and_resume(uninterrupted, folder, stop_at, **options):
    expected, steps = uninterrupted
    run = create_run(expected.recipe(), folder)
    first = fit(run, stop_at, **options)
    assert not run.is_finished
    rest = fit(run, resume=True)
    assert first + rest == steps
    assert_same(expected, run)


@pytest.mark.parametrize("stop_at", STOPS, ids=str)
def test_run_stopped_after_any_step(uninterrupted, tmp_path, stop_at):
    check_stop_and_resume(uninterrupted(*EVERYTHING), tmp_path / "run", stop_at)


@pytest.mark.parametrize("stop_at", [(0, 1), (2, 1)], ids=str)
def test_run_stopped_during_validation(uninterrupted, tmp_path, stop_at):
    check_stop_and_resume(uninterrupted(*EVERYTHING), tmp_path / "run", stop_at, validating=True)


@pytest.mark.parametrize("stop_at", [(0, 1), (0, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fastai/Lamb"])
def test_fine_tuning_is_resumed_around_the_end_of_its_frozen_part(
    uninterrupted, tmp_path, optimizer, stop_at
):
    """Two of nine steps are frozen: stops within, at the end of and after that part."""
    expected = uninterrupted(
        FEW_STEPS, *EVERYTHING, "schedule.kind=fine-tune", "optimizer.lr=0.01",
        f"optimizer.name={optimizer}",
    )  # fmt: skip
    check_stop_and_resume(expected, tmp_path / "run", stop_at)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stop_at", [(0, 1), (1, 2), (1, 3)], ids=str)
def test_every_schedule_is_resumed(uninterrupted, tmp_path, schedule, stop_at):
    expected = uninterrupted(FEW_STEPS, f"schedule.kind={schedule}")
    check_stop_and_resume(expected, tmp_path / "run", stop_at)


OPTIMIZERS = {
    "adamw": ["lr=0.002", "options.betas=[0.9, 0.99]"],
    "muon": ["lr=0.02", "weight_decay=0.01"],
    "sgd": ["momentum=0", "nesterov=false"],
    "torch/RAdam": ["lr=0.002"],
    "torch/Adagrad": ["lr=0.01"],
    "torch/Adafactor": ["lr=0.01"],
    "torch/NAdam": ["lr=0.002", "options.momentum_decay=0.004"],
    "fastai/Adam": ["lr=0.002"],
    "fastai/SGD": ["lr=0.05", "options.mom=0.8"],
    "fastai/RMSProp": ["lr=0.002"],
    "fastai/Lamb": ["lr=0.002"],
    "torch/Rprop": ["lr=0.001", "weight_decay=0"],
    "fastai/ranger": ["lr=0.002", "options.k=3"],
}


@pytest.mark.parametrize("schedule", ["one-cycle", "published"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_resumed(uninterrupted, tmp_path, name, schedule):
    settings = [f"optimizer.{setting}" for setting in (f"name={name}", *OPTIMIZERS[name])]
    expected = uninterrupted(FEW_STEPS, *settings, f"schedule.kind={schedule}")
    check_stop_and_resume(expected, tmp_path / "run", (1, 2))


@pytest.mark.parametrize(
    "settings",
    [
        ["name=fastai/SGD", "lr=0.05"],
        ["name=fastai/SGD", "lr=0.05", "options.decouple_wd=false"],
        ["name=fastai/RMSProp", "lr=0.002", "options.mom=0"],
    ],
    ids=" ".join,
)
def test_optimizers_of_fastai_without_momentum_are_resumed(uninterrupted, tmp_path, settings):
    expected = uninterrupted(FEW_STEPS, *(f"optimizer.{setting}" for setting in settings))
    check_stop_and_resume(expected, tmp_path / "run", (1, 2))


def test_momentum_that_becomes_zero_is_resumed(uninterrupted, tmp_path):
    """It is 0 in the fourth of six steps, after which the buffers of those before are kept."""
    expected = uninterrupted(
        FEW_STEPS, "train.epochs=2", "schedule.momentums=[0.9, 0, 0.9]", "schedule.pct_start=0.5",
        "optimizer.nesterov=false",
    )  # fmt: skip
    (momentum,) = [momentum for position, _, momentum, _ in expected[1] if position == (1, 1)]
    assert momentum == 0
    check_stop_and_resume(expected, tmp_path / "run", (1, 1))


def test_changing_the_optimizer_is_rejected(tmp_path):
    run = create_run(
        override(TINY, ["optimizer.name=adamw", "optimizer.lr=0.002"]), tmp_path / "run"
    )
    fit(run, (1, 1))
    changed = override(run.recipe(), ["optimizer.name=torch/RAdam"])
    with pytest.raises(InputError, match=r"optimizer.name is 'torch/RAdam' now and 'adamw'"):
        train(prepare(changed), run, resume=True)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_mask_kind_is_resumed(uninterrupted, tmp_path, kind):
    expected = uninterrupted(f"mix.kind={kind}", "train.epochs=2", "mix.mix_prob=0.8")
    check_stop_and_resume(expected, tmp_path / "run", (1, 3))


@pytest.mark.parametrize(
    "assignments",
    [
        ("model.num_members=1", "mix.kind=sum", "mix.batch_repetitions=1", "train.batch_size=8"),
        ("model.num_members=3", "mix.msda=cutmix", "mix.input_repetition=0.5"),
        ("mix.early_repetition=1", "mix.early_span=0.7", "mix.early_shape=cosine"),
        ("data.loader=streaming", "data.num_workers=0", "data.augmix=true"),
        ("data.transform=randaugment", "data.num_workers=0"),
        ("data.transform=random-resized-crop", "data.transform_options.scale=[0.5, 1]"),
        ("data.transform=aug-transforms",),
        ("data.loader=streaming", "data.num_workers=1"),
        ("model.ghost_batch_size=16", "data.flip=true", "data.alternating_flip=true"),
        ("loss.label_smoothing=0.1", "loss.class_weights=balanced"),
        ("loss.name=focal", "mix.msda=cutmix"),
        ("train.precision=bfloat16", "train.ema_decay=0.9"),
        ("train.precision=bfloat16", "optimizer.name=adamw", "optimizer.lr=0.001"),
    ],
    ids=" ".join,
)
def test_other_settings_are_resumed(uninterrupted, tmp_path, assignments):
    check_stop_and_resume(uninterrupted(FEW_STEPS, *assignments), tmp_path / "run", (1, 2))


def test_readout_that_changes_during_training_is_resumed(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setitem(READOUTS, "unmixing", TARGETS["unmixing"])
    expected = uninterrupted(FEW_STEPS, "model.readout=unmixing", "mix.mix_prob=1")
    check_stop_and_resume(expected, tmp_path / "run", (1, 2))


def test_resuming_near_the_ends_of_groups_of_draws(uninterrupted, tmp_path):
    """Random numbers are drawn for 16 steps at a time."""
    expected = uninterrupted("data.limit=148", "train.batch_size=16", "train.epochs=1")
    assert len(expected[1]) > 34
    for step in (15, 16, 17, 33):
        check_stop_and_resume(expected, tmp_path / f"run-{step}", (0, step))


def test_run_is_resumed_several_times(uninterrupted, tmp_path):
    expected, steps = uninterrupted(*EVERYTHING)
    run = create_run(expected.recipe(), tmp_path / "run")
    stops = [(0, 2), (0, 3), (0, STEPS), (2, 1), (2, STEPS), None]
    actual_steps = [step for i, stop in enumerate(stops) for step in fit(run, stop, resume=i > 0)]
    assert actual_steps == steps
    assert_same(expected, run)


def test_lr_search_does_not_change_a_resumed_run(uninterrupted, tmp_path):
    def prepare_with_search(recipe):
        training = prepare(recipe)
        search_lr(training, num_steps=40)
        return training

    expected, steps = uninterrupted(*EVERYTHING)
    run = create_run(expected.recipe(), tmp_path / "run")
    actual_steps = fit(run, (1, 2), prepare=prepare_with_search)
    actual_steps += fit(run, resume=True, prepare=prepare_with_search)
    assert actual_steps == steps
    assert_same(expected, run)


def test_steps_after_the_last_checkpoint_are_repeated(uninterrupted, tmp_path):
    class InterruptImmediately(Callback):
        order = 90

        def after_batch(self):
            if (self.learn.epoch, self.learn.iter) == (1, 3):
                raise KeyboardInterrupt

    expected, steps = uninterrupted(*EVERYTHING)
    run = create_run(expected.recipe(), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(prepare(run.recipe()), run, cbs=[InterruptImmediately()])
    assert fit(run, resume=True) == steps[STEPS:]
    assert_same(expected, run)


def test_finished_run_is_unchanged(uninterrupted, tmp_path):
    expected, _ = uninterrupted(*EVERYTHING)
    shutil.copytree(expected.path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert fit(run, resume=True) == []
    assert_same(expected, run)


def test_checkpoint_contains_tensors_and_json(uninterrupted):
    run, _ = uninterrupted(*EVERYTHING)
    saved = CheckpointStore(run.checkpoint).newest()
    names = {"model", "optimizer", "ema", "best_epoch"}
    tensors = {f"{name}.safetensors" for name in names}
    assert set(saved.files) == {"state.json", "history.json"} | tensors
    assert all(load_file(saved.path / name) for name in tensors)
    state = json.loads((saved.path / "state.json").read_text())
    assert (state["epoch"], state["step"], state["steps_per_epoch"]) == (3, 0, STEPS)
