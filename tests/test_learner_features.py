"""fastai's Learner features work with MixMo: one test per row of the README's table.

Each test runs with three Learners: a user's Learner with a network of this package, on a folder of
images with transforms; a user's Learner and network converted by `to_mixmo`; and `mixmo_learner` on
this package's loaders.
"""

import random
from pathlib import Path

import fastai.callback.fp16
import fastai.callback.schedule
import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from three_learners import (
    StepRecorder,
    accuracy_of,
    copy_weights,
    equal_weights,
    folder,
    hidden_plots,
    make,
    make_learner,
    without_norms,
)

from mixmo_fastai import EMACallback
from mixmo_fastai.learner.build import body_and_heads

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hidden_plots")]

__all__ = ["folder", "hidden_plots", "make", "make_learner"]  # fixtures


def test_lr_find(make):
    learn = make()
    before = copy_weights(learn)
    suggestions = learn.lr_find(num_it=20, show_plot=False)
    assert 1e-7 < suggestions.valley < 10
    assert equal_weights(copy_weights(learn), before)
    assert len(learn.recorder.lrs) > 10
    learn.fit(1, 1e-3)
    assert learn.mix_mo.epochs_trained == 1


def test_lr_find_plots_its_curve(make):
    import matplotlib.pyplot as plt

    make().lr_find(num_it=10)
    assert plt.gca().get_xlabel() == "Learning Rate"


def test_fit_one_cycle(make):
    recorder = StepRecorder()
    learn = make(cbs=[recorder])
    learn.fit_one_cycle(6, 0.05)
    rates = [step[-1] for step in recorder.lrs]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.05, rel=0.02)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert accuracy_of(learn) > 0.8


def test_fit_flat_cos(make):
    recorder = StepRecorder()
    make(cbs=[recorder]).fit_flat_cos(5, 0.01)
    rates = [step[-1] for step in recorder.lrs]
    assert rates[: int(0.7 * len(rates))] == [0.01] * int(0.7 * len(rates))
    assert rates[-1] < 0.001


def test_fine_tune(make):
    """First only the heads train, then all parameters, with a lower rate for the body."""
    changed = []

    class ChangedParameters(Callback):
        def before_epoch(self):
            self.before = copy_weights(self.learn)

        def after_train(self):
            now = copy_weights(self.learn)
            names = (n for n, _ in self.learn.model.named_parameters())
            changed.append({n for n in names if not torch.equal(now[n], self.before[n])})

    recorder = StepRecorder()
    learn = make(cbs=[recorder, ChangedParameters()], splitter=body_and_heads)
    learn.fine_tune(2, 0.02, freeze_epochs=1)
    heads = {f"heads.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert without_norms(learn, changed[0]) == heads
    all_names = {name for name, _ in learn.model.named_parameters()}
    assert changed[1] | changed[2] == all_names
    body, heads = recorder.lrs[-5]
    assert body < heads / 10


def test_freeze_and_discriminative_learning_rates(make):
    recorder = StepRecorder()
    learn = make(cbs=[recorder], splitter=body_and_heads)
    learn.fit(1, slice(1e-4, 1e-2))
    assert recorder.lrs[0] == pytest.approx([1e-4, 1e-2])
    learn.freeze()
    trainable = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in without_norms(learn, trainable)} == {"heads"}
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())


IGNORE_CUDA_WARNINGS = (
    "ignore:(User provided device_type of 'cuda'|CUDA is not|torch.cuda.amp.GradScaler)"
)


@pytest.mark.filterwarnings(IGNORE_CUDA_WARNINGS)
@pytest.mark.parametrize(
    ("change", "dtype"),
    [(Learner.to_fp16, torch.float16), (Learner.to_bf16, torch.bfloat16)],
    ids=["to_fp16", "to_bf16"],
)
def test_to_fp16_and_to_bf16(make, monkeypatch, change, dtype):
    """fastai uses CUDA autocast, which is replaced by CPU autocast to test real low precision."""
    monkeypatch.setattr(
        fastai.callback.fp16, "autocast", lambda *_, dtype: torch.autocast("cpu", dtype=dtype)
    )
    recorder = StepRecorder()
    learn = change(make(cbs=[recorder]))
    core_dtypes = set()
    handle = learn.model.core.register_forward_hook(lambda *args: core_dtypes.add(args[2].dtype))
    learn.fit_one_cycle(6, 0.05)
    handle.remove()
    assert core_dtypes == {dtype}
    assert recorder.dtypes == {
        torch.float32
    }  # of the logits, whose means would tie in low precision
    assert not torch.is_autocast_enabled("cpu")
    assert accuracy_of(learn) > 0.7


def test_channels_last(make):
    recorder = StepRecorder()
    learn = make(cbs=[recorder, ChannelsLast()])
    learn.model.to(memory_format=torch.contiguous_format)  # undo channels_last of `mixmo_learner`
    learn.fit(1, 1e-2)
    convolutions = [tensor for tensor in learn.model.state_dict().values() if tensor.ndim == 4]
    assert len(convolutions) > len(learn.model.encoders)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in convolutions)
    assert all(np.isfinite(recorder.losses))


def test_gradient_accumulation(make):
    """Each step accumulates the gradients of two batches."""
    recorder = StepRecorder()
    learn = make(cbs=[recorder, GradientAccumulation(2 * 4 * make().dls.bs)])
    random.seed(0)  # fastai shuffles with Python's global generator
    learn.fit(2, 1e-3)
    assert len(recorder.lrs) == len(recorder.losses) // 2
    plain = StepRecorder()
    other = make(cbs=[plain])
    random.seed(0)
    other.fit(2, 1e-3)
    # The accumulated gradient is the mean over two batches, at nearly the same weights.
    assert 0.3 < recorder.norms[0] / np.mean(plain.norms[:2]) < 1.05


def test_gradient_clip(make):
    plain, clipped = StepRecorder(), StepRecorder()
    make(cbs=[plain]).fit(1, 1e-3)
    make(cbs=[clipped, GradientClip(0.1)]).fit(1, 1e-3)
    assert min(plain.norms) > 0.1
    assert max(clipped.norms) == pytest.approx(0.1, rel=1e-3)


class WeightRecorder(Callback):
    """Record a parameter at the start of a fit and after each step."""

    order = EMACallback.order - 1

    def before_train(self):
        if self.epoch == 0:
            self.weights = [next(self.model.parameters()).detach().clone()]

    def after_step(self):
        self.weights.append(next(self.model.parameters()).detach().clone())


def test_ema_callback(make):
    recorder = WeightRecorder()
    learn = make(cbs=[recorder, EMACallback(0.9)])
    learn.fit_one_cycle(2, 0.05)
    average, *steps = recorder.weights
    for number, weight in enumerate(steps):
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(next(learn.model.parameters()).detach(), average)
    valid_loss = learn.recorder.values[-1][1]
    assert learn.validate()[0] == pytest.approx(valid_loss, rel=1e-4)


def test_early_stopping_callback(make):
    learn = make(cbs=[EarlyStoppingCallback(monitor="accuracy", min_delta=2.0, patience=1)])
    learn.fit(6, 1e-4)
    assert learn.epoch < 5
    assert learn.mix_mo.epochs_trained == 2
    learn.fit(1, 1e-4)
    assert learn.mix_mo.epochs_trained == 3


def test_save_model_callback(make):
    learn = make(cbs=[SaveModelCallback(monitor="valid_loss", fname="best")])
    learn.fit_one_cycle(4, 0.05)
    losses = [row[1] for row in learn.recorder.values]
    assert learn.validate()[0] == pytest.approx(min(losses), rel=1e-4)
    best = copy_weights(learn)
    learn.remove_cbs(SaveModelCallback)
    learn.fit(1, 0.1)
    assert not equal_weights(copy_weights(learn), best)
    learn.load("best", with_opt=False)
    assert equal_weights(copy_weights(learn), best)


def test_csv_logger(make, tmp_path):
    learn = make(cbs=[CSVLogger("history.csv")])
    learn.fit(2, 1e-3)
    header, *rows = (tmp_path / "history.csv").read_text().splitlines()
    assert header.split(",")[:4] == ["epoch", "train_loss", "valid_loss", "accuracy"]
    assert len(rows) == 2
    train, valid = (float(value) for value in rows[0].split(",")[1:3])
    assert [train, valid] == pytest.approx([*learn.recorder.values[0][:2]], rel=1e-4)
    assert train < 2 * valid  # per member


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tensor_board_callback(make, tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn = make(cbs=[TensorBoardCallback(tmp_path / "logs", n_preds=4)])
    learn.fit(2, 1e-3)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    num_steps = 2 * len(learn.dls.train)
    assert {event.step for event in events.Scalars("train_loss")} == {*range(1, num_steps + 1)}
    assert events.Scalars("train_loss")[-1].value == pytest.approx(learn.recorder.values[-1][0])
    assert events.Scalars("valid_loss")[-1].value == pytest.approx(learn.recorder.values[-1][1])
    assert events.Tags()["images"]
    assert events.Tags()["graph"]


def test_wandb_callback(make, tmp_path, monkeypatch):
    import fastai.callback.wandb as fastai_wandb
    import wandb

    try:
        fastai_wandb._format_config({"a number": 1})
    except TypeError:  # https://github.com/fastai/fastai/issues/4173
        monkeypatch.setattr(fastai_wandb, "_format_config", lambda config: config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    with wandb.init(project="mixmo", dir=tmp_path) as run:
        monkeypatch.setattr(run, "log", lambda values, **_: logged.append(values))
        monkeypatch.setattr(wandb, "log", run.log)
        learn = make(cbs=[fastai_wandb.WandbCallback(n_preds=4)])
        learn.fit(2, 1e-3)
    assert sum("train_loss" in values for values in logged) == 2 * len(learn.dls.train)
    wandb.teardown()  # otherwise later tests would see this environment
    assert sum("valid_loss" in values for values in logged) == 2
