"""Ctrl-C and SIGTERM sent to real processes: the run is saved and can be resumed."""

import random
import shutil
import signal

import pytest
from commands import ALL_STEPS_SLOW, FIT, SLOW_STEPS, STREAMED, check_resumed, uninterrupted
from short_runs import assert_same

from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import open_run

pytestmark = pytest.mark.slow

__all__ = ["uninterrupted"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}
BOTH_SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
BOTH_TARGETS = pytest.mark.parametrize("group", [False, True], ids=["process", "process group"])

SLOW_VALIDATION = """
import time
from mixmo_fastai.training.checkpointing import StopInValidation
original = StopInValidation.after_batch
def slow(self):
    if not self.learn.training:
        print("validating", flush=True)
        time.sleep(0.5)
    original(self)
StopInValidation.after_batch = slow
"""
SLOW_TEST = """
import time
import mixmo_fastai.training.final as training
original = training.evaluate_splits
def slow(*args, **kwargs):
    print("evaluating", flush=True)
    for _ in range(6000):  # one long sleep would delay a signal that arrives before it
        time.sleep(0.01)
    return original(*args, **kwargs)
training.evaluate_splits = slow
"""
SLOW_DISK = """
import os, time
from mixmo_fastai.runs import files
class Disk:
    def __getattr__(self, name):
        original = getattr(os, name)
        if name == "fsync":
            return lambda *args: (time.sleep(0.12), original(*args))[1]
        return original
files.os = Disk()
"""
SLOW_COMPILER = """
import time, torch
original = torch.compile
def slow(function, **settings):
    compiled = []
    def run(*args):
        if not compiled:
            print("compiling", flush=True)
            time.sleep(1)
            compiled.append(function)
        return function(*args)
    return run
torch.compile = slow
"""
SLOW_SEARCH = """
import time
import mixmo_fastai.training.lr_find
from fastai.learner import Learner
original = Learner.lr_find
def slow(self, *args, **kwargs):
    print("searching", flush=True)
    original_batch = self.one_batch
    self.one_batch = lambda *args: (time.sleep(0.1), original_batch(*args))
    return original(self, *args, **kwargs)
Learner.lr_find = slow
"""


def check_stopped(command, number, run_path):
    """Check that a command ended in response to a signal; return its last line."""
    assert command.wait() == CODES[number], command.printed
    assert "Traceback" not in command.printed
    assert not command.other_processes()
    last = command.printed.splitlines()[-1]
    if run_path is not None:
        assert last.endswith(f"resume with: mixmo fit --resume {run_path}")
        assert last in (run_path / "log.txt").read_text()
    return last


@BOTH_SIGNALS
@BOTH_TARGETS
def test_signal_in_a_step(mixmo, tmp_path, uninterrupted, number, group):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.signal(number, group=group)
    assert check_stopped(command, number, run).startswith("Interrupted. The state is saved")
    position = CheckpointStore(run / "checkpoint").newest()
    assert position is not None
    check_resumed(mixmo, run, uninterrupted())


@BOTH_SIGNALS
def test_signal_in_a_step_with_workers(mixmo, tmp_path, uninterrupted, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *STREAMED, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.wait_until(command.other_processes)
    command.signal(number, group=True)
    assert check_stopped(command, number, run).startswith("Interrupted. The state is saved")
    check_resumed(mixmo, run, uninterrupted(*STREAMED))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
def test_closing_the_terminal_and_warning_of_a_scheduler(mixmo, tmp_path, uninterrupted, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *STREAMED, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.wait_until(command.other_processes)
    command.signal(number, group=True)
    assert check_stopped(command, number, run).startswith("Interrupted. The state is saved")
    check_resumed(mixmo, run, uninterrupted(*STREAMED))


@BOTH_SIGNALS
def test_signal_in_the_first_step_with_compilation(mixmo, tmp_path, uninterrupted, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, "--compile", "on", prelude=SLOW_COMPILER)
    command.wait_until_printed("compiling")
    command.signal(number)
    command.wait_until_printed("Stopping after this step")
    check_stopped(command, number, run)
    assert CheckpointStore(run / "checkpoint").newest() is not None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
def test_signal_in_a_real_compilation(mixmo, tmp_path):
    """The compiler's processes are in the group; the step is finished and saved."""
    run = tmp_path / "run"
    few_kernels = """
from mixmo_fastai.models.wide_resnet import WideBlock
WideBlock.forward = lambda self, x: self.shortcut(x)
"""
    own_cache = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    command = mixmo(*FIT, run, "--compile", "on", prelude=few_kernels, environment=own_cache)
    command.wait_until(lambda: any((tmp_path / "cache").rglob("*")))
    command.signal(signal.SIGINT, group=True)
    assert command.wait(timeout=240) == 130, command.printed
    assert command.printed.splitlines()[-1].startswith("Interrupted. The state is saved")
    assert CheckpointStore(run / "checkpoint").newest() is not None
    assert not command.other_processes()


@BOTH_SIGNALS
def test_signal_in_a_validation(mixmo, tmp_path, uninterrupted, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_VALIDATION)
    command.wait_until_printed("validating")
    command.signal(number)
    check_stopped(command, number, run)
    check_resumed(mixmo, run, uninterrupted())


@BOTH_SIGNALS
def test_signal_in_the_final_evaluation(mixmo, tmp_path, uninterrupted, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_TEST)
    command.wait_until_printed("evaluating")
    command.signal(number)
    assert check_stopped(command, number, run).startswith("Interrupted. The state is saved")
    check_resumed(mixmo, run, uninterrupted())


@BOTH_SIGNALS
def test_signal_in_a_save(mixmo, tmp_path, uninterrupted, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_DISK)
    command.wait_until((run / "checkpoint" / ".unfinished").exists)
    command.signal(number)
    check_stopped(command, number, run)
    assert not (run / "checkpoint" / ".unfinished").exists()
    check_resumed(mixmo, run, uninterrupted())


@BOTH_SIGNALS
def test_two_signals_in_a_save(mixmo, tmp_path, uninterrupted, number):
    """The second signal exits immediately; the previous checkpoint is intact."""
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_DISK)
    command.wait_until((run / "checkpoint" / "save-000001").exists)
    command.wait_until((run / "checkpoint" / ".unfinished").exists)
    command.signal(number)
    command.wait_until_printed("again to exit now")
    assert not command.ends_within(0.4)  # two signals within 0.3 s count as one
    command.signal(number)
    assert command.wait(timeout=5) == CODES[number]
    assert CheckpointStore(run / "checkpoint").newest() is not None
    check_resumed(mixmo, run, uninterrupted())


@BOTH_SIGNALS
@BOTH_TARGETS
def test_signal_in_lr_find(mixmo, tmp_path, number, group):
    command = mixmo("lr-find", "--arch", "wrn10_1", "--threads", "1", prelude=SLOW_SEARCH)
    command.wait_until_printed("searching")
    command.signal(number, group=group)
    last = check_stopped(command, number, None)
    assert last == {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}[number]
    assert not [*tmp_path.glob("*.png")]


def test_signal_before_the_first_save(mixmo, tmp_path, uninterrupted):
    slow = SLOW_TEST.replace("training.evaluate_splits", "training.CheckpointStore")
    slow = slow.replace("training.final", "training.train")
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=slow)
    command.wait_until_printed("evaluating")
    command.signal(signal.SIGINT)
    assert check_stopped(command, signal.SIGINT, run).startswith(
        "Interrupted. Nothing was saved yet"
    )
    check_resumed(mixmo, run, uninterrupted())


def test_sighup_is_ignored_under_nohup(mixmo, tmp_path):
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    command = mixmo(*FIT, tmp_path / "run", prelude=ignored + SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.signal(signal.SIGHUP)
    assert command.wait() == 0


@pytest.mark.parametrize("seed", range(6))
def test_sigkill_at_any_time(mixmo, tmp_path, uninterrupted, seed):
    """SIGKILL cannot be handled, but the last checkpoint is intact."""
    times, run = random.Random(seed), tmp_path / "run"
    arguments = [*FIT, run]
    slow_disk = SLOW_DISK.replace("0.12", "0.02") if seed % 2 else ""
    for _ in range(3):
        command = mixmo(*arguments, prelude=ALL_STEPS_SLOW.replace("0.1", "0.03") + slow_disk)
        command.wait_until_printed("Run folder")
        if not command.ends_within(times.uniform(0, 0.9)):
            command.signal(signal.SIGKILL, group=True)
        assert command.wait() in (0, -signal.SIGKILL), command.printed
        arguments = ["fit", "--resume", run]
    check_resumed(mixmo, run, uninterrupted())


def test_signal_in_the_second_network_of_a_deep_ensemble(mixmo, tmp_path, uninterrupted):
    more = ["--set", "model.num_nets=2"]
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *more, prelude=SLOW_STEPS)
    command.wait_until((run / "net-2" / "history.csv").exists)
    command.signal(signal.SIGTERM)
    check_stopped(command, signal.SIGTERM, run)
    command = mixmo("fit", "--resume", run)
    assert command.wait() == 0, command.printed
    for name in ("net-1", "net-2"):
        assert_same(open_run(uninterrupted(*more).path / name), open_run(run / name))


def test_interrupted_run_can_be_moved(mixmo, tmp_path, uninterrupted):
    command = mixmo(*FIT, tmp_path / "run", prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.signal(signal.SIGINT)
    check_stopped(command, signal.SIGINT, tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    check_resumed(mixmo, tmp_path / "elsewhere", uninterrupted())


def test_signal_before_the_first_step(mixmo, tmp_path, uninterrupted):
    slow = """
import time
import mixmo_fastai.cli.fit as fit
original = fit.print_plan
def slow(*args, **kwargs):
    print("planning", flush=True)
    for _ in range(6000):
        time.sleep(0.01)
    return original(*args, **kwargs)
fit.print_plan = slow
"""
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=slow)
    command.wait_until_printed("planning")
    command.signal(signal.SIGTERM)
    assert check_stopped(command, signal.SIGTERM, run).startswith(
        "Interrupted. Nothing was saved yet"
    )
    check_resumed(mixmo, run, uninterrupted())
