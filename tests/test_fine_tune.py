"""The schedule of `fine-tune`: the heads alone at first, then all layers, as fastai's fine_tune."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders, TfmdDL
from fastai.optimizer import Adam
from learners import equal, state
from short_runs import TINY
from synthetic import fastai_dls
from torch import nn

from mixmo_fastai import mixmo_learner
from mixmo_fastai.callbacks.freeze import FreezeCallback, frozen_steps
from mixmo_fastai.config.resolve import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.parameter_groups import body_and_heads
from mixmo_fastai.training.lr_find import search_lr
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.schedule import fine_tune
from mixmo_fastai.training.train import schedules

BATCHES, FROZEN_EPOCHS, EPOCHS = 4, 1, 3
LR, BODY_DIV = 4e-3, 20


def learner(**kwargs):
    """Build a Learner whose epochs have the same batches in the same order."""
    dls = fastai_dls(num_train=48)
    train = TfmdDL(dls.train_ds, bs=12, shuffle=False, num_workers=0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    learn = mixmo_learner(
        DataLoaders(train, dls.valid), network, mix="sum", num_members=1, opt_func=Adam, lr=LR,
        splitter=body_and_heads, batch_repetitions=1, **kwargs,
    )  # fmt: skip
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


class Record(Callback):
    """Record the rates and the momentum of each step, and which parameters are trained."""

    order = 61  # after the schedule

    def __init__(self):
        super().__init__()
        self.rates, self.momentums, self.trained = [], [], []

    def before_batch(self):
        if self.learn.training:
            self.rates.append([h["lr"] for h in self.learn.opt.hypers])
            self.momentums.append(self.learn.opt.hypers[-1]["mom"])
            names = {n for n, p in self.learn.model.named_parameters() if p.requires_grad}
            self.trained.append(names)


@pytest.fixture(scope="module")
def by_fastai():
    learn, record = learner(), Record()
    learn.add_cb(record)
    learn.fine_tune(EPOCHS, LR, FROZEN_EPOCHS, lr_mult=BODY_DIV)
    return learn, record


def our_fit(learn, record):
    num_steps = (FROZEN_EPOCHS + EPOCHS) * BATCHES
    frozen = frozen_steps(FROZEN_EPOCHS / (FROZEN_EPOCHS + EPOCHS), num_steps)
    values = fine_tune(
        LR, num_steps=num_steps, frozen_steps=frozen, body_div=BODY_DIV, pct_start=0.3, div=5.0,
        div_final=1e5, momentums=(0.95, 0.85, 0.95),
    )  # fmt: skip
    learn.create_opt()
    callbacks = [FreezeCallback(frozen), ParamScheduler(values), record]
    learn.fit(FROZEN_EPOCHS + EPOCHS, LR, cbs=callbacks)


def test_training_equals_that_of_fastai(by_fastai):
    theirs, expected = by_fastai
    learn, record = learner(), Record()
    our_fit(learn, record)
    assert len(record.rates) == (FROZEN_EPOCHS + EPOCHS) * BATCHES
    # fastai computes schedules in single precision
    for found, by_them in zip(record.rates, expected.rates, strict=True):
        assert found == pytest.approx([float(rate) for rate in by_them], rel=1e-5)
    assert record.momentums == pytest.approx([*map(float, expected.momentums)], rel=1e-6)
    assert record.trained == expected.trained
    for name, tensor in theirs.model.state_dict().items():
        torch.testing.assert_close(learn.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_body_is_frozen_but_for_batchnorm(by_fastai):
    learn, record = learner(), Record()
    before = state(learn)
    our_fit(learn, record)
    first, last = record.trained[0], record.trained[-1]
    assert {name.split(".")[0] for name in first} == {"core", "heads"}
    norms = {n for n, m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in first if name.startswith("core")} == norms
    assert last == {name for name, _ in learn.model.named_parameters()}
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    assert not equal(before, state(learn))


def test_frozen_weights_do_not_change():
    learn = learner()
    before = state(learn)
    learn.fit(1, LR, cbs=[FreezeCallback(BATCHES)])
    after = state(learn)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "encoders.0.weight" not in changed
    assert {name for name in before if name.startswith("heads")} <= changed


class ValidateAgain(Callback):
    """Validate once more after the first epoch."""

    order, num_done = 90, 0

    def after_epoch(self):
        if not self.num_done:
            self.num_done = 1
            with self.learn.no_bar():
                self.learn.validate()


def test_a_validation_within_the_fit_does_not_unfreeze():
    learn, record = learner(), Record()
    frozen = BATCHES + 1
    learn.fit(2, LR, cbs=[FreezeCallback(frozen), ValidateAgain(), record])
    is_frozen = ["encoders.0.weight" not in names for names in record.trained]
    assert is_frozen == [True] * frozen + [False] * (2 * BATCHES - frozen)
    assert all(parameter.requires_grad for parameter in learn.model.parameters())


def test_share_of_frozen_steps():
    assert [frozen_steps(share, 10) for share in (0, 0.04, 0.2, 0.95)] == [0, 0, 2, 9]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_schedule_of_a_recipe(share):
    recipe = override(
        TINY,
        ["schedule.kind=fine-tune", f"schedule.frozen_share={share}", "schedule.body_div=10",
         "optimizer.lr=0.02", "schedule.div_final=1000"],
    )  # fmt: skip
    functions = schedules(recipe, steps_per_epoch=20, warmup_steps=0)
    rates = [functions["lr"](step / 60) for step in range(60)]
    frozen = round(60 * share)
    for body, heads in rates[:frozen]:
        assert body == pytest.approx(heads / 10)
    for body, heads in rates[frozen:]:
        assert body == pytest.approx(heads / 10)
    if frozen:
        assert rates[0][1] == pytest.approx(0.02 / 25)
        assert max(rate for _, rate in rates[:frozen]) == pytest.approx(0.02, rel=0.02)
    assert max(rate for _, rate in rates[frozen:]) == pytest.approx(0.01, rel=0.02)
    assert rates[-1][1] < 0.001


@pytest.mark.parametrize(("share", "is_frozen"), [(0.2, True), (0, False)])
def test_rate_search_trains_the_part_of_the_rate(share, is_frozen):
    training = prepare(
        override(TINY, ["schedule.kind=fine-tune", f"schedule.frozen_share={share}"])
    )
    learn, record = training.learn, Record()
    before = state(learn)
    with learn.added_cbs(record):
        search_lr(training, num_steps=30)
    trained = set.union(*record.trained)
    assert ("encoders.0.weight" not in trained) == is_frozen
    assert "heads.0.weight" in trained
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    assert equal(before, state(learn))


def test_frozen_share_must_leave_steps():
    with pytest.raises(InputError, match=r"schedule.frozen_share"):
        override(TINY, ["schedule.frozen_share=1"])
