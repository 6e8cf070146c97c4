"""Train with loggers, and read the logs back from their files."""

import csv
import json
import struct
import time

import pytest
import wandb
from short_runs import Watch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from wandb.proto import wandb_internal_pb2

from mixmo_fastai.loggers.callback import LoggingCallback
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

ALL = ("csv", "tensorboard", "wandb")


@pytest.fixture(autouse=True, scope="module")
def no_wandb_login(tmp_path_factory):
    """Hide logins and settings of wandb from the tests, and stop its processes afterwards."""
    home = tmp_path_factory.mktemp("home")
    (home / "netrc").touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        wandb.teardown()  # it may have read the environment in earlier tests
        yield
        wandb.teardown()


def logged_fit(run, names=ALL, stop_at=None, *, resume=False, cbs=(), validating=False):
    """Train with loggers to the end or up to `stop_at`, and return the printed lines."""
    if resume:
        time.sleep(1 - time.time() % 1)  # wandb names its folders by the second of their creation
    lines, stop = [], StopRequest()
    watch, logging = (
        Watch(stop, stop_at, validating=validating),
        LoggingCallback(names, lines.append),
    )
    try:
        cbs = [watch, logging, *cbs]
        train(prepare(run.recipe()), run, cbs=cbs, resume=resume, stop=stop, say=lines.append)
    except InterruptedBySignal:
        assert stop_at is not None
    return lines


def read_csv(run):
    with (run.logs / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), *(float(row[name]) for name in ("loss", "lr", "momentum")))
        for row in rows
    ]


def read_tensorboard(run):
    """Return scalars by tag as (step, value) pairs, images by name, and hyperparameters."""
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
    """Return the records of wandb's files in order, after its process has finished writing."""
    paths = sorted((run.logs / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 10
    for path in paths:
        while not any(r.HasField("exit") for r in records_of(path)):
            assert time.monotonic() < deadline, f"{path} is incomplete"
            time.sleep(0.02)
    return [record for path in paths for record in records_of(path)]


def records_of(path):
    """Read protobuf records from a log in LevelDB's format."""
    records, data, at, record, block = [], path.read_bytes(), 7, b"", 2**15
    assert data.startswith(b":W&B") or not data
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4) and at <= len(data):  # a complete record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records


def read_wandb(run):
    """Return the history as (step, value) pairs by key, run ids, settings and exit codes."""
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
    """Return step, loss, learning rate and momentum of all steps, for each logger."""
    scalars, rows = read_tensorboard(run)[0], read_wandb(run)[0]
    by_logger = [read_csv(run)]
    for values in (scalars, rows):
        loss, lr, momentum = (values[f"train/{name}"] for name in ("loss", "lr", "momentum"))
        pairs = zip(loss, lr, momentum, strict=True)
        by_logger.append([(step, x, rate[1], mom[1]) for (step, x), rate, mom in pairs])
    return by_logger
