"""fastai's Learner features work with MixMo: one test per row of the README's table.

Each test runs with three Learners: a user's Learner with a network of this package, on a folder of
images with transforms; a user's Learner and network converted by `to_mixmo`; and `mixmo_learner` on
this package's loaders.
"""

import random
import re
from pathlib import Path

import fastai.callback.fp16
import fastai.callback.schedule
import fastai.vision.learner  # draws results and top losses
import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from synthetic import CLASSES, image_arrays, mixmo_dls
from torch import nn

from mixmo_fastai import (
    ECE,
    NLL,
    Brier,
    Disagreement,
    MemberAccuracy,
    MixMoCallback,
    create_model,
    evaluate_logits,
    member_preds,
    mixmo_learner,
    show_pairs,
    to_mixmo,
)
from mixmo_fastai.learner.build import body_and_heads

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hidden_plots")]


@pytest.fixture
def hidden_plots():
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of image files of several sizes, with one folder per class."""
    root = tmp_path_factory.mktemp("blocks")
    pixels, labels = image_arrays(60, size=16)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = root / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image_file = Image.fromarray(image.permute(1, 2, 0).numpy())
        image_file.resize((16 + number % 5, 16 + number % 3), Image.Resampling.NEAREST).save(path)
    return root


def folder_dls(folder):
    return ImageDataLoaders.from_folder(
        folder, valid_pct=0.2, seed=1, bs=6, num_workers=0, device="cpu",
        item_tfms=Resize(16), batch_tfms=aug_transforms(size=12, flip_vert=True),
    )  # fmt: skip


def user_learner(folder, path, *, cbs=(), **kwargs):
    """Build a Learner as fastai users do, with the callback added."""
    dls = folder_dls(folder)
    model = create_model("wrn10_1", dls.c, generator=torch.Generator().manual_seed(3))
    return Learner(
        dls, model, cbs=[MixMoCallback(seed=0), *cbs], metrics=accuracy, path=path, **kwargs
    )


def converted_learner(folder, path, *, cbs=(), **kwargs):
    """Build a plain Learner and convert it."""
    dls = folder_dls(folder)
    layers = (
        [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        + [nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()]
        + [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, dls.c)]
    )
    learn = Learner(dls, nn.Sequential(*layers), cbs=[*cbs], metrics=accuracy, path=path, **kwargs)
    return to_mixmo(learn, independent=True, seed=0)


def package_learner(folder, path, *, cbs=(), **kwargs):
    return mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, cbs=cbs, path=path, **kwargs)


LEARNERS = [user_learner, converted_learner, package_learner]


@pytest.fixture(params=LEARNERS)
def make(request, folder, tmp_path):
    """Return a function that builds a Learner without printed output."""

    def build(**kwargs):
        set_seed(0)  # fastai's loaders shuffle with Python's global generator
        learn = request.param(folder, tmp_path, **kwargs)
        learn.logger = lambda *_: None
        learn.remove_cbs(ProgressCallback)
        return learn

    return build


class StepRecorder(Callback):
    """Record learning rates, losses, gradient norms and dtypes of all training steps."""

    order, run_valid = 60, False  # after fastai's ParamScheduler and Recorder

    def __init__(self):
        super().__init__()
        self.lrs, self.losses, self.norms = [], [], []
        self.dtypes = set()

    def after_pred(self):
        self.dtypes.add(self.learn.pred.dtype)

    def before_step(self):
        gradients = [p.grad for p in self.learn.model.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        self.lrs.append([hyper["lr"] for hyper in self.learn.opt.hypers])

    def after_batch(self):
        self.losses.append(self.learn.loss.item())


def copy_weights(learn):
    return {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_norms(learn, names):
    """Remove the names of normalisation layers, which fastai trainable even when frozen."""
    modules = learn.model.named_modules()
    norms = {name for name, module in modules if isinstance(module, nn.BatchNorm2d)}
    return {name for name in names if name.rpartition(".")[0] not in norms}


def accuracy_of(learn):
    predictions, targets = learn.get_preds()
    return (predictions.argmax(1) == targets).float().mean().item()


def test_lr_find(make):
    learn = make()
    before = copy_weights(learn)
    suggestions = learn.lr_find(num_it=30, show_plot=False)
    assert 1e-7 < suggestions.valley < 10
    assert equal_weights(copy_weights(learn), before)
    assert len(learn.recorder.lrs) > 10
    learn.fit(1, 1e-3)
    assert learn.mix_mo.epochs_trained == 1


def test_lr_find_plots_its_curve(make):
    import matplotlib.pyplot as plt

    make().lr_find(num_it=20)
    assert plt.gca().get_xlabel() == "Learning Rate"


def test_fit_one_cycle(make):
    recorder = StepRecorder()
    learn = make(cbs=[recorder])
    learn.fit_one_cycle(8, 0.05)
    rates = [step[-1] for step in recorder.lrs]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.05, rel=0.02)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert accuracy_of(learn) > 0.8


def test_fit_flat_cos(make):
    recorder = StepRecorder()
    make(cbs=[recorder]).fit_flat_cos(4, 0.01)
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
    learn.fit_one_cycle(4, 0.05)
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


def test_show_batch(make):
    import matplotlib.pyplot as plt

    learn = make()
    learn.dls.show_batch(max_n=4)
    assert sum(bool(axes.images) for axes in plt.gcf().axes) == 4


def test_show_pairs(make):
    import matplotlib.pyplot as plt

    learn = make()
    show_pairs(learn, max_n=3, title="pairs")
    fig = plt.gcf()
    assert len(fig.axes) == 3 * 5  # image and mask of each member, and the mixture
    names = {axes.get_title().split("\n")[-1] for axes in fig.axes}
    assert names & set(CLASSES)
    assert all(axes.images for axes in fig.axes)


def test_show_pairs_does_not_change_the_learner(make):
    random.seed(0)
    shown = make()
    random.seed(0)
    other = make()
    torch.manual_seed(5)
    before, state = {**vars(shown)}, random_states()
    show_pairs(shown)
    assert random_states() == state
    del before["loss_func"]
    assert before == {name: value for name, value in vars(shown).items() if name in before}
    for learn in (shown, other):
        random.seed(0)
        torch.manual_seed(0)
        learn.fit(1, 1e-2)
    assert equal_weights(copy_weights(shown), copy_weights(other))


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_show_results(make):
    import matplotlib.pyplot as plt

    learn = make()
    learn.show_results(max_n=4)
    titled = [axes.get_title() for axes in plt.gcf().axes if axes.images]
    assert len(titled) == 4
    assert all(set(title.split("\n")) <= set(CLASSES) for title in titled)


def test_get_preds(make):
    learn = make()
    learn.fit(1, 1e-2)
    inputs, probabilities, targets, decoded, losses = learn.get_preds(
        with_input=True, with_decoded=True, with_loss=True
    )
    assert len(inputs) == len(targets) == len(learn.dls.valid_ds)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(targets)))
    expected = learn.model.eval()(inputs)
    torch.testing.assert_close(probabilities, expected.softmax(1).detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(decoded, probabilities.argmax(1))
    nll = -probabilities.gather(1, targets[:, None].long()).log().squeeze(1)
    torch.testing.assert_close(losses, nll, rtol=1e-3, atol=1e-4)


def test_member_preds(make):
    learn = make()
    learn.fit(1, 1e-2)
    probabilities, targets, votes, information = member_preds(learn)
    inputs, ensemble, ensemble_targets = learn.get_preds(with_input=True)
    assert torch.equal(targets, torch.Tensor(ensemble_targets))
    expected = learn.model.eval().member_logits(inputs).softmax(2).detach()
    torch.testing.assert_close(probabilities, torch.Tensor(expected), rtol=1e-3, atol=1e-4)
    assert torch.equal(votes, probabilities.argmax(2))
    ensemble_probabilities = probabilities.log().mean(1).softmax(1)
    torch.testing.assert_close(ensemble_probabilities, torch.Tensor(ensemble), rtol=1e-3, atol=1e-4)
    assert information.shape == targets.shape


def test_predict(make):
    learn = make()
    learn.fit_one_cycle(8, 0.05)
    dataset = learn.dls.valid_ds
    item = learn.dls.valid.items[0] if hasattr(learn.dls.valid, "items") else dataset[0][0]
    name, index, probabilities = learn.predict(item)
    assert name in CLASSES
    assert int(index) == [*learn.dls.vocab].index(name) == int(probabilities.argmax())
    torch.testing.assert_close(probabilities, learn.get_preds()[0][0], rtol=1e-2, atol=1e-2)


def test_tta(make):
    learn = make()
    learn.fit_one_cycle(6, 0.05)
    probabilities, targets = learn.tta(n=2)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(targets)))
    assert (probabilities.argmax(1) == targets).float().mean() > 0.5


def test_classification_interpretation(make):
    import matplotlib.pyplot as plt

    learn = make()
    learn.fit_one_cycle(4, 0.05)
    interpretation = ClassificationInterpretation.from_learner(learn)
    matrix = interpretation.confusion_matrix()
    assert matrix.sum() == len(learn.dls.valid_ds)
    assert np.trace(matrix) / matrix.sum() == pytest.approx(accuracy_of(learn))
    interpretation.plot_confusion_matrix()
    interpretation.plot_top_losses(4)
    assert sum(bool(axes.images) for axes in plt.gcf().axes) == 4
    interpretation.print_classification_report()


@pytest.mark.filterwarnings("ignore:load_learner")
def test_export_and_load_learner(make, tmp_path):
    learn = make()
    learn.fit(1, 1e-2)
    expected = learn.get_preds()[0]
    x, _ = learn.dls.valid.one_batch()
    learn.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    torch.testing.assert_close(loaded.model.eval()(x).softmax(1), expected[: len(x)])
    assert loaded.mix_mo.mix == "cutmix"


def test_save_and_load(make):
    learn = make()
    learn.fit(1, 1e-2)
    before = copy_weights(learn)
    learn.save("stage-1")
    learn.fit(1, 1e-2)
    learn.load("stage-1")
    assert equal_weights(copy_weights(learn), before)


def test_train_metrics(make):
    """Training metrics average over the members, each with its own images."""
    learn = make()
    learn.recorder.train_metrics = True
    learn.fit_one_cycle(8, 0.05)
    names, row = learn.recorder.metric_names, learn.recorder.values[-1]
    metrics = dict(zip(names[1:], row, strict=False))
    assert 0.4 < metrics["train_accuracy"] <= 1
    assert metrics["valid_accuracy"] > 0.7
    assert metrics.get("train_member_accuracy", metrics["train_accuracy"]) == pytest.approx(
        metrics["train_accuracy"]
    )


@pytest.mark.filterwarnings("ignore:load_learner")
def test_nll_brier_ece_member_accuracy_and_disagreement(make, tmp_path):
    """They are those of `evaluate_logits`, after a fit, an lr_find and in an exported Learner."""
    learn = make()
    learn.metrics = [NLL(), Brier(), ECE(), MemberAccuracy(), Disagreement()]
    learn.lr_find(num_it=5, show_plot=False)
    learn.fit_one_cycle(1, 0.05)
    assert list(learn.recorder.metric_names[3:8]) == [
        *("nll", "brier", "ece", "member_accuracy", "disagreement")
    ]
    learn.model.eval()
    with torch.no_grad():
        batches = [(learn.model.member_logits(x), y) for x, y in learn.dls.valid]
    logits, labels = (
        torch.cat(parts).as_subclass(torch.Tensor) for parts in zip(*batches, strict=True)
    )
    expected = evaluate_logits(logits, labels)
    expected["member_accuracy"] = sum(expected["member_accuracy"]) / 2
    learn.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    for values in (
        learn.recorder.values[-1][2:7],
        learn.validate()[1:],
        loaded.validate(dl=learn.dls.valid)[1:],
    ):
        for metric, value in zip(learn.metrics, values, strict=True):
            assert value == pytest.approx(expected[metric.name], rel=1e-5, abs=1e-6), metric.name


def test_summary(make):
    learn = make()
    text = re.sub(r"[,.]", "", learn.summary())
    total = sum(p.numel() for p in learn.model.parameters())
    assert f"Total params: {total}" in text


@pytest.mark.parametrize("make_learner", LEARNERS)
def test_progress_bars(make_learner, folder, tmp_path, capsys):
    learn = make_learner(folder, tmp_path)
    learn.fit(2, 1e-3)
    output = capsys.readouterr().out
    assert "epoch" in output
    assert "valid_loss" in output
    with learn.no_bar():
        learn.fit(1, 1e-3)
