import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from short_runs import TINY, without_timings

from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.runs import evaluate_run
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.weights import load_weights
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.lr_find import search_lr
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.schedule import flat_cosine, one_cycle
from mixmo_fastai.training.train import TrainingDivergedError, schedules, train


class StepRecorder(Callback):
    """Record the hyperparameters of each step; raise KeyboardInterrupt in a given epoch from 1."""

    order, run_valid = 100, False

    def __init__(self, interrupt_in=0):
        super().__init__()
        self.interrupt_in, self.steps = interrupt_in, []

    def after_batch(self):
        hypers = self.learn.opt.hypers[-1]
        self.steps.append((self.learn.epoch + 1, hypers["lr"], hypers["mom"]))
        if self.learn.epoch + 1 == self.interrupt_in:
            raise KeyboardInterrupt


def fit(recipe, folder, *, resume=False, interrupt_in=0):
    """Train in a folder; return the run and the hyperparameters of each step."""
    run = open_run(folder) if resume else create_run(recipe, folder)
    recorder = StepRecorder(interrupt_in)
    train(prepare(recipe), run, cbs=[recorder], resume=resume)
    return run, recorder.steps


def assert_same_weights(first, second):
    tensors, other_tensors = load_file(first.weights), load_file(second.weights)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


@pytest.fixture(scope="module", params=["one-cycle", "flat-cosine", "published"])
def uninterrupted(request, tmp_path_factory):
    """Train an uninterrupted run; return it with the hyperparameters of its steps."""
    recipe = override(TINY, [f"schedule.kind={request.param}"])
    return fit(recipe, tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module", params=[["ema"], ["best"], ["ema", "best"]], ids="+".join)
def selected(request, tmp_path_factory):
    """Train an uninterrupted run whose final weights are averaged or of the best epoch."""
    changes = {"ema": "train.ema_decay=0.5", "best": "train.select=best"}
    recipe = override(TINY, [changes[name] for name in request.param])
    return fit(recipe, tmp_path_factory.mktemp("selected"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("interrupt_in", [2, 3])
def test_averages_and_best_epoch_are_resumed(selected, tmp_path, interrupt_in):
    with pytest.raises(KeyboardInterrupt):
        fit(selected.recipe(), tmp_path / "run", interrupt_in=interrupt_in)
    run, _ = fit(selected.recipe(), tmp_path / "run", resume=True)
    assert_same_weights(selected, run)
    assert without_timings(run.history()) == without_timings(selected.history())
    assert without_timings([run.metrics()]) == without_timings([selected.metrics()])
    finished, steps = fit(selected.recipe(), tmp_path / "run", resume=True)
    assert steps == []
    assert_same_weights(selected, finished)


@pytest.mark.slow
def test_final_weights_are_those_that_were_validated(selected):
    recipe, metrics = selected.recipe(), selected.metrics()
    epoch = metrics.get("selected_epoch", 3)
    if recipe.train.select == "best":
        rows = selected.history()
        keys = [(float(row["accuracy"]), -float(row["valid_loss"])) for row in rows]
        assert epoch == 1 + keys.index(max(keys))
    row = selected.history()[epoch - 1]
    assert metrics["valid"]["accuracy"] == pytest.approx(float(row["accuracy"]), abs=1e-6)
    assert metrics["valid"]["nll"] == pytest.approx(float(row["valid_loss"]), abs=1e-5)


@pytest.mark.slow
def test_validation_in_a_callback_does_not_change_the_run(selected, tmp_path):
    class NestedValidation(Callback):
        order, run_valid = 75, False

        def after_epoch(self):
            if not hasattr(self.learn, "nested") and self.learn.epoch < 2:
                self.learn.nested = True
                self.learn.validate()
                del self.learn.nested

    run = create_run(selected.recipe(), tmp_path / "run")
    train(prepare(selected.recipe()), run, cbs=[NestedValidation()])
    assert_same_weights(selected, run)
    assert without_timings(run.history()) == without_timings(selected.history())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(override(TINY, ["train.epochs=1"]), tmp_path_factory.mktemp("run"))[0]


@pytest.mark.slow
def test_same_seed_yields_the_same_weights(uninterrupted, tmp_path):
    first, steps = uninterrupted
    again, again_steps = fit(first.recipe(), tmp_path / "again")
    assert_same_weights(first, again)
    assert steps == again_steps
    assert without_timings(first.history()) == without_timings(again.history())
    assert first.metrics()["test"] == again.metrics()["test"]


@pytest.mark.slow
def test_other_seed_yields_other_weights(uninterrupted, tmp_path):
    first, _ = uninterrupted
    other, _ = fit(override(first.recipe(), ["train.seed=1"]), tmp_path / "other")
    tensors, other_tensors = load_file(first.weights), load_file(other.weights)
    filters = [name for name, tensor in tensors.items() if tensor.ndim == 4]
    assert filters
    assert not any(torch.equal(tensors[name], other_tensors[name]) for name in filters)


@pytest.mark.slow
@pytest.mark.parametrize("interrupt_in", [2, 3])
def test_resumed_run_equals_an_uninterrupted_run(uninterrupted, tmp_path, interrupt_in):
    expected, steps = uninterrupted
    recipe = expected.recipe()
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", interrupt_in=interrupt_in)
    run = open_run(tmp_path / "run")
    assert len(run.history()) == interrupt_in - 1
    assert not run.weights.exists()

    run, resumed_steps = fit(recipe, run.path, resume=True)
    assert_same_weights(expected, run)
    assert without_timings(run.history()) == without_timings(expected.history())
    assert resumed_steps == [step for step in steps if step[0] >= interrupt_in]
    assert without_timings([run.metrics()]) == without_timings([expected.metrics()])


@pytest.mark.slow
def test_epoch_without_a_checkpoint_is_trained_again(uninterrupted, tmp_path):
    expected, _ = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        fit(expected.recipe(), tmp_path / "run", interrupt_in=3)
    run = open_run(tmp_path / "run")
    run.append_history({**run.history()[-1], "epoch": 3})  # interrupted before the save
    fit(run.recipe(), run.path, resume=True)
    assert without_timings(run.history()) == without_timings(expected.history())


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    recipe = override(uninterrupted[0].recipe(), ["train.epochs=1"])
    run, _ = fit(recipe, tmp_path / "run")
    before = {name: (run.path / name).read_bytes() for name in ("metrics.json", "history.csv")}
    weights = load_file(run.weights)
    _, steps = fit(recipe, run.path, resume=True)
    assert steps == []
    assert {name: (run.path / name).read_bytes() for name in before} == before
    assert all(torch.equal(tensor, load_file(run.weights)[n]) for n, tensor in weights.items())


def test_steps_follow_the_schedule(uninterrupted):
    run, steps = uninterrupted
    recipe = run.recipe()
    rates = [lr for _, lr, _ in steps]
    assert len(steps) == 3 * (48 // 8)
    if recipe.schedule.kind == "one-cycle":
        lr = one_cycle(recipe.lr / 25, recipe.lr, recipe.lr / 1e5, 0.25)
        momentum = one_cycle(0.95, 0.85, 0.95, 0.25)
        assert rates == pytest.approx([lr(step / 18) for step in range(18)])
        assert [m for *_, m in steps] == pytest.approx([momentum(step / 18) for step in range(18)])
    elif recipe.schedule.kind == "flat-cosine":
        lr = flat_cosine(recipe.lr, recipe.lr / 1e5, 0.75)
        assert rates == pytest.approx([lr(step / 18) for step in range(18)])
        assert {m for *_, m in steps} == {0.9}
    else:
        # Four repetitions of ceil(48 / 32) batches.
        warmup = [min(1, (step + 1) / 8) for step in range(18)]
        drops = [*[1.0] * 6, *[0.1] * 6, *[0.01] * 6]
        factors = [w * d for w, d in zip(warmup, drops, strict=True)]
        assert rates == pytest.approx([recipe.lr * factor for factor in factors])
        assert {m for *_, m in steps} == {0.9}


def test_history_of_a_run(uninterrupted):
    run, steps = uninterrupted
    rows = run.history()
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["images_seen"] for row in rows] == ["192", "384", "576"]
    for row in rows:
        last = [lr for epoch, lr, _ in steps if epoch == int(row["epoch"])][-1]
        assert float(row["lr"]) == pytest.approx(last, rel=1e-5)
        assert 0 <= float(row["accuracy"]) <= 1
        assert 0 <= float(row["member_accuracy"]) <= 1
        # Both are near the cross-entropy of an untrained network with ten classes.
        assert 1 < float(row["train_loss"]) < 5
        assert 1 < float(row["valid_loss"]) < 5


def test_metrics_of_a_run(uninterrupted):
    run, _ = uninterrupted
    metrics = run.metrics()
    assert (metrics["recipe"], metrics["epochs"], metrics["images_seen"]) == ("tiny", 3, 576)
    model = prepare(run.recipe()).learn.model
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["seconds"] == round(sum(float(row["seconds"]) for row in run.history()), 1)
    assert len(metrics["test"]["member_accuracy"]) == 2
    # If all of the few validation images are correct or incorrect, no temperature is optimal.
    calibrated = metrics.get("calibrated", {"temperature": metrics["valid"]["temperature"]})
    assert calibrated["temperature"] == metrics["valid"]["temperature"]
    assert ("calibrated" in metrics) != ("calibrated" in metrics.get("absent", {}))


def test_evaluation_equals_the_stored_metrics(uninterrupted):
    run, _ = uninterrupted
    metrics = evaluate_run(run)
    assert {"valid", "test"} <= metrics.keys()
    assert metrics == {name: run.metrics()[name] for name in metrics}


@pytest.mark.slow
def test_lr_search_does_not_change_a_later_run(run, tmp_path):
    training = prepare(run.recipe())
    search = search_lr(training, num_steps=40)
    assert len(search.losses) > 15
    later = create_run(run.recipe(), tmp_path / "later")
    train(training, later)
    assert_same_weights(run, later)


def test_lr_search_ends_at_a_nan_loss(run):
    class NanLoss(Callback):
        def after_loss(self):
            if self.learn.train_iter >= 35:
                self.learn.loss = self.learn.loss * float("nan")

    training = prepare(run.recipe())
    training.learn.add_cb(NanLoss())
    search = search_lr(training, num_steps=40)
    assert len(search.lrs) == len(search.losses) == 35
    assert torch.tensor(search.losses).isfinite().all()


def test_lr_search_without_finite_losses_suggests_a_lower_start(run):
    with pytest.raises(InputError, match="--start 10000,"):
        search_lr(prepare(run.recipe()), num_steps=30, start=1e6, end=1e7)


@pytest.mark.parametrize(
    "setting", [{"num_steps": 29}, {"start": 0.0}, {"start": -1.0}, {"start": 1.0, "end": 1.0}]
)
def test_wrong_range_of_an_lr_search_is_refused(setting):
    with pytest.raises(InputError, match=r"num_steps must be|first learning rate must be above 0"):
        search_lr(None, **setting)


def test_no_validation_metrics_without_validation_split(tmp_path):
    run, _ = fit(override(TINY, ["train.epochs=1", "data.valid_split=0"]), tmp_path / "run")
    assert [run.history()[0][name] for name in ("valid_loss", "accuracy")] == ["", ""]
    assert run.metrics().keys().isdisjoint({"valid", "calibrated"})
    assert "accuracy" in run.metrics()["test"]


def test_diverged_run_suggests_a_lower_rate(tmp_path):
    recipe = override(TINY, ["optimizer.lr=1e30"])
    run = create_run(recipe, tmp_path / "run")
    with pytest.raises(TrainingDivergedError) as caught:
        train(prepare(recipe), run)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The training loss is not finite at step 2 of epoch 1."
    suggestion = float(lines[1].partition("--lr ")[2].split(";")[0])
    assert suggestion == pytest.approx(0.05 * 32 / 64 / 4 * 2)
    assert run.history() == []
    assert not run.checkpoint.exists()
    assert not run.weights.exists()


def test_diverged_step_is_named_when_losses_are_fetched_later(tmp_path, monkeypatch):
    """On a GPU, a checkpoint may be the first to read the loss."""

    class NanLoss(Callback):
        order = 10

        def before_fit(self):
            self.learn.recorder.every = 20

        def after_loss(self):
            if self.learn.iter >= 2:
                self.learn.loss_grad = self.learn.loss = self.learn.loss * float("nan")

    def sum_losses_and_save(self):
        self.loss_sum = self.loss_sum + self.learn.loss.detach()
        if self.learn.iter == 4:
            assert self.learn.recorder.pending
            self.learn.checkpoint.save()

    monkeypatch.setattr(HistoryCallback, "after_batch", sum_losses_and_save)
    run = create_run(TINY, tmp_path / "run")
    with pytest.raises(TrainingDivergedError, match="at step 3 of epoch 1"):
        train(prepare(TINY), run, cbs=[NanLoss()])
    assert not [*run.checkpoint.glob("save-*")]


def test_published_schedule_does_not_change_the_momentum():
    published = override(TINY, ["schedule.kind=published"])
    assert set(schedules(published, 6, 6)) == {"lr"}
    assert set(schedules(TINY, 6, 6)) == {"lr", "mom"}


@pytest.mark.slow
def test_run_without_a_finished_epoch_starts_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, tmp_path / "run", interrupt_in=1)
    assert not open_run(tmp_path / "run").has_state
    fit(TINY, tmp_path / "run", resume=True)
    fit(TINY, tmp_path / "uninterrupted")
    runs = [open_run(tmp_path / name) for name in ("run", "uninterrupted")]
    assert runs[0].weights.read_bytes() == runs[1].weights.read_bytes()


def test_missing_or_damaged_weights_are_rejected(run, tmp_path):
    model = prepare(run.recipe()).learn.model
    with pytest.raises(InputError, match="is missing"):
        load_weights(model, tmp_path / "none.safetensors")
    (tmp_path / "half.safetensors").write_bytes(run.weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(model, tmp_path / "half.safetensors")
    assert all(p.isfinite().all() for p in model.parameters())
