"""The logs are read back from CSV files, TensorBoard's event files and wandb's log files."""

import gc
import io
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from logs import (
    ALL,
    all_steps,
    logged_fit,
    no_wandb_login,
    read_csv,
    read_tensorboard,
    read_wandb,
    wandb_records,
)
from PIL import Image
from short_runs import STEPS, TINY, assert_same, fit

from mixmo_fastai import loggers
from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.loggers import LOGGERS, parse_loggers
from mixmo_fastai.loggers import callback as callback_module
from mixmo_fastai.loggers.callback import LoggingCallback
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.checkpointing import CheckpointCallback
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import TrainingDivergedError, train

pytestmark = pytest.mark.slow

__all__ = ["no_wandb_login"]  # fixtures

PLOT_NAMES = {"first-batch", "loss", "validation-accuracy", "reliability", "confusion"}


def flatten_numbers(metrics, prefix="final"):
    if metrics is None or isinstance(metrics, bool | str):
        return {}
    if isinstance(metrics, int | float):
        return {prefix: metrics}
    pairs = metrics.items() if isinstance(metrics, dict) else enumerate(metrics, start=1)
    return {
        k: v for key, part in pairs for k, v in flatten_numbers(part, f"{prefix}/{key}").items()
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a run without loggers, and the hyperparameters of its steps."""
    run = create_run(TINY, tmp_path_factory.mktemp("plain") / "run")
    return run, fit(run)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Return the same run with all loggers, and the printed lines."""
    run = create_run(TINY, tmp_path_factory.mktemp("logged") / "run")
    return run, logged_fit(run)


class TestLoggedValues:
    def test_loggers_do_not_change_the_run(self, logged, plain):
        assert_same(plain[0], logged[0])

    def test_each_step_is_logged_once_with_its_hyperparameters(self, logged, plain):
        hypers = [(lr, momentum) for _, lr, momentum, _ in plain[1]]
        for steps in all_steps(logged[0]):
            assert [step for step, *_ in steps] == [*range(3 * STEPS)]
            for (*_, lr, momentum), expected in zip(steps, hypers, strict=True):
                assert (lr, momentum) == pytest.approx(expected, rel=1e-5)

    def test_step_losses_average_to_the_history(self, logged):
        for steps in all_steps(logged[0]):
            losses = torch.tensor([loss for _, loss, *_ in steps], dtype=torch.float64)
            means = losses.view(3, STEPS).mean(1).tolist()
            rows = [float(row["train_loss"]) for row in logged[0].history()]
            assert means == pytest.approx(rows, rel=1e-5)

    def test_epoch_values_equal_the_history(self, logged):
        rows = logged[0].history()
        for values in (read_tensorboard(logged[0])[0], read_wandb(logged[0])[0]):
            for name in rows[0].keys() - {"epoch"}:
                steps, logged_values = zip(*values[f"epoch/{name}"], strict=True)
                assert steps == (STEPS, 2 * STEPS, 3 * STEPS)
                assert logged_values == pytest.approx([float(row[name]) for row in rows], rel=1e-6)

    def test_final_values_equal_the_metrics(self, logged):
        expected = flatten_numbers(logged[0].metrics())
        assert {"final/test/accuracy", "final/test/member_accuracy/2"} < expected.keys()
        for values in (read_tensorboard(logged[0])[0], read_wandb(logged[0])[0]):
            final = {name: rows for name, rows in values.items() if name.startswith("final/")}
            assert final.keys() == expected.keys()
            for name, value in expected.items():
                assert final[name] == [(3 * STEPS, pytest.approx(value, rel=1e-6))]

    def test_settings_equal_the_recipe(self, logged):
        assert logged[0].recipe().mix.kind == "cutmix"
        for values in (read_tensorboard(logged[0])[2], read_wandb(logged[0])[2]):
            assert values["method"] == "Cut-MixMo"
            assert values["model.arch"] == "wrn10_1"
            assert values["train.batch_size"] == 32
            assert values["optimizer.lr"] == logged[0].recipe().lr

    def test_plots_are_equal_in_all_loggers(self, logged):
        run = logged[0]
        written = {p.stem: Image.open(p).convert("RGB") for p in run.logs.glob("*.png")}
        assert written.keys() == PLOT_NAMES
        _, images, _ = read_tensorboard(run)
        assert images.keys() == PLOT_NAMES
        wandb_files = list(
            (run.logs / "wandb").glob("offline-run-*/files/media/images/pictures/*.png")
        )
        assert {path.name.partition("_")[0] for path in wandb_files} == PLOT_NAMES
        for name, plot in written.items():
            assert len(plot.getcolors(2**20)) > 20, "blank"
            assert [event.step for event in images[name]] == [0 if "batch" in name else 18]
            logged_image = Image.open(io.BytesIO(images[name][0].encoded_image_string))
            (path,) = [path for path in wandb_files if path.name.startswith(f"{name}_")]
            assert plot.tobytes() == logged_image.convert("RGB").tobytes()
            assert plot.tobytes() == Image.open(path).convert("RGB").tobytes()

    def test_wandb_knows_the_names_and_the_exit_code(self, logged):
        run, lines = logged
        _, ids, _, codes = read_wandb(run)
        assert len(ids) == 1
        assert codes == [0]
        first = next(r.run for r in wandb_records(run) if r.WhichOneof("record_type") == "run")
        assert (first.project, first.display_name) == ("mixmo", "run")
        assert len(lines) == 1
        assert "not logged in" in lines[0]
        assert Path(lines[0].rpartition("wandb sync ")[2]).is_dir()


def test_logged_first_batch_is_the_trained_batch(tmp_path, monkeypatch):
    first_batch, plotted = [], []

    class BatchRecorder(Callback):
        order = 90

        def before_batch(self):
            if self.learn.training and not first_batch:
                first_batch.extend([*self.learn.xb, self.learn.yb[0]])

    original = callback_module.plot_first_batch
    monkeypatch.setattr(
        callback_module,
        "plot_first_batch",
        lambda *args: (plotted.append(args[0]), original(*args))[1],
    )
    run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
    logged_fit(run, ("csv",), cbs=[BatchRecorder()])
    (preview,) = plotted
    inputs, masks, targets = first_batch
    torch.testing.assert_close(preview.masks, masks[:6].mean(dim=2))
    pixels = preview.inputs.flatten(1)
    both = torch.stack([pixels.flatten(), inputs[:6].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9999  # equal up to normalisation
    assert preview.labels == [[str(int(label)) for label in row] for row in targets[:6]]


STOPS = [((0, 4), False), ((0, STEPS), False), ((1, 1), True), ((2, STEPS), False)]


@pytest.mark.parametrize(("stop_at", "validating"), STOPS, ids=str)
def test_resumed_run_has_the_same_logs(logged, tmp_path, stop_at, validating):
    run = create_run(TINY, tmp_path / "run")
    logged_fit(run, stop_at=stop_at, validating=validating)
    epoch, step = (stop_at[0] + 1, 0) if validating else stop_at
    stopped_after = epoch * STEPS + step if not validating else (stop_at[0] + 1) * STEPS
    assert [step for step, *_ in read_csv(run)] == [*range(stopped_after)]
    logged_fit(run, resume=True)
    check_same_logs(logged[0], run)
    assert set(read_wandb(run)[3]) == {130, 0}


def check_same_logs(first, second):
    """Check that both runs logged the same values, once, and under one id in wandb's files."""
    for steps, other_steps in zip(all_steps(first), all_steps(second), strict=True):
        assert other_steps == steps
    for read in (read_tensorboard, read_wandb):
        values, other_values = read(first)[0], read(second)[0]
        names = [n for n in values if n.startswith(("train/", "epoch/", "final/"))]
        assert names
        for name in names:
            if not name.endswith(("seconds", "per_second")):
                assert other_values[name] == values[name], name
    assert len(set(read_wandb(second)[1])) == 1
    assert read_tensorboard(second)[1].keys() == PLOT_NAMES


def test_logs_after_the_last_checkpoint_are_discarded(logged, tmp_path):
    """After a power failure the newest checkpoint may be older than the logs."""
    run = create_run(TINY, tmp_path / "run")
    logged_fit(run, stop_at=(2, 3))
    shutil.rmtree(CheckpointStore(run.checkpoint).newest().path)
    with (run.logs / "steps.csv").open("a") as file:
        file.write("15,3,1.2")
    logged_fit(run, resume=True)
    check_same_logs(logged[0], run)


def test_resuming_a_finished_run_logs_no_duplicates(logged, tmp_path):
    shutil.copytree(logged[0].path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    logged_fit(run, resume=True)
    check_same_logs(logged[0], run)


def test_all_steps_of_a_checkpoint_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointCallback, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(CheckpointCallback, "MAX_TIME_FRACTION", 1e9)
    lengths, run = [], create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")

    class CountLoggedSteps(Callback):
        order, run_valid = 66, False

        def after_batch(self):
            lengths.append(len(read_csv(run)))

    logged_fit(run, ("csv",), cbs=[CountLoggedSteps()])
    assert lengths == [*range(1, STEPS + 1)]


def test_non_finite_loss_is_logged(tmp_path):
    run = create_run(override(TINY, ["optimizer.lr=1e30"]), tmp_path / "run")
    with pytest.raises(TrainingDivergedError, match="at step 2 of epoch 1"):
        logged_fit(run)
    steps = read_csv(run)
    assert [step for step, *_ in steps] == [0, 1]
    assert [torch.tensor(loss).isfinite().item() for _, loss, *_ in steps] == [True, False]
    assert len(read_tensorboard(run)[0]["train/lr"]) == 2
    rows, _, _, codes = read_wandb(run)
    assert len(rows["train/lr"]) == 2
    assert codes == [1]


class BrokenTracker:
    """A tracker that fails in one of its methods."""

    failing_method = ""

    def __init__(self, subject):
        self.fail("__init__")

    def fail(self, name):
        if name == self.failing_method:
            raise OSError("no\nroute to host")

    def __getattr__(self, name):
        return lambda *args: self.fail(name)


@pytest.mark.parametrize("method", ["__init__", "log_steps", "log_metrics", "log_images", "close"])
def test_training_continues_if_a_logger_fails(plain, tmp_path, monkeypatch, method):
    class Logger:
        def load(self):
            return type("Tracker", (BrokenTracker,), {"failing_method": method})

    monkeypatch.setitem(LOGGERS, "broken", Logger())
    run = create_run(TINY, tmp_path / "run")
    lines = logged_fit(run, ("broken", "csv"))
    assert lines == ["--logger broken failed and is now disabled: OSError: no route to host"]
    assert_same(plain[0], run)
    assert len(read_csv(run)) == 3 * STEPS


def test_failed_plots_are_reported(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise MemoryError("full")

    monkeypatch.setattr(callback_module, "plot_results", refuse)
    monkeypatch.setattr(callback_module, "preview_current_batch", refuse)
    run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
    lines = logged_fit(run, ("csv",))
    assert len(lines) == 2
    assert all("could not be logged: MemoryError: full" in line for line in lines)
    assert run.is_finished


def test_networks_of_a_deep_ensemble_have_their_own_logs(tmp_path):
    changes = ["model.num_nets=2", "train.epochs=1"]
    run = create_run(override(TINY, changes), tmp_path / "both")
    logging = LoggingCallback(ALL, lambda line: None)
    train_run(prepare(run.recipe()), run, cbs=[logging])
    for net in run.networks():
        assert len(read_csv(net)) == STEPS
        assert read_tensorboard(net)[0]["final/test/nll"][0][1] == pytest.approx(
            net.metrics()["test"]["nll"], rel=1e-6
        )
        record = next(r.run for r in wandb_records(net) if r.WhichOneof("record_type") == "run")
        assert (record.display_name, record.run_group) == (f"both/{net.path.name}", "both")
    assert not (run.logs / "steps.csv").exists()
    scalars, images, _ = read_tensorboard(run)
    assert scalars["final/test/nll"] == [
        (STEPS, pytest.approx(run.metrics()["test"]["nll"], rel=1e-6))
    ]
    assert images.keys() == PLOT_NAMES - {"first-batch"}


class TestInvalidLoggers:
    @pytest.fixture(autouse=True)
    def working_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("names", ["tensorbord", "csv,tensorbord", "csv, tensorbord,wandb"])
    def test_unknown_name(self, names, tmp_path, capsys):
        assert program(["fit", "cifar10", "--logger", names]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "Error: Unknown logger 'tensorbord'. Did you mean 'tensorboard'?",
            "Allowed: csv, tensorboard, wandb, mlflow, trackio.",
        ]
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
    def test_missing_package(self, name, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(loggers, "find_spec", lambda package: None)
        assert program(["fit", "cifar10", "--logger", f"csv,{name}"]) == 2
        message = capsys.readouterr().err
        assert f"--logger {name} needs the package {name}" in message
        assert "pip install 'mixmo-fastai[loggers]'" in message
        assert not [*tmp_path.iterdir()]

    def test_names_are_checked_before_resuming(self, plain, capsys):
        assert program(["fit", "--resume", str(plain[0].path), "--logger", "csvs"]) == 2
        assert "Did you mean 'csv'" in capsys.readouterr().err
        assert not plain[0].logs.exists()

    def test_repeated_names_and_spaces_are_allowed(self):
        assert parse_loggers("wandb, csv,wandb") == ("wandb", "csv")
        with pytest.raises(InputError, match="Unknown logger ''"):
            parse_loggers("csv,")


def test_network_is_freed_after_training(tmp_path):
    logging = LoggingCallback(["csv"], print)
    training = prepare(TINY)
    with training.learn.no_bar():
        train(training, create_run(TINY, tmp_path / "run"), cbs=[logging])
    reference = weakref.ref(training.learn.model)
    training.learn.remove_cbs(LoggingCallback)
    del training
    gc.collect()
    assert reference() is None
