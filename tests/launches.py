"""Start commands in several processes, as a launcher does, and compare their runs."""

import itertools
import os
import socket

import pytest
from processes import uninterrupted_runs
from safetensors.torch import load_file

from mixmo_fastai.runs.folder import open_run

_FIT = (
    "fit --arch wrn10_1 --limit 64 --valid-split 0.05 --batch-size 32 --epochs 2 --device cpu "
    "--threads 1 --out"
)
FIT = _FIT.split()
SHORT = ["--limit", "32"]  # added to FIT, it halves the number of steps
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.count(20_000 + 2_000 * WORKER)


def free_port():
    """Return a port that no other test uses; a port chosen by the system might be in use by one."""
    for port in PORTS:
        with socket.socket() as own:
            if own.connect_ex(("127.0.0.1", port)):
                return port
    return None


def start_all(start, words, count=2, **how):
    """Start a command in several processes with a function that starts one."""
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start(words, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}, **how)
        for rank in range(count)
    ]


@pytest.fixture
def start_processes(mixmo):
    """Return a function that starts a command in several processes, as a launcher does."""

    def start(*words, count=2, **how):
        return start_all(lambda words, **how: mixmo(*words, **how), words, count, **how)

    return start


@pytest.fixture(scope="module")
def train_by_two(server, tmp_path_factory):
    """Return a function that trains in two processes with arguments in addition to `FIT`.

    It returns the run and the commands. Runs are cached by the arguments.
    """
    folder, trained = tmp_path_factory.mktemp("train_by_two"), {}

    def get(*more):
        if more not in trained:
            path = folder / f"run-{len(trained)}"
            commands = start_all(server.start, [*FIT, path, *more], folder=folder)
            wait_for_all(commands)
            trained[more] = open_run(path), commands
        return trained[more]

    return get


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
