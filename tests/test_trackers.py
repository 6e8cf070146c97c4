"""MLflow and Trackio logs are read back with each package's own reader."""

import math

import pytest
from logs import logged_fit, read_csv
from mlflow.tracking import MlflowClient
from short_runs import STEPS, TINY

from mixmo_fastai.config.load import override
from mixmo_fastai.loggers.callback import LoggingCallback
from mixmo_fastai.loggers.mlflow_ import MlflowTracker
from mixmo_fastai.loggers.tracker import Step, TrackedRun
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import TrainingDivergedError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:The ``noload`` loader strategy:DeprecationWarning"
    ),  # mlflow
]

NAMES = ("csv", "mlflow", "trackio")
PICTURES = {"first-batch", "loss", "validation-accuracy", "reliability", "confusion"}


@pytest.fixture(autouse=True, scope="module")
def own_settings():
    """Hide the user's settings; the folder of Trackio is set in conftest.py."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


def read_mlflow(uri, name="run", experiment="mixmo"):
    """Return metrics as (step, value) pairs by name, settings, status, tags and pictures."""
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    (run,) = [each for each in found if each.info.run_name == name]
    metrics = {
        key: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    pictures = {
        each.path.split("/")[1] for each in client.list_artifacts(run.info.run_id, "pictures")
    }
    return metrics, run.data.params, run.info.status, run.data.tags, pictures


def read_trackio(name, project="mixmo"):
    """Return metrics as (step, value) pairs by name, settings, and the names of pictures."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [each for each in trackio.Api().runs(project) if each.name == name]
    metrics, pictures = {}, set()
    for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
        for key, value in row.items():
            if key.startswith("pictures/"):
                assert value["_type"] == "trackio.image"
                pictures.add(key.partition("/")[2])
            elif key not in ("step", "timestamp"):
                metrics.setdefault(key, []).append((row["step"], value))
    return metrics, run.config, pictures


def local(run):
    return f"sqlite:///{run.logs / 'mlflow.db'}"


def check_metrics(run, metrics):
    """Compare logged metrics with those of the run's own files."""
    steps = read_csv(run)
    assert [step for step, *_ in steps] == [*range(3 * STEPS)]
    for index, name in enumerate(("loss", "lr", "momentum"), start=1):
        assert metrics[f"train/{name}"] == [
            (row[0], pytest.approx(row[index], rel=1e-5)) for row in steps
        ]
    for name in ("train_loss", "accuracy", "seconds"):
        values = [float(row[name]) for row in run.history()]
        expected = [((i + 1) * STEPS, pytest.approx(v, rel=1e-5)) for i, v in enumerate(values)]
        assert metrics[f"epoch/{name}"] == expected
    final = run.metrics()["test"]
    assert metrics["final/test/nll"] == [(3 * STEPS, pytest.approx(final["nll"]))]
    assert metrics["final/test/member_accuracy/2"] == [(3 * STEPS, final["member_accuracy"][1])]


@pytest.mark.parametrize("stop_at", [None, (0, 4), (1, 1), (2, STEPS)], ids=str)
def test_resumed_and_uninterrupted_runs_are_logged_once(tmp_path, stop_at, capsys):
    name = "-".join(map(str, ["run", *(stop_at or ())]))
    run = create_run(TINY, tmp_path / name)
    lines = logged_fit(run, NAMES, stop_at=stop_at)
    if stop_at is not None:
        assert read_mlflow(local(run), name)[2] == "KILLED"
        lines = logged_fit(run, NAMES, resume=True)
    assert any(line.endswith(f"mlflow ui --backend-store-uri {local(run)}") for line in lines)
    assert f"trackio: run {name}; show with: trackio show --project mixmo" in lines
    assert capsys.readouterr().out == ""
    metrics, params, status, tags, pictures = read_mlflow(local(run), name)
    check_metrics(run, metrics)
    assert (status, tags["exit_code"]) == ("FINISHED", "0")
    assert pictures == {f"{each}.png" for each in PICTURES}
    assert (params["method"], params["train.batch_size"]) == ("Cut-MixMo", "32")
    assert not (tmp_path / "mlruns").exists()
    metrics, config, pictures = read_trackio(name)
    check_metrics(run, metrics)
    assert pictures == PICTURES
    assert (config["method"], config["train.batch_size"]) == ("Cut-MixMo", 32)


def test_failed_training_is_marked_and_non_finite_losses_are_kept(tmp_path):
    run = create_run(override(TINY, ["optimizer.lr=1e30"]), tmp_path / "diverged")
    with pytest.raises(TrainingDivergedError):
        logged_fit(run, NAMES)
    metrics, _, status, _, _ = read_mlflow(local(run), "diverged")
    assert status == "FAILED"
    assert [step for step, _ in metrics["train/lr"]] == [0, 1]
    assert not math.isfinite(metrics["train/loss"][1][1]) or metrics["train/loss"][1][1] > 1e300
    assert len(read_trackio("diverged")[0]["train/lr"]) == 2


def test_names_of_other_folders_are_not_continued(tmp_path):
    short = override(TINY, ["train.epochs=1"])
    for folder in ("a", "b"):
        run = create_run(short, tmp_path / folder / "twin")
        logged_fit(run, ("trackio",))
    for name in ("twin", "twin-2"):
        assert len(read_trackio(name)[0]["train/loss"]) == STEPS


def test_networks_of_a_deep_ensemble_are_grouped(tmp_path):
    run = create_run(override(TINY, ["model.num_nets=2", "train.epochs=1"]), tmp_path / "pair")
    train_run(prepare(run.recipe()), run, cbs=[LoggingCallback(NAMES, lambda line: None)])
    for net in run.networks():
        name = f"pair/{net.path.name}"
        metrics, _, _, tags, _ = read_mlflow(local(net), name)
        assert tags["group"] == "pair"
        assert len(metrics["train/loss"]) == STEPS
        assert read_trackio(name)[1]["_Group"] == "pair"
    assert read_mlflow(local(run), "pair")[0]["final/test/nll"] == [
        (STEPS, pytest.approx(run.metrics()["test"]["nll"]))
    ]


class TestMlflowServer:
    @pytest.fixture
    def tracked(self, tmp_path):
        folder = tmp_path / "logs"
        folder.mkdir()
        settings = {f"setting.{index}": "x" * 900 for index in range(150)}
        return TrackedRun(folder, "one", None, settings, 0, lambda line: None)

    def test_variables_choose_server_and_experiment(self, tracked, tmp_path, monkeypatch):
        uri = f"sqlite:///{tmp_path / 'server.db'}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "flowers")
        monkeypatch.chdir(tmp_path)
        tracker = MlflowTracker(tracked)
        tracker.log_steps([Step(i, 1, 1.5, 0.1, 0.9) for i in range(700)])  # several requests
        tracker.close(130)
        assert not (tracked.folder / "mlflow.db").exists()
        metrics, params, status, tags, _ = read_mlflow(uri, "one", "flowers")
        assert metrics["train/lr"] == [(i, 0.1) for i in range(700)]
        assert len(params) == 150
        assert (status, tags["exit_code"]) == ("KILLED", "130")

    def test_run_that_the_server_does_not_know_is_started_again(self, tracked, tmp_path):
        tracker = MlflowTracker(tracked)
        tracker.log_metrics("epoch", 5, {"accuracy": 0.5})
        tracker.close(0)
        first = tracker.run_id
        path = tracked.folder / "mlflow.json"
        path.write_text(path.read_text().replace(first, "0" * 32))
        tracker = MlflowTracker(tracked)
        assert tracker.run_id not in (first, "0" * 32)
        tracker.log_metrics("epoch", 5, {"accuracy": 0.5})
        tracker.close(0)
        for run_id in (first, tracker.run_id):
            (value,) = tracker.client.get_metric_history(run_id, "epoch/accuracy")
            assert (value.step, value.value) == (5, 0.5)
