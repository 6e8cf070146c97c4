"""Lost processes, wrong settings and errors end all processes with a readable error."""

import json
import signal

import pytest
from commands import SLOW_STEPS, check_failed
from launches import FIT, free_port, start_processes, wait_for_all

from mixmo_fastai.runs.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow

__all__ = ["start_processes"]  # fixtures


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
    # Rank 0 finds the lock before it joins the others, which a launcher then ends.
    refused = commands if conflict == "folder" else commands[:1]
    for command in refused:
        check_failed(command, 2, "not empty" if conflict == "folder" else "is in use")


def test_incomplete_environment_of_a_launcher_is_refused(mixmo, tmp_path):
    command = mixmo(*FIT, tmp_path / "run", environment={"WORLD_SIZE": 2, "RANK": 0})
    check_failed(command, 2, "WORLD_SIZE is set but LOCAL_RANK is not")
