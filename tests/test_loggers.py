"""What loggers leave is read back: from CSV, TensorBoard's event files, wandb's own log."""

import csv
import gc
import io
import json
import shutil
import signal
import struct
import time
import weakref
from pathlib import Path

import pytest
import torch
import wandb
from fastai.callback.core import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from test_resuming import STEPS, TINY, Watch, assert_same, fit
from test_signals import FIT, SLOW_STEPS
from wandb.proto import wandb_internal_pb2

from mixmo_fastai import loggers
from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.loggers import LOGGERS, parse_loggers
from mixmo_fastai.loggers import callback as callback_module
from mixmo_fastai.loggers import wandb_ as wandb_module
from mixmo_fastai.loggers.callback import LoggingCallback
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.recording import CheckpointCallback
from mixmo_fastai.training.train import TrainingDivergedError, train

pytestmark = pytest.mark.slow

ALL = ("csv", "tensorboard", "wandb")
KEY = "0123456789abcdef" * 5
PICTURES = {"first-batch", "loss", "validation-accuracy", "reliability", "confusion"}


@pytest.fixture(autouse=True, scope="module")
def without_a_login(tmp_path_factory):
    """Nobody's login, network or settings; afterwards none of wandb's processes."""
    home = tmp_path_factory.mktemp("home")
    (home / "netrc").touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        wandb.teardown()  # other tests of this process may have let it read the environment
        yield
        wandb.teardown()


def logged_fit(run, names=ALL, place=None, *, resume=False, cbs=(), validating=False):
    """Train with loggers until the end, or until a place; give what was said."""
    if resume:
        time.sleep(1 - time.time() % 1)  # wandb names folders by the second in which they begin
    said, stop = [], StopRequest()
    watch, logging = Watch(stop, place, validating=validating), LoggingCallback(names, said.append)
    try:
        cbs = [watch, logging, *cbs]
        train(prepare(run.recipe()), run, cbs=cbs, resume=resume, stop=stop, say=said.append)
    except InterruptedBySignal:
        assert place is not None
    return said


def in_csv(run):
    with (run.logs / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), *(float(row[name]) for name in ("loss", "lr", "momentum")))
        for row in rows
    ]


def in_tensorboard(run):
    """Scalars by tag, as steps and values; pictures by name; settings."""
    events = EventAccumulator(
        str(run.logs / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag.partition("/")[2]: events.Images(tag) for tag in tags["images"]}
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in settings.items()}
    return scalars, images, values


def wandb_records(run):
    """What wandb's files hold, in order; its process may write the last of it after a run's end."""
    paths = sorted((run.logs / "wandb").glob("offline-run-*/*.wandb"))
    until = time.monotonic() + 10
    for path in paths:
        while not any(r.HasField("exit") for r in records_of(path)):
            assert time.monotonic() < until, f"{path} has no end"
            time.sleep(0.02)
    return [record for path in paths for record in records_of(path)]


def records_of(path):
    """Read a log of LevelDB's format, of records in protobuf."""
    records, data, at, whole, block = [], path.read_bytes(), 7, b"", 2**15
    assert data.startswith(b":W&B") or not data
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4) and at <= len(data):  # the whole of a record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def in_wandb(run):
    """Rows of the history by the key that they have; ids, settings and exit codes of its runs."""
    rows, ids, settings, codes = {}, [], {}, []
    for record in wandb_records(run):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {tuple(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                rows.setdefault("/".join(name), []).append((row["step",], value))
        elif kind == "run" and record.run.run_id not in ids[-1:]:
            ids.append(record.run.run_id)
            settings = {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "exit":
            codes.append(record.exit.exit_code)
    return rows, ids, settings, codes


def all_steps(run):
    """Steps, loss, rate and momentum as each logger has them."""
    scalars, rows = in_tensorboard(run)[0], in_wandb(run)[0]
    found = [in_csv(run)]
    for values in (scalars, rows):
        loss, lr, momentum = (values[f"train/{name}"] for name in ("loss", "lr", "momentum"))
        pairs = zip(loss, lr, momentum, strict=True)
        found.append([(step, x, rate[1], mom[1]) for (step, x), rate, mom in pairs])
    return found


def numbers(figures, prefix="final"):
    if isinstance(figures, bool | str):
        return {}
    if isinstance(figures, int | float):
        return {prefix: figures}
    pairs = figures.items() if isinstance(figures, dict) else enumerate(figures, start=1)
    return {k: v for key, part in pairs for k, v in numbers(part, f"{prefix}/{key}").items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without loggers, and what each of its steps trained with."""
    run = create_run(TINY, tmp_path_factory.mktemp("plain") / "run")
    return run, fit(run)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The same run with all loggers, and what was said."""
    run = create_run(TINY, tmp_path_factory.mktemp("logged") / "run")
    return run, logged_fit(run)


class TestWhatArrives:
    def test_a_logged_run_is_the_run_without(self, logged, plain):
        assert_same(plain[0], logged[0])

    def test_every_step_once_and_what_it_trained_with(self, logged, plain):
        hypers = [(lr, momentum) for _, lr, momentum, _ in plain[1]]
        for found in all_steps(logged[0]):
            assert [step for step, *_ in found] == [*range(3 * STEPS)]
            for (*_, lr, momentum), expected in zip(found, hypers, strict=True):
                assert (lr, momentum) == pytest.approx(expected, rel=1e-5)

    def test_losses_average_to_those_of_the_history(self, logged):
        for found in all_steps(logged[0]):
            losses = torch.tensor([loss for _, loss, *_ in found], dtype=torch.float64)
            means = losses.view(3, STEPS).mean(1).tolist()
            rows = [float(row["train_loss"]) for row in logged[0].history()]
            assert means == pytest.approx(rows, rel=1e-5)

    def test_epochs_are_the_rows_of_the_history(self, logged):
        rows = logged[0].history()
        for found in (in_tensorboard(logged[0])[0], in_wandb(logged[0])[0]):
            for name in rows[0].keys() - {"epoch"}:
                steps, values = zip(*found[f"epoch/{name}"], strict=True)
                assert steps == (STEPS, 2 * STEPS, 3 * STEPS)
                assert values == pytest.approx([float(row[name]) for row in rows], rel=1e-6)

    def test_final_figures_are_those_of_the_metrics(self, logged):
        expected = numbers(logged[0].metrics())
        assert {"final/test/accuracy", "final/test/member_accuracy/2"} < expected.keys()
        for found in (in_tensorboard(logged[0])[0], in_wandb(logged[0])[0]):
            final = {name: rows for name, rows in found.items() if name.startswith("final/")}
            assert final.keys() == expected.keys()
            for name, value in expected.items():
                assert final[name] == [(3 * STEPS, pytest.approx(value, rel=1e-6))]

    def test_settings_are_the_recipe_s(self, logged):
        assert logged[0].recipe().mix.kind == "cutmix"
        for found in (in_tensorboard(logged[0])[2], in_wandb(logged[0])[2]):
            assert found["method"] == "Cut-MixMo"
            assert found["model.arch"] == "wrn10_1"
            assert found["train.batch_size"] == 32
            assert found["optimizer.lr"] == logged[0].recipe().lr

    def test_pictures_are_the_same_everywhere(self, logged):
        run = logged[0]
        written = {p.stem: Image.open(p).convert("RGB") for p in run.logs.glob("*.png")}
        assert written.keys() == PICTURES
        _, images, _ = in_tensorboard(run)
        assert images.keys() == PICTURES
        media = list((run.logs / "wandb").glob("offline-run-*/files/media/images/pictures/*.png"))
        assert {path.name.partition("_")[0] for path in media} == PICTURES
        for name, picture in written.items():
            assert len(picture.getcolors(2**20)) > 20, "blank"
            assert [event.step for event in images[name]] == [0 if "batch" in name else 18]
            events = Image.open(io.BytesIO(images[name][0].encoded_image_string))
            (path,) = [path for path in media if path.name.startswith(f"{name}_")]
            assert picture.tobytes() == events.convert("RGB").tobytes()
            assert picture.tobytes() == Image.open(path).convert("RGB").tobytes()

    def test_wandb_is_told_who_it_is_and_how_it_ended(self, logged):
        run, said = logged
        _, ids, _, codes = in_wandb(run)
        assert len(ids) == 1
        assert codes == [0]
        first = next(r.run for r in wandb_records(run) if r.WhichOneof("record_type") == "run")
        assert (first.project, first.display_name) == ("mixmo", "run")
        assert len(said) == 1
        assert "not logged in" in said[0]
        assert Path(said[0].rpartition("wandb sync ")[2]).is_dir()


def test_the_first_batch_is_the_one_that_was_trained_on(tmp_path, monkeypatch):
    seen, drawn = [], []

    class Spy(Callback):
        order = 90

        def before_batch(self):
            if self.learn.training and not seen:
                seen.extend([*self.learn.xb, self.learn.yb[0]])

    own = callback_module.plot_first_batch
    monkeypatch.setattr(
        callback_module, "plot_first_batch", lambda *args: (drawn.append(args[0]), own(*args))[1]
    )
    run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
    logged_fit(run, ("csv",), cbs=[Spy()])
    (preview,) = drawn
    inputs, masks, targets = seen
    torch.testing.assert_close(preview.masks, masks[:6].mean(dim=2))
    pixels = preview.inputs.flatten(1)
    both = torch.stack([pixels.flatten(), inputs[:6].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9999  # but for mean and deviation
    assert preview.labels == [[str(int(label)) for label in row] for row in targets[:6]]


STOPS = [((0, 4), False), ((0, STEPS), False), ((1, 1), True), ((2, STEPS), False)]


@pytest.mark.parametrize(("place", "validating"), STOPS, ids=str)
def test_a_resumed_run_is_logged_as_if_it_was_not(logged, tmp_path, place, validating):
    run = create_run(TINY, tmp_path / "run")
    logged_fit(run, place=place, validating=validating)
    epoch, step = (place[0] + 1, 0) if validating else place
    stopped_after = epoch * STEPS + step if not validating else (place[0] + 1) * STEPS
    assert [step for step, *_ in in_csv(run)] == [*range(stopped_after)]
    logged_fit(run, resume=True)
    check_same_logs(logged[0], run)
    assert set(in_wandb(run)[3]) == {130, 0}


def check_same_logs(one, other):
    """Check that all was logged once, and in all of wandb's files under one id."""
    for ours, theirs in zip(all_steps(one), all_steps(other), strict=True):
        assert theirs == ours
    for read in (in_tensorboard, in_wandb):
        ours, theirs = read(one)[0], read(other)[0]
        names = [n for n in ours if n.startswith(("train/", "epoch/", "final/"))]
        assert names
        for name in names:
            if not name.endswith(("seconds", "per_second")):
                assert theirs[name] == ours[name], name
    assert len(set(in_wandb(other)[1])) == 1
    assert in_tensorboard(other)[1].keys() == PICTURES


def test_what_was_logged_after_the_checkpoint_is_void(logged, tmp_path):
    """As after a power cut: the newest checkpoint is older than what is logged."""
    run = create_run(TINY, tmp_path / "run")
    logged_fit(run, place=(2, 3))
    shutil.rmtree(CheckpointStore(run.checkpoint).newest().path)
    with (run.logs / "steps.csv").open("a") as file:
        file.write("15,3,1.2")
    logged_fit(run, resume=True)
    check_same_logs(logged[0], run)


def test_a_finished_run_that_is_resumed_logs_nothing_twice(logged, tmp_path):
    shutil.copytree(logged[0].path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    logged_fit(run, resume=True)
    check_same_logs(logged[0], run)


def test_a_checkpoint_holds_no_step_that_is_not_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointCallback, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(CheckpointCallback, "MAX_TIME_FRACTION", 1e9)
    lengths, run = [], create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")

    class Count(Callback):
        order, run_valid = 66, False

        def after_batch(self):
            lengths.append(len(in_csv(run)))

    logged_fit(run, ("csv",), cbs=[Count()])
    assert lengths == [*range(1, STEPS + 1)]


def test_a_loss_that_is_not_finite_is_logged(tmp_path):
    run = create_run(override(TINY, ["optimizer.lr=1e30"]), tmp_path / "run")
    with pytest.raises(TrainingDivergedError, match="at step 2 of epoch 1"):
        logged_fit(run)
    steps = in_csv(run)
    assert [step for step, *_ in steps] == [0, 1]
    assert [torch.tensor(loss).isfinite().item() for _, loss, *_ in steps] == [True, False]
    assert len(in_tensorboard(run)[0]["train/lr"]) == 2
    rows, _, _, codes = in_wandb(run)
    assert len(rows["train/lr"]) == 2
    assert codes == [1]


class Broken:
    """A tracker that fails at one of the things that it is told."""

    where = ""

    def __init__(self, subject):
        self.fail("__init__")

    def fail(self, name):
        if name == self.where:
            raise OSError("no\nroute to host")

    def __getattr__(self, name):
        return lambda *args: self.fail(name)


@pytest.mark.parametrize("where", ["__init__", "log_steps", "log_metrics", "log_images", "close"])
def test_a_logger_that_fails_ends_no_training(plain, tmp_path, monkeypatch, where):
    class Logger:
        def load(self):
            return type("Here", (Broken,), {"where": where})

    monkeypatch.setitem(LOGGERS, "broken", Logger())
    run = create_run(TINY, tmp_path / "run")
    said = logged_fit(run, ("broken", "csv"))
    assert said == ["--logger broken failed and is now disabled: OSError: no route to host"]
    assert_same(plain[0], run)
    assert len(in_csv(run)) == 3 * STEPS


def test_a_picture_that_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise MemoryError("full")

    monkeypatch.setattr(callback_module, "plot_results", refuse)
    monkeypatch.setattr(callback_module, "preview_current_batch", refuse)
    run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
    said = logged_fit(run, ("csv",))
    assert len(said) == 2
    assert all("could not be logged: MemoryError: full" in line for line in said)
    assert run.is_finished


def test_networks_of_a_deep_ensemble_are_logged_in_their_folders(tmp_path):
    changes = ["model.num_nets=2", "train.epochs=1"]
    run = create_run(override(TINY, changes), tmp_path / "both")
    logging = LoggingCallback(ALL, lambda line: None)
    train_run(prepare(run.recipe()), run, cbs=[logging])
    for net in run.networks():
        assert len(in_csv(net)) == STEPS
        assert in_tensorboard(net)[0]["final/test/nll"][0][1] == pytest.approx(
            net.metrics()["test"]["nll"], rel=1e-6
        )
        record = next(r.run for r in wandb_records(net) if r.WhichOneof("record_type") == "run")
        assert (record.display_name, record.run_group) == (f"both/{net.path.name}", "both")
    assert not (run.logs / "steps.csv").exists()
    scalars, images, _ = in_tensorboard(run)
    assert scalars["final/test/nll"] == [
        (STEPS, pytest.approx(run.metrics()["test"]["nll"], rel=1e-6))
    ]
    assert images.keys() == PICTURES - {"first-batch"}


class TestRefusals:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("names", ["tensorbord", "csv,tensorbord", "csv, tensorbord,wandb"])
    def test_an_unknown_name(self, names, tmp_path, capsys):
        assert program(["fit", "cifar10", "--logger", names]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said == [
            "Error: Unknown logger 'tensorbord'. Did you mean 'tensorboard'?",
            "Allowed: csv, tensorboard, wandb.",
        ]
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("name", ["tensorboard", "wandb"])
    def test_a_package_that_is_missing(self, name, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(loggers, "find_spec", lambda package: None)
        assert program(["fit", "cifar10", "--logger", f"csv,{name}"]) == 2
        said = capsys.readouterr().err
        assert f"--logger {name} needs the package {name}" in said
        assert "pip install 'mixmo-fastai[loggers]'" in said
        assert not [*tmp_path.iterdir()]

    def test_before_a_run_is_resumed(self, plain, capsys):
        assert program(["fit", "--resume", str(plain[0].path), "--logger", "csvs"]) == 2
        assert "Did you mean 'csv'" in capsys.readouterr().err
        assert not plain[0].logs.exists()

    def test_names_may_be_said_twice_and_apart(self):
        assert parse_loggers("wandb, csv,wandb") == ("wandb", "csv")
        with pytest.raises(InputError, match="Unknown logger ''"):
            parse_loggers("csv,")


class TestLogin:
    """Nobody is asked to log in."""

    @pytest.mark.parametrize(
        ("variables", "netrc", "expected"),
        [
            ({}, "", ("offline", "not logged in")),
            ({"WANDB_MODE": "online"}, "", ("offline", "not logged in")),
            ({"WANDB_MODE": "offline"}, "", ("offline", "")),
            ({"WANDB_MODE": "disabled"}, "", ("disabled", "")),
            ({"WANDB_API_KEY": KEY}, "", ("online", "")),
            ({"WANDB_API_KEY": "?"}, "", ("offline", "AuthenticationError: ")),
            ({}, f"machine api.wandb.ai login user password {KEY}", ("online", "")),
            (
                {},
                f"machine elsewhere login user password {KEY}",
                ("offline", "not logged in"),
            ),
            ({}, "not a netrc", ("offline", "not logged in")),
        ],
    )
    def test_the_mode(self, tmp_path, monkeypatch, capfd, variables, netrc, expected):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "netrc").write_text(netrc)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        wandb.teardown()  # it has read the environment
        try:
            mode, reason = wandb_module._choose_mode()
            assert mode == expected[0]
            assert reason.startswith(expected[1])
            assert capfd.readouterr() == ("", "")
        finally:
            wandb.teardown()

    def test_without_a_connection_the_run_is_kept(self, tmp_path, monkeypatch):
        own = wandb.init

        def init(**settings):
            if settings["mode"] == "online":
                raise wandb.errors.CommError("Timed out\nin 90 s")
            return own(**settings)

        monkeypatch.setattr(wandb, "init", init)
        monkeypatch.setattr(wandb_module, "_choose_mode", lambda: ("online", ""))
        run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
        (said,) = logged_fit(run, ("wandb",))
        assert said.startswith("wandb: stored locally (CommError: Timed out); upload with")
        assert len(in_wandb(run)[0]["train/loss"]) == STEPS

    def test_a_run_that_is_disabled_is_not_remembered(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "disabled")
        wandb.teardown()
        run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
        try:
            assert logged_fit(run, ("wandb",)) == ["wandb: disabled."]
        finally:
            wandb.teardown()
        assert [*(run.logs / "wandb").iterdir()] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_the_command_interrupted_and_resumed(mixmo, tmp_path, number):
    run, more = tmp_path / "run", ["--logger", "csv,tensorboard,wandb"]
    command = mixmo(*FIT, run, *more, prelude=SLOW_STEPS)
    command.until_said("1/3 ")
    command.signal(number, group=True)
    assert command.wait() == 128 + number, command.said
    assert "Traceback" not in command.said
    assert command.said.splitlines()[-1].startswith("Interrupted. The state is saved")
    assert_nothing_is_left(command)
    run = open_run(run)
    state = json.loads((CheckpointStore(run.checkpoint).newest().path / "state.json").read_text())
    done = state["epoch"] * state["steps_per_epoch"] + state["step"]
    for found in all_steps(run):
        assert [step for step, *_ in found] == [*range(done)]
    assert in_wandb(run)[3] == [128 + number]
    command = mixmo("fit", "--resume", run.path, *more)
    assert command.wait() == 0, command.said
    for found in all_steps(run):
        assert [step for step, *_ in found] == [*range(3 * state["steps_per_epoch"])]
    assert in_wandb(run)[3] == [128 + number, 0]
    assert_nothing_is_left(command)


def assert_nothing_is_left(command):
    """Check that wandb's process, which has a session of its own, ends with its command."""
    until = time.monotonic() + 10
    while left := [*processes_for(command.pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert not command.others()


def processes_for(pid):
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--pid" in words and words[words.index(b"--pid") + 1] == str(pid).encode():
            yield words


def test_a_run_of_wandb_that_is_open_is_left_alone(tmp_path):
    with wandb.init(project="mine", dir=tmp_path, mode="offline") as mine:
        run = create_run(TINY, tmp_path / "run")
        logged_fit(run, ["wandb"])
        mine.log({"still": 1})
        assert in_wandb(run)[1] != [mine.id]
        assert wandb.run is mine


def test_a_network_does_not_outlive_its_training(tmp_path):
    logging = LoggingCallback(["csv"], print)
    training = prepare(TINY)
    with training.learn.no_bar():
        train(training, create_run(TINY, tmp_path / "run"), cbs=[logging])
    left = weakref.ref(training.learn.model)
    training.learn.remove_cbs(LoggingCallback)
    del training
    gc.collect()
    assert left() is None
