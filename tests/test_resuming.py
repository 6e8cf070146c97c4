"""A run that was stopped anywhere ends exactly as one that was not."""

import json
import shutil
import signal

import pytest
from fastai.callback.core import Callback
from safetensors.torch import load_file

from mixmo_fastai.config.load import override, recipe_from_mapping
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

TINY = recipe_from_mapping(
    {
        "name": "tiny",
        "data": {"dataset": "digits", "limit": 48, "valid_split": 0.05},
        "model": {"arch": "wrn10_1"},
        "train": {"epochs": 3, "batch_size": 32, "device": "cpu"},
        # The published schedule drops after the first and the second epoch.
        "schedule": {"milestones": [0.3, 0.6]},
    },
    "here",
)
STEPS = 6  # per epoch
EVERYTHING = ("train.ema_decay=0.9", "train.select=best")
SCHEDULES = ("one-cycle", "published", "flat-cosine")
TIMED = ("seconds", "images_per_second")


class Watch(Callback):
    """Note what each step trains with; ask to stop at a place, or while it is being validated."""

    order = 64  # before the checkpoint of a step

    def __init__(self, stop, place=None, *, validating=False):
        super().__init__()
        self.stop, self.place, self.validating, self.steps = stop, place, validating, []

    def after_batch(self):
        place = self.learn.epoch, self.learn.iter + 1
        if self.learn.training:
            hypers = self.learn.opt.hypers[-1]
            self.steps.append((place, hypers["lr"], hypers.get("mom"), self.learn.pct_train))
        if place == self.place and self.learn.training != self.validating:
            self.stop.number = signal.SIGINT


def start(recipe, folder):
    return create_run(recipe, folder)


def fit(run, place=None, *, resume=False, validating=False, prepare=prepare):
    """Train until the end, or until a place; give what each step trained with."""
    stop = StopRequest()
    watch = Watch(stop, place, validating=validating)
    try:
        train(prepare(run.recipe()), run, cbs=[watch], resume=resume, stop=stop)
    except InterruptedBySignal:
        assert place is not None
    else:
        assert place is None or place == (2, STEPS)
    return watch.steps


@pytest.mark.parametrize("num_members", [2, 3])
def test_checkpoints_hold_the_loss_as_a_sum_over_members(tmp_path, num_members):
    """As of version 0.1.0; what is recorded is per member."""

    class SeeSmoothed(Callback):
        order = 63

        def __init__(self):
            super().__init__()
            self.values = []

        def after_batch(self):
            if self.learn.training:
                self.values.append(self.learn.recorder.smooth_loss.val.item())

    run = start(override(TINY, [f"model.num_members={num_members}"]), tmp_path / "run")
    stop, before, after = StopRequest(), SeeSmoothed(), SeeSmoothed()
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
    whole = SeeSmoothed()
    fresh = start(run.recipe(), tmp_path / "whole")
    train(prepare(fresh.recipe()), fresh, cbs=[whole])
    assert before.values + after.values == whole.values


def content(run):
    """Everything in a run's newest checkpoint but how long it took."""
    saved = CheckpointStore(run.checkpoint).newest()
    files = {name: (saved.path / name).read_bytes() for name in saved.files}
    history = json.loads(files.pop("history.json"))
    del history["seconds"]
    history["rows"] = untimed(history["rows"])
    return files, history


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def assert_same(one, other):
    ours, theirs = content(one), content(other)
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name in ours[0]:
        assert ours[0][name] == theirs[0][name], name
    assert one.weights.read_bytes() == other.weights.read_bytes()
    assert untimed([one.metrics()]) == untimed([other.metrics()])
    assert untimed(one.history()) == untimed(other.history())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs that nobody stopped, made when they are first asked for, and their steps."""
    runs = {}

    def give(*assignments):
        if assignments not in runs:
            run = start(override(TINY, assignments), tmp_path_factory.mktemp("whole") / "run")
            runs[assignments] = run, fit(run)
        return runs[assignments]

    return give


PLACES = [(epoch, step) for epoch in range(3) for step in range(1, STEPS + 1)]


def stopped_and_resumed(whole, folder, place, **stopping):
    run, steps = whole
    mine = start(run.recipe(), folder)
    first = fit(mine, place, **stopping)
    assert not mine.is_finished
    rest = fit(mine, resume=True)
    assert first + rest == steps
    assert_same(run, mine)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_run_stopped_after_any_step_ends_as_if_it_was_not(uninterrupted, tmp_path, place):
    stopped_and_resumed(uninterrupted(*EVERYTHING), tmp_path / "run", place)


@pytest.mark.parametrize("place", [(0, 1), (2, 1)], ids=str)
def test_a_run_stopped_while_validating_ends_as_if_it_was_not(uninterrupted, tmp_path, place):
    stopped_and_resumed(uninterrupted(*EVERYTHING), tmp_path / "run", place, validating=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("place", [(0, 1), (1, 3), (1, STEPS)], ids=str)
def test_every_schedule_goes_on_where_it_was(uninterrupted, tmp_path, schedule, place):
    whole = uninterrupted(f"schedule.kind={schedule}")
    stopped_and_resumed(whole, tmp_path / "run", place)


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
    "fastai/Lamb": ["lr=0.002"],
    "torch/Rprop": ["lr=0.001", "weight_decay=0"],
    "fastai/ranger": ["lr=0.002", "options.k=3"],
}


@pytest.mark.parametrize("schedule", ["one-cycle", "published"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_where_it_was(uninterrupted, tmp_path, name, schedule):
    settings = [f"optimizer.{each}" for each in (f"name={name}", *OPTIMIZERS[name])]
    whole = uninterrupted(*settings, f"schedule.kind={schedule}")
    stopped_and_resumed(whole, tmp_path / "run", (1, 2))


def test_the_optimizer_of_a_run_cannot_be_changed(tmp_path):
    run = start(override(TINY, ["optimizer.name=adamw", "optimizer.lr=0.002"]), tmp_path / "run")
    fit(run, (1, 1))
    changed = override(run.recipe(), ["optimizer.name=torch/RAdam"])
    with pytest.raises(InputError, match=r"optimizer.name is 'torch/RAdam' now and 'adamw'"):
        train(prepare(changed), run, resume=True)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_kind_of_mask_goes_on_where_it_was(uninterrupted, tmp_path, kind):
    whole = uninterrupted(f"mix.kind={kind}", "train.epochs=2", "mix.mix_prob=0.8")
    stopped_and_resumed(whole, tmp_path / "run", (1, 3))


@pytest.mark.parametrize(
    "assignments",
    [
        ("model.num_members=1", "mix.kind=sum", "mix.batch_repetitions=1", "train.batch_size=8"),
        ("model.num_members=3", "mix.msda=cutmix", "mix.input_repetition=0.5"),
        ("data.loader=streaming", "data.num_workers=0", "data.augmix=true"),
        ("data.transform=randaugment", "data.num_workers=0"),
        ("data.transform=random-resized-crop", "data.transform_options.scale=[0.5, 1]"),
        ("data.transform=aug-transforms",),
        ("data.loader=streaming", "data.num_workers=1"),
        ("model.ghost_batch_size=16", "data.flip=true", "data.alternating_flip=true"),
    ],
    ids=" ".join,
)
def test_every_way_of_training_goes_on_where_it_was(uninterrupted, tmp_path, assignments):
    stopped_and_resumed(uninterrupted(*assignments), tmp_path / "run", (1, 3))


def test_steps_beyond_a_group_of_draws_go_on_where_they_were(uninterrupted, tmp_path):
    """Draws are made for 16 steps at a time."""
    whole = uninterrupted("data.limit=200", "train.batch_size=16", "train.epochs=1")
    assert len(whole[1]) > 40
    for step in (15, 16, 17, 33):
        stopped_and_resumed(whole, tmp_path / f"run-{step}", (0, step))


def test_a_resumed_run_can_be_resumed(uninterrupted, tmp_path):
    run, steps = uninterrupted(*EVERYTHING)
    mine = start(run.recipe(), tmp_path / "run")
    places = [(0, 2), (0, 3), (0, STEPS), (2, 1), (2, STEPS), None]
    seen = [step for i, place in enumerate(places) for step in fit(mine, place, resume=i > 0)]
    assert seen == steps
    assert_same(run, mine)


def test_a_search_for_a_rate_changes_nothing_of_a_resumed_run(uninterrupted, tmp_path):
    def searched(recipe):
        training = prepare(recipe)
        search_lr(training, num_steps=40)
        return training

    run, steps = uninterrupted(*EVERYTHING)
    mine = start(run.recipe(), tmp_path / "run")
    seen = fit(mine, (1, 2), prepare=searched) + fit(mine, resume=True, prepare=searched)
    assert seen == steps
    assert_same(run, mine)


def test_a_process_that_ends_at_once_loses_what_came_after_the_checkpoint(uninterrupted, tmp_path):
    class Fall(Callback):
        order = 90

        def after_batch(self):
            if (self.learn.epoch, self.learn.iter) == (1, 3):
                raise KeyboardInterrupt

    run, steps = uninterrupted(*EVERYTHING)
    mine = start(run.recipe(), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(prepare(mine.recipe()), mine, cbs=[Fall()])
    assert fit(mine, resume=True) == steps[STEPS:]
    assert_same(run, mine)


def test_a_finished_run_stays_as_it_is(uninterrupted, tmp_path):
    run, _ = uninterrupted(*EVERYTHING)
    shutil.copytree(run.path, tmp_path / "run")
    mine = open_run(tmp_path / "run")
    assert fit(mine, resume=True) == []
    assert_same(run, mine)


def test_the_checkpoint_holds_tensors_and_text(uninterrupted):
    run, _ = uninterrupted(*EVERYTHING)
    saved = CheckpointStore(run.checkpoint).newest()
    names = {"model", "optimizer", "ema", "best_epoch"}
    tensors = {f"{name}.safetensors" for name in names}
    assert set(saved.files) == {"state.json", "history.json"} | tensors
    assert all(load_file(saved.path / name) for name in tensors)
    state = json.loads((saved.path / "state.json").read_text())
    assert (state["epoch"], state["step"], state["steps_per_epoch"]) == (3, 0, STEPS)
