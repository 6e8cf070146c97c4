"""Training in several processes equals training in one process."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import SLOW_STEPS, check_failed
from processes import TIMEOUT, uninterrupted_runs
from safetensors.torch import load_file
from short_runs import assert_same
from synthetic import mixmo_dls

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.mixing import MASK_KINDS
from mixmo_fastai.mixing.pairing import num_copies
from mixmo_fastai.models import create_model
from mixmo_fastai.models.synced_norm import SyncedBatchNorm2d, sync_batch_norm
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.processes import Processes, launched_processes

pytestmark = pytest.mark.slow

_FIT = (
    "fit --arch wrn10_1 --limit 64 --valid-split 0.05 --batch-size 32 --epochs 2 --device cpu "
    "--threads 1 --out"
)
FIT = _FIT.split()


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.count(20_000 + 2_000 * WORKER)


def free_port():
    """Return a port that no other test uses; a port chosen by the system might be in use by one."""
    for port in PORTS:
        with socket.socket() as own:
            if own.connect_ex(("127.0.0.1", port)):
                return port
    return None


@pytest.fixture
def start_processes(mixmo):
    """Return a function that starts a command in several processes, as a launcher does."""

    def start(*words, count=2, **how):
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [
            mixmo(*words, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}, **how)
            for rank in range(count)
        ]

    return start


@pytest.fixture(scope="module")
def train_alone(server, tmp_path_factory):
    """Return a function that trains in one process with arguments in addition to `FIT`."""
    return uninterrupted_runs(server, tmp_path_factory.mktemp("train_alone"), FIT)


def wait_for_all(commands):
    assert [command.wait() for command in commands] == [0] * len(commands), output_of(commands)


def output_of(commands):
    return "\n".join(command.printed for command in commands)


def assert_close(first, second, rtol=1e-3):
    """Check that two runs are equal up to rounding."""
    for row, expected in zip(first.history(), second.history(), strict=True):
        for name in ("train_loss", "valid_loss", "accuracy", "member_accuracy"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=rtol, abs=0.03)
        assert row["images_seen"] == expected["images_seen"]
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=rtol)
    weights, expected = (load_file(run.weights) for run in (first, second))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        difference = (tensor - expected[name]).float().norm()
        assert difference <= 0.02 * expected[name].float().norm() + 1e-6, name
    assert first.metrics()["test"]["nll"] == pytest.approx(
        second.metrics()["test"]["nll"], rel=rtol
    )


OPTIONS = [
    [],
    ["--members", "3", "--mix", "patchup"],
    ["--members", "1", "--mix", "sum", "--repeat", "1"],
    ["--mix", "channel", "--set", "mix.input_repetition=0.5"],
    ["--set", "train.ema_decay=0.9", "--set", "train.select=best", "--repeat", "2"],
    ["--set", "data.loader=streaming", "--set", "data.num_workers=1"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_two_processes_train_the_same_network_as_one(
    start_processes, train_alone, tmp_path, options
):
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *options))
    assert_close(open_run(run), train_alone(*options))


def test_four_processes_train_the_same_network_as_one(start_processes, train_alone, tmp_path):
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, count=4))
    assert_close(open_run(run), train_alone())


def test_ghost_batches_equal_those_of_one_process(start_processes, train_alone, tmp_path):
    """Training is equal, but each process updates its own running statistics."""
    ghosts = ["--set", "model.ghost_batch_size=16"]
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, *ghosts))
    losses = [row["train_loss"] for row in open_run(run).history()]
    expected = [row["train_loss"] for row in train_alone(*ghosts).history()]
    assert [*map(float, losses)] == pytest.approx([*map(float, expected)], rel=1e-4)


def test_deep_ensemble_trains_in_several_processes(start_processes, train_alone, tmp_path):
    run, nets = tmp_path / "run", ["--set", "model.num_nets=2"]
    wait_for_all(start_processes(*FIT, run, *nets))
    for name in ("net-1", "net-2"):
        assert_close(open_run(run / name), open_run(train_alone(*nets).path / name))


def test_msda_trains_in_several_processes(start_processes, tmp_path):
    """Partners are images of the same process, so the run differs from that of one process."""
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, "--msda", "cutmix"))
    assert len(open_run(run).history()) == 2


def test_only_rank_0_prints_and_writes(start_processes, train_alone, tmp_path):
    run = tmp_path / "run"
    first, second = start_processes(*FIT, run)
    wait_for_all([first, second])
    assert re.search("^Device +cpu in 2 processes", first.printed, re.MULTILINE)
    assert "Test accuracy" in first.printed
    assert second.printed == ""
    files = {path.name for path in run.iterdir()}
    assert files == {path.name for path in train_alone().path.iterdir()}
    assert (run / "log.txt").read_text().count("Run folder:") == 1
    assert "in 2 processes" in json.loads((run / "environment.json").read_text())["device"]


def test_only_rank_0_writes_logs(start_processes, train_alone, tmp_path):
    run = tmp_path / "run"
    wait_for_all(start_processes(*FIT, run, "--logger", "csv"))
    lines = (run / "logs" / "steps.csv").read_text().splitlines()
    steps = len(lines) - 1
    assert [line.partition(",")[0] for line in lines[1:]] == [*map(str, range(steps))]
    assert steps * 32 == int(open_run(run).history()[-1]["images_seen"])
    assert (run / "logs" / "first-batch.png").exists()
    assert_close(open_run(run), train_alone())


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


def test_batch_that_cannot_be_split_evenly_is_refused(start_processes, tmp_path):
    commands = start_processes(*FIT, tmp_path / "run", count=3)
    for command in commands:
        check_failed(
            command, 2, "A batch of 32 images cannot be split evenly over 3 processes", "33"
        )
    assert not (tmp_path / "run").exists()


def test_other_commands_run_in_one_process(start_processes):
    first, second = start_processes("lr-find", "--arch", "wrn10_1")
    check_failed(first, 2, "Only `mixmo fit` runs in several processes")
    assert second.wait() == 2
    assert second.printed.startswith("[process 1] Error: ")


def test_missing_package_is_reported(start_processes, tmp_path):
    without = """
import mixmo_fastai.runtime.processes as processes
processes.find_spec = lambda name: None
"""
    commands = start_processes(*FIT, tmp_path / "run", prelude=without)
    assert [command.wait() for command in commands] == [2, 2]
    assert "pip install 'mixmo-fastai[distributed]'" in commands[0].printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", [[0], [1], [0, 1]], ids=str)
def test_processes_stop_at_the_same_step_and_resume(start_processes, tmp_path, to):
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    wait_for_all(start_processes(*FIT, uninterrupted))
    commands = start_processes(*FIT, run, prelude=SLOW_STEPS)
    commands[0].wait_until_printed("1/2 ")
    for rank in to:
        commands[rank].signal(signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143], output_of(commands)
    assert CheckpointStore(run / "checkpoint").newest() is not None
    wait_for_all(start_processes("fit", "--resume", run))
    assert_same(open_run(uninterrupted), open_run(run))


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


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_processes_end_if_another_is_killed(start_processes, tmp_path, killed_rank):
    run = tmp_path / "run"
    commands = start_processes(*FIT, run, prelude=SLOW_STEPS)
    commands[0].wait_until_printed("1/2 ")
    commands[killed_rank].signal(signal.SIGKILL)
    code = commands[1 - killed_rank].wait(timeout=30)
    assert code == 1, commands[1 - killed_rank].printed
    assert "Another training process was lost: Connection" in commands[1 - killed_rank].printed
    assert "Traceback" not in commands[1 - killed_rank].printed
    wait_for_all(start_processes("fit", "--resume", run))


def test_loss_that_is_not_finite_in_one_process_ends_all(start_processes, tmp_path):
    fault = """
import os
from fastai.callback.core import Callback
from mixmo_fastai.training.history import HistoryCallback
own = HistoryCallback.after_batch
def fail(self):
    if os.environ["RANK"] == "1" and (self.learn.epoch, self.learn.iter) == (1, 2):
        self.learn.loss = self.learn.loss * float("nan")
    own(self)
HistoryCallback.after_batch = fail
"""
    run = tmp_path / "run"
    for command in start_processes(*FIT, run, prelude=fault):
        check_failed(command, 1, "The training loss is not finite at step ", " of epoch 2")
    state = CheckpointStore(run / "checkpoint").newest().path / "state.json"
    assert json.loads(state.read_text())["epoch"] == 1


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
    wait_for_all(start_processes(*FIT, run, "--epochs", "5", prelude=slow))
    newest = CheckpointStore(run / "checkpoint").newest()
    assert newest.path.name == "save-000002"  # the first and the last save


def test_precision_is_that_of_the_recipe_not_of_the_launcher(
    start_processes, train_alone, tmp_path
):
    run, set_precision = (
        tmp_path / "run",
        "import os; os.environ['ACCELERATE_MIXED_PRECISION'] = 'bf16'",
    )
    wait_for_all(start_processes(*FIT, run, prelude=set_precision))
    assert_close(open_run(run), train_alone(), rtol=1e-4)


def test_process_that_waits_for_others_can_be_terminated(mixmo, tmp_path):
    alone_of_two = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    announce = """
import torch.distributed as d
own = d.init_process_group
d.init_process_group = lambda *a, **k: (print('joining', flush=True), own(*a, **k))
"""
    command = mixmo(
        *FIT, tmp_path / "run",
        environment={**alone_of_two, "MASTER_PORT": free_port()}, prelude=announce,
    )  # fmt: skip
    command.wait_until_printed("joining")
    for _ in range(2):
        assert not command.ends_within(0.5)
        command.signal(signal.SIGTERM)
    assert command.wait(timeout=5) == 143


def test_fewer_validation_images_than_processes(start_processes, tmp_path):
    run = tmp_path / "run"
    few = ["--valid-split", "0.002", "--set", "model.ghost_batch_size=4"]
    wait_for_all(start_processes(*FIT, run, *few, count=4))
    assert len(open_run(run).history()) == 2


@pytest.mark.parametrize("conflict", ["folder", "lock"])
def test_errors_of_rank_0_are_reported_by_all_processes(start_processes, mixmo, tmp_path, conflict):
    run = tmp_path / "run"
    if conflict == "lock":
        first = mixmo(*FIT, run, prelude=SLOW_STEPS)
        first.wait_until_printed("1/2 ")
        commands = start_processes("fit", "--resume", run)
    else:
        late = "import mixmo_fastai.cli.fit as f, os; f.check_free = lambda out: None\n"
        run.mkdir()
        (run / "notes").touch()
        commands = start_processes(*FIT, run, prelude=late)
    assert [command.wait() for command in commands] == [2, 2] if conflict == "folder" else True
    for command in commands if conflict == "folder" else commands[:1]:
        check_failed(command, 2, "not empty" if conflict == "folder" else "is in use")


def test_incomplete_environment_of_a_launcher_is_refused(mixmo, tmp_path):
    command = mixmo(*FIT, tmp_path / "run", environment={"WORLD_SIZE": 2, "RANK": 0})
    check_failed(command, 2, "WORLD_SIZE is set but LOCAL_RANK is not")


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = [
    *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
]
LAUNCHERS = pytest.mark.parametrize("launcher", [TORCHRUN, LAUNCH], ids=["torchrun", "accelerate"])


def start_launcher(launcher, *words):
    module = ["-m", "mixmo_fastai"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *module, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@LAUNCHERS
def test_launchers_start_training(train_alone, tmp_path, launcher):
    run = tmp_path / "run"
    process = start_launcher(launcher, *FIT, run)
    output, _ = process.communicate(timeout=3 * TIMEOUT)
    assert process.returncode == 0, output
    assert "in 2 processes" in output
    assert_close(open_run(run), train_alone())


def test_launcher_fails_if_a_process_is_killed(tmp_path):
    run = tmp_path / "run"
    process = start_launcher(TORCHRUN, *FIT, run, "--epochs", "100000")
    for line in process.stdout:
        if "2/100000" in line:
            break
    children = [int(pid) for pid in child_pids(process.pid)]
    os.kill(children[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children), output
    assert CheckpointStore(run / "checkpoint").newest() is not None


def child_pids(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_processes() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_processes() == (2, 4)


NORM_PROGRAM = """
import torch
import torch.distributed as dist
from mixmo_fastai.models.synced_norm import SyncedBatchNorm2d
dist.init_process_group("gloo")
rank = dist.get_rank()
given = torch.load("given.pt")
norm = SyncedBatchNorm2d(5, momentum=MOMENTUM)
norm.load_state_dict(given["state"])
x = given["x"].chunk(2)[rank].clone().requires_grad_()
out = norm(x)
(out * given["weights"].chunk(2)[rank]).sum().backward()
torch.save([out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.state_dict()],
           f"found-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synced_statistics_equal_those_of_the_whole_batch(start_processes, tmp_path, momentum):
    random = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(8, 5, 3, 4, generator=random) for _ in range(2))
    x = x * 3 + 7
    norm = torch.nn.BatchNorm2d(5, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(5, generator=random) + 0.5)
        norm.bias.copy_(torch.randn(5, generator=random))
    torch.save({"state": norm.state_dict(), "x": x, "weights": weights}, tmp_path / "given.pt")
    wait_for_all(
        start_processes("fit", "--help", prelude=NORM_PROGRAM.replace("MOMENTUM", str(momentum)))
    )
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    x.requires_grad_()
    out = norm(x)
    (out * weights).sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in found]), out.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in found]), x.grad)
    for place, own in ((2, norm.weight.grad), (3, norm.bias.grad)):
        torch.testing.assert_close(found[0][place] + found[1][place], own)
    for part in found:
        torch.testing.assert_close(part[4], norm.state_dict())


def test_synced_norm_in_one_process_equals_batch_norm():
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 2, 2)
    expected = norm(x)
    assert type(sync_batch_norm(norm)[0]) is SyncedBatchNorm2d
    torch.testing.assert_close(norm(x), expected)


def test_metrics_that_cannot_be_summed_are_refused():
    from fastai.metrics import F1Score

    from mixmo_fastai.learner.distributed import SummedMetrics

    summed = SummedMetrics()
    summed.learn = SimpleNamespace(recorder=SimpleNamespace(_valid_mets=[F1Score()]))
    with pytest.raises(InputError, match="cannot be summed"):
        summed.after_validate()


def test_a_process_without_validation_images_adds_nothing(monkeypatch):
    from mixmo_fastai.learner.distributed import SummedMetrics
    from mixmo_fastai.metrics.fastai import ECE

    idle, busy = ECE(), ECE()
    busy.sums, busy.num_seen = torch.arange(15.0, dtype=torch.float64), 30
    expected = busy.value
    gathered = [[0.0, 0.0], [busy.sums, 30.0]]
    monkeypatch.setattr("mixmo_fastai.learner.distributed.all_gather", lambda sums: gathered)
    for metric in (idle, busy):
        summed = SummedMetrics()
        summed.learn = SimpleNamespace(recorder=SimpleNamespace(_valid_mets=[metric]))
        summed.after_validate()
        assert metric.value == expected


SHARED = """
import sys

import torch
import torch.distributed as dist
from synthetic import mixmo_dls
from mixmo_fastai import ECE, NLL, Brier, Disagreement, MemberAccuracy, mixmo_learner
from mixmo_fastai.learner.distributed import shared
from mixmo_fastai.models.mixmo_model import unwrap

dist.init_process_group("gloo")
learn = mixmo_learner(
    mixmo_dls(), "wrn10_1", seed=0,
    metrics=[NLL(), Brier(), ECE(), MemberAccuracy(), Disagreement()],
)
with shared(learn), learn.no_bar(), learn.no_logging():
    learn.fit(1, 0.05)
    values = [*learn.validate(ds_idx=2)]
    model = unwrap(learn.model).eval()
    with torch.no_grad():
        found = [(model.member_logits(x), y) for x, y in learn.dls[2]]
logits, labels = (torch.cat(parts) for parts in zip(*found))
torch.save((values[1:], torch.Tensor(logits), torch.Tensor(labels).long()), f"{dist.get_rank()}.pt")
dist.barrier()
sys.exit(0)
"""


@pytest.mark.parametrize("count", [2, 3])
def test_streaming_metrics_are_those_of_all_images(start_processes, tmp_path, count):
    wait_for_all(start_processes(prelude=SHARED, count=count))
    stored = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for values, logits, labels in stored:
        assert len(labels) == 30
        assert values == stored[0][0]
        assert_equal_to_evaluate_logits(values, logits, labels)


def assert_equal_to_evaluate_logits(values, logits, labels):
    found = evaluate_logits(logits, labels)
    found["member_accuracy"] = sum(found["member_accuracy"]) / logits.shape[1]
    names = ("nll", "brier", "ece", "member_accuracy", "disagreement")
    assert values == pytest.approx([found[name] for name in names], abs=1e-6)


FASTAI_PROGRAM = """
import sys

import torch
import torch.distributed as dist
from fastai import distributed as fastai_distributed
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fasttransform import Transform
from synthetic import fastai_dls

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.metrics.fastai import ECE, NLL, Brier, Disagreement, MemberAccuracy
from mixmo_fastai.models import create_model


def broadcast_on_cpus(self, values, rank):  # fastai's method moves them to a GPU
    values = torch.tensor(values)
    dist.broadcast(values, rank)
    return values.tolist()


class AddNoise(Transform):
    split_idx = 0

    def encodes(self, x: TensorImage):
        return x + torch.rand_like(x) / 600


class BatchRecorder(Callback):
    run_valid, order = False, 50

    def __init__(self):
        super().__init__()
        self.seen, self.masks, self.shapes = [], [], set()

    def after_pred(self):
        inputs, masks = self.learn.xb
        self.seen.append(inputs[:, :, 0, 0, 0])
        self.masks.append(masks)
        self.shapes.add((tuple(inputs.shape), tuple(self.learn.pred.shape)))


class ShareBuffers(Callback):  # the statistics of BatchNorm differ without sync_bn
    def before_validate(self):
        for buffer in self.learn.model.buffers():
            dist.broadcast(buffer, 0)


fastai_distributed.DistributedDL._broadcast = broadcast_on_cpus
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # processes may have different seeds
model = create_model("wrn10_1", 3, generator=torch.Generator().manual_seed(0))
recorder = BatchRecorder()
learn = Learner(
    fastai_dls(after_batch=[AddNoise()]), model, torch.nn.CrossEntropyLoss(),
    cbs=[MixMoCallback(), recorder, ShareBuffers()],
    metrics=[NLL(), Brier(), ECE(), MemberAccuracy(), Disagreement(), accuracy],
)
with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
    learn.fit(2, 0.05)
    last = learn.recorder.values[-1]
    metrics = learn.validate()
    valid = fastai_dls().valid
    with torch.no_grad():
        batches = [(learn.model.member_logits(x), y) for x, y in valid]
    logits, labels = (torch.cat(parts) for parts in zip(*batches))
torch.save(
    {
        "last": [*last], "valid": (torch.Tensor(logits), torch.Tensor(labels).long()),
        "seen": recorder.seen, "masks": recorder.masks, "shapes": recorder.shapes,
        "metrics": [*metrics],
        "weights": {n: p.detach() for n, p in learn.model.named_parameters()},
        "logits": learn.model.eval()(torch.ones(2, 3, 8, 8)).detach(),
    },
    f"seen-{rank}.pt",
)
dist.barrier()
sys.exit(0)
"""


def test_distrib_ctx_of_fastai(start_processes, tmp_path):
    """Each process pairs and mixes the images of its part of fastai's batch."""
    wait_for_all(start_processes(prelude=FASTAI_PROGRAM))
    first, second = (
        torch.load(tmp_path / f"seen-{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert (
        first["shapes"] == second["shapes"] == {((48, 2, 3, 8, 8), (48, 2, 3))}
    )  # 12 images, 4 times
    assert len(first["seen"]) == 2 * 96 // 2 // 12
    for first_batch, second_batch in zip(first["seen"], second["seen"], strict=True):
        for batch in (first_batch, second_batch):
            assert len(batch.unique()) > 48 * 2 - 5  # each copy has its own noise
            values, counts = (batch * 255).floor().unique(return_counts=True)
            assert len(values) > 1
            assert bool((counts % 8 == 0).all())  # each image is used by two members, four times
            assert not torch.equal(batch[:, 0], batch[:, 1])
    assert not any(torch.equal(*pair) for pair in zip(first["masks"], second["masks"], strict=True))
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-5)
    for saved in (first, second):  # images that fastai repeats to fill the last batch count once
        assert len(saved["valid"][1]) == 30
        assert_equal_to_evaluate_logits(saved["last"][2:7], *saved["valid"])


def test_distrib_ctx_of_fastai_refuses_own_loaders(start_processes):
    program = """
import sys
from fastai import distributed
from synthetic import mixmo_dls
from mixmo_fastai import mixmo_learner
from mixmo_fastai.errors import InputError

distributed.DistributedDL._broadcast = lambda self, values, rank: values
learn = mixmo_learner(mixmo_dls(), "wrn10_1")
try:
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1)
except InputError as error:
    print(error)
    sys.exit(0)
sys.exit("no error was raised")
"""
    commands = start_processes(prelude=program)
    wait_for_all(commands)
    assert all("Use `shared(learn)`" in command.printed for command in commands)
