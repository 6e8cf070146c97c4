"""Training in several processes equals training in one process."""

import itertools
import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from commands import SLOW_STEPS
from launches import (
    FIT,
    SHORT,
    assert_close,
    output_of,
    start_processes,
    train_alone,
    train_by_two,
    wait_for_all,
)
from short_runs import assert_same
from synthetic import mixmo_dls

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.mixing import MASK_KINDS
from mixmo_fastai.mixing.pairing import num_copies
from mixmo_fastai.models import create_model
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.processes import Processes

pytestmark = pytest.mark.slow

__all__ = ["start_processes", "train_alone", "train_by_two"]  # fixtures

OPTIONS = [
    [],
    ["--members", "3", "--mix", "patchup"],
    ["--members", "1", "--mix", "sum", "--repeat", "1"],
    ["--mix", "channel", "--set", "mix.input_repetition=0.5", "--set", "mix.early_repetition=1"],
    ["--set", "train.ema_decay=0.9", "--set", "train.select=best", "--repeat", "2"],
    ["--set", "data.loader=streaming", "--set", "data.num_workers=1"],
    ["--set", "schedule.kind=fine-tune", "--set", "schedule.frozen_share=0.5"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_two_processes_train_the_same_network_as_one(train_by_two, train_alone, options):
    run, _ = train_by_two(*SHORT, *options)
    assert_close(run, train_alone(*SHORT, *options))


def test_four_processes_train_the_same_network_as_one(start_processes, train_alone, tmp_path):
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *SHORT, count=4))
    assert_close(open_run(run), train_alone(*SHORT))


def test_ghost_batches_equal_those_of_one_process(start_processes, train_alone, tmp_path):
    """Training is equal, but each process updates its own running statistics."""
    ghosts = [*SHORT, "--set", "model.ghost_batch_size=16"]
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *ghosts))
    losses = [row["train_loss"] for row in open_run(run).history()]
    expected = [row["train_loss"] for row in train_alone(*ghosts).history()]
    assert [*map(float, losses)] == pytest.approx([*map(float, expected)], rel=1e-4)


def test_deep_ensemble_trains_in_several_processes(start_processes, train_alone, tmp_path):
    run, nets = tmp_path / "run", [*SHORT, "--set", "model.num_nets=2"]
    wait_for_all(start_processes(*FIT, run, *nets))
    for name in ("net-1", "net-2"):
        assert_close(open_run(run / name), open_run(train_alone(*nets).path / name))


def test_msda_trains_in_several_processes(start_processes, tmp_path):
    """Partners are images of the same process, so the run differs from that of one process."""
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *SHORT, "--msda", "cutmix"))
    assert len(open_run(run).history()) == 2


def test_only_rank_0_prints_and_writes(train_by_two, train_alone):
    trained, (first, second) = train_by_two(*SHORT)
    run = trained.path
    assert re.search("^Device +cpu in 2 processes", first.printed, re.MULTILINE)
    assert "Test accuracy" in first.printed
    assert second.printed == ""
    files = {path.name for path in run.iterdir()}
    assert files == {path.name for path in train_alone(*SHORT).path.iterdir()}
    assert (run / "log.txt").read_text().count("Run folder:") == 1
    assert "in 2 processes" in json.loads((run / "environment.json").read_text())["device"]


def test_only_rank_0_writes_logs(start_processes, train_alone, tmp_path):
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *SHORT, "--logger", "csv"))
    lines = (run / "logs" / "steps.csv").read_text().splitlines()
    steps = len(lines) - 1
    assert [line.partition(",")[0] for line in lines[1:]] == [*map(str, range(steps))]
    assert steps * 32 == int(open_run(run).history()[-1]["images_seen"])
    assert (run / "logs" / "first-batch.png").exists()
    assert_close(open_run(run), train_alone(*SHORT))


def test_metrics_are_computed_from_all_images(start_processes, tmp_path):
    """Validation metrics of an epoch equal those of its weights in one process."""
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, "--batch-size", "24", "--limit", "60", count=3))
    row, metrics = open_run(run).history()[-1], open_run(run).metrics()
    assert float(row["accuracy"]) == pytest.approx(metrics["valid"]["accuracy"], abs=1e-6)
    assert float(row["valid_loss"]) == pytest.approx(metrics["valid"]["nll"], abs=1e-5)
    members = metrics["valid"]["member_accuracy"]
    assert float(row["member_accuracy"]) == pytest.approx(sum(members) / 2, abs=1e-6)


class EpochOfProcess:
    """The batches that one of several processes trains on in one epoch."""

    def __init__(self, monkeypatch, rank, count, kind):
        monkeypatch.setattr(
            "mixmo_fastai.callbacks.mixmo.process_group", lambda: Processes(rank, count)
        )
        monkeypatch.setattr("mixmo_fastai.callbacks.draws.rank_distrib", lambda: rank)
        self.loader = mixmo_dls().train
        # Each image has its own label, so that images can be identified.
        self.loader.labels = torch.arange(len(self.loader.labels))
        self.callback = MixMoCallback(kind, mix_prob=1.0, seed=3, batch_repetitions=4)
        model = create_model("wrn10_1", 3, 2)
        self.learn = SimpleNamespace(model=model, epoch=0, iter=0, pct_train=0.0, dl=self.loader)
        self.callback.learn = self.learn

    def steps(self):
        self.callback.before_train()
        for step, (x, y) in enumerate(self.learn.dl):
            self.learn.iter, self.learn.xb, self.learn.yb = step, (x,), (y,)
            self.callback.before_batch()
            yield *self.learn.xb, *self.learn.yb


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_batches_are_split_without_missing_or_repeated_images(monkeypatch, kind, count):
    uninterrupted = [*EpochOfProcess(monkeypatch, 0, 1, kind).steps()]
    parts_of_ranks = [
        [*EpochOfProcess(monkeypatch, rank, count, kind).steps()] for rank in range(count)
    ]
    for step, parts in zip(uninterrupted, zip(*parts_of_ranks, strict=True), strict=True):
        assert len({len(part[0]) for part in parts}) == 1
        for expected, actual in zip(step, zip(*parts, strict=True), strict=True):
            assert torch.equal(expected, torch.cat(actual))
    images = torch.cat([targets for *_, targets, _ in itertools.chain(*parts_of_ranks)])
    times = images.flatten().bincount().tolist()
    num_whole = len(uninterrupted) * 12  # the remaining images do not fill a batch
    assert sorted(times, reverse=True)[:num_whole] == [num_copies(2, 4)] * num_whole
    assert not any(sorted(times, reverse=True)[num_whole:])


def test_masks_differ_between_processes(monkeypatch):
    parts_of_ranks = [
        [*EpochOfProcess(monkeypatch, rank, 2, "cutmix").steps()] for rank in range(2)
    ]
    assert all(not torch.equal(a[1], b[1]) for a, b in zip(*parts_of_ranks, strict=True))


@pytest.mark.parametrize("to", [[0], [1], [0, 1]], ids=str)
def test_processes_stop_at_the_same_step_and_resume(start_processes, train_by_two, tmp_path, to):
    uninterrupted, run = train_by_two()[0], tmp_path / "run"
    commands = start_processes(*FIT, run, prelude=SLOW_STEPS)
    commands[0].wait_until_printed("1/2 ")
    for rank in to:
        commands[rank].signal(signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143], output_of(commands)
    assert CheckpointStore(run / "checkpoint").newest() is not None
    wait_for_all(start_processes("fit", "--resume", run))
    assert_same(uninterrupted, open_run(run))


def test_run_of_two_processes_resumes_in_one(start_processes, mixmo, train_alone, tmp_path):
    run = tmp_path / "run"
    commands = start_processes(*FIT, run, prelude=SLOW_STEPS)
    commands[0].wait_until_printed("1/2 ")
    commands[1].signal(signal.SIGINT)
    assert [command.wait() for command in commands] == [130, 130]
    command = mixmo("fit", "--resume", run)
    assert command.wait() == 0
    assert (
        "Trained so far with processes: 2, now 1: results agree up to rounding" in command.printed
    )
    assert_close(open_run(run), train_alone())


def test_time_for_saving_is_limited_in_several_processes(start_processes, tmp_path):
    """The process that writes decides, since only it measures the duration of a save."""
    slow = """
import os, time
from mixmo_fastai.runs import files
class Disk:
    def __getattr__(self, name):
        own = getattr(os, name)
        return (lambda *args: (time.sleep(0.2), own(*args))[1]) if name == "fsync" else own
files.os = Disk()
"""
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *SHORT, "--epochs", "4", prelude=slow))
    newest = CheckpointStore(run / "checkpoint").newest()
    assert newest.path.name == "save-000002"  # the first and the last save


def test_precision_is_that_of_the_recipe_not_of_the_launcher(
    start_processes, train_alone, tmp_path
):
    run, set_precision = (
        tmp_path / "run",
        "import os; os.environ['ACCELERATE_MIXED_PRECISION'] = 'bf16'",
    )
    wait_for_all(start_processes(*FIT, run, *SHORT, prelude=set_precision))
    assert_close(open_run(run), train_alone(*SHORT), rtol=1e-4)


def test_fewer_validation_images_than_processes(start_processes, tmp_path):
    run = tmp_path / "run"
    few = [*SHORT, "--valid-split", "0.002", "--set", "model.ghost_batch_size=4"]
    wait_for_all(start_processes(*FIT, run, *few, count=4))
    assert len(open_run(run).history()) == 2
