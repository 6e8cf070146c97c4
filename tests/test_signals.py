"""Ctrl-C and SIGTERM, sent to real processes: what there is of a run is saved, and goes on."""

import random
import shutil
import signal

import pytest
from processes import undisturbed
from test_resuming import assert_same

from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.folder import open_run

pytestmark = pytest.mark.slow

_FIT = (
    "fit --arch wrn10_1 --limit 64 --valid-split 0.05 --batch-size 32 --epochs 3 --device cpu "
    "--threads 1 --set train.ema_decay=0.9 --set train.select=best --out"
)
FIT = _FIT.split()
STREAMED = ["--set", "data.loader=streaming", "--set", "data.num_workers=2"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
TO = pytest.mark.parametrize("group", [False, True], ids=["to the process", "to its group"])

SLOW_STEPS = """
import time
from mixmo_fastai.training.recording import HistoryCallback
own = HistoryCallback.after_batch
def slow(self):
    if self.learn.epoch:  # the first epoch is over soon, since most tests wait for its end
        time.sleep(0.1)
    own(self)
HistoryCallback.after_batch = slow
"""
ALL_STEPS_SLOW = SLOW_STEPS.replace("if self.learn.epoch:", "if True:")
SLOW_VALIDATION = """
import time
from mixmo_fastai.training.recording import StopInValidation
own = StopInValidation.after_batch
def slow(self):
    if not self.learn.training:
        print("validating", flush=True)
        time.sleep(0.5)
    own(self)
StopInValidation.after_batch = slow
"""
SLOW_TEST = """
import time
import mixmo_fastai.training.train as training
own = training.evaluate_splits
def slow(*args, **kwargs):
    print("evaluating", flush=True)
    for _ in range(6000):  # a signal just before a long sleep would wait for its end
        time.sleep(0.01)
    return own(*args, **kwargs)
training.evaluate_splits = slow
"""
SLOW_DISK = """
import os, time
from mixmo_fastai.runs import files
class Disk:
    def __getattr__(self, name):
        own = getattr(os, name)
        if name == "fsync":
            return lambda *args: (time.sleep(0.12), own(*args))[1]
        return own
files.os = Disk()
"""
SLOW_COMPILER = """
import time, torch
own = torch.compile
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
own = Learner.lr_find
def slow(self, *args, **kwargs):
    print("searching", flush=True)
    one = self.one_batch
    self.one_batch = lambda *args: (time.sleep(0.1), one(*args))
    return own(self, *args, **kwargs)
Learner.lr_find = slow
"""


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Runs that nobody disturbed, by what was asked for beyond `FIT`."""
    return undisturbed(server, tmp_path_factory.mktemp("whole"), FIT)


def stopped(command, number, run_path):
    """Check that a command ended as one that was asked to stop."""
    assert command.wait() == CODES[number], command.said
    assert "Traceback" not in command.said
    assert not command.others()
    last = command.said.splitlines()[-1]
    if run_path is not None:
        assert last.endswith(f"resume with: mixmo fit --resume {run_path}")
        assert last in (run_path / "log.txt").read_text()
    return last


def resumed(mixmo, run_path, whole):
    """Check that a run goes on to the end that it would have had."""
    command = mixmo("fit", "--resume", run_path)
    assert command.wait() == 0, command.said
    assert_same(whole, open_run(run_path))


@BOTH
@TO
def test_in_a_step(mixmo, tmp_path, whole, number, group):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_STEPS)
    command.until_said("1/3 ")
    command.signal(number, group=group)
    assert stopped(command, number, run).startswith("Interrupted. The state is saved")
    position = CheckpointStore(run / "checkpoint").newest()
    assert position is not None
    resumed(mixmo, run, whole())


@BOTH
def test_in_a_step_with_workers(mixmo, tmp_path, whole, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *STREAMED, prelude=SLOW_STEPS)
    command.until_said("1/3 ")
    command.until(command.others)
    command.signal(number, group=True)
    assert stopped(command, number, run).startswith("Interrupted. The state is saved")
    resumed(mixmo, run, whole(*STREAMED))


def test_a_terminal_that_is_closed(mixmo, tmp_path, whole):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_STEPS)
    command.until_said("1/3 ")
    command.signal(signal.SIGHUP, group=True)
    stopped(command, signal.SIGHUP, run)
    resumed(mixmo, run, whole())


@BOTH
def test_in_the_first_step_which_compiles(mixmo, tmp_path, whole, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, "--compile", "on", prelude=SLOW_COMPILER)
    command.until_said("compiling")
    command.signal(number)
    command.until_said("Stopping after this step")
    stopped(command, number, run)
    assert CheckpointStore(run / "checkpoint").newest() is not None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
def test_in_a_compilation(mixmo, tmp_path):
    """A real one, whose own processes are in the group; the step is finished and saved."""
    run = tmp_path / "run"
    few_kernels = """
from mixmo_fastai.models.wide_resnet import WideBlock
WideBlock.forward = lambda self, x: self.shortcut(x)
"""
    own_cache = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    command = mixmo(*FIT, run, "--compile", "on", prelude=few_kernels, environment=own_cache)
    command.until(lambda: any((tmp_path / "cache").rglob("*")))
    command.signal(signal.SIGINT, group=True)
    assert command.wait(patience=240) == 130, command.said
    assert command.said.splitlines()[-1].startswith("Interrupted. The state is saved")
    assert CheckpointStore(run / "checkpoint").newest() is not None
    assert not command.others()


@BOTH
def test_in_a_validation(mixmo, tmp_path, whole, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_VALIDATION)
    command.until_said("validating")
    command.signal(number)
    stopped(command, number, run)
    resumed(mixmo, run, whole())


@BOTH
def test_in_the_last_evaluation(mixmo, tmp_path, whole, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_TEST)
    command.until_said("evaluating")
    command.signal(number)
    assert stopped(command, number, run).startswith("Interrupted. The state is saved")
    resumed(mixmo, run, whole())


@BOTH
def test_in_a_save(mixmo, tmp_path, whole, number):
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_DISK)
    command.until((run / "checkpoint" / ".unfinished").exists)
    command.signal(number)
    stopped(command, number, run)
    assert not (run / "checkpoint" / ".unfinished").exists()
    resumed(mixmo, run, whole())


@BOTH
def test_twice_in_a_save(mixmo, tmp_path, whole, number):
    """The second one leaves at once, with the checkpoint before intact."""
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=SLOW_DISK)
    command.until((run / "checkpoint" / "save-000001").exists)
    command.until((run / "checkpoint" / ".unfinished").exists)
    command.signal(number)
    command.until_said("again to exit now")
    assert not command.ends_within(0.4)  # two within 0.3 s count as one
    command.signal(number)
    assert command.wait(patience=5) == CODES[number]
    assert CheckpointStore(run / "checkpoint").newest() is not None
    resumed(mixmo, run, whole())


@BOTH
@TO
def test_in_a_search_for_a_rate(mixmo, tmp_path, number, group):
    command = mixmo("lr-find", "--arch", "wrn10_1", "--threads", "1", prelude=SLOW_SEARCH)
    command.until_said("searching")
    command.signal(number, group=group)
    last = stopped(command, number, None)
    assert last == {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}[number]
    assert not [*tmp_path.glob("*.png")]


def test_before_anything_is_saved(mixmo, tmp_path, whole):
    slow = SLOW_TEST.replace("training.evaluate_splits", "training.CheckpointStore")
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=slow)
    command.until_said("evaluating")
    command.signal(signal.SIGINT)
    assert stopped(command, signal.SIGINT, run).startswith("Interrupted. Nothing was saved yet")
    resumed(mixmo, run, whole())


def test_under_nohup_a_closed_terminal_is_nothing(mixmo, tmp_path):
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    command = mixmo(*FIT, tmp_path / "run", prelude=ignored + SLOW_STEPS)
    command.until_said("1/3 ")
    command.signal(signal.SIGHUP)
    assert command.wait() == 0


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment(mixmo, tmp_path, whole, seed):
    """Nothing can be done about SIGKILL, and nothing is lost that a checkpoint holds."""
    moments, run = random.Random(seed), tmp_path / "run"
    words = [*FIT, run]
    disk = SLOW_DISK.replace("0.12", "0.02") if seed % 2 else ""
    for _ in range(3):
        command = mixmo(*words, prelude=ALL_STEPS_SLOW.replace("0.1", "0.03") + disk)
        command.until_said("Run folder")
        if not command.ends_within(moments.uniform(0, 0.9)):
            command.signal(signal.SIGKILL, group=True)
        assert command.wait() in (0, -signal.SIGKILL), command.said
        words = ["fit", "--resume", run]
    resumed(mixmo, run, whole())


def test_a_deep_ensemble_is_stopped_in_its_second_network(mixmo, tmp_path, whole):
    more = ["--set", "model.num_nets=2"]
    run = tmp_path / "run"
    command = mixmo(*FIT, run, *more, prelude=SLOW_STEPS)
    command.until((run / "net-2" / "history.csv").exists)
    command.signal(signal.SIGTERM)
    stopped(command, signal.SIGTERM, run)
    command = mixmo("fit", "--resume", run)
    assert command.wait() == 0, command.said
    for name in ("net-1", "net-2"):
        assert_same(open_run(whole(*more).path / name), open_run(run / name))


def test_an_interrupted_run_can_be_moved(mixmo, tmp_path, whole):
    command = mixmo(*FIT, tmp_path / "run", prelude=SLOW_STEPS)
    command.until_said("1/3 ")
    command.signal(signal.SIGINT)
    stopped(command, signal.SIGINT, tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    resumed(mixmo, tmp_path / "elsewhere", whole())


def test_between_the_run_folder_and_the_first_step(mixmo, tmp_path, whole):
    slow = """
import time
import mixmo_fastai.cli.fit as fit
own = fit.print_plan
def slow(*args, **kwargs):
    print("planning", flush=True)
    for _ in range(6000):
        time.sleep(0.01)
    return own(*args, **kwargs)
fit.print_plan = slow
"""
    run = tmp_path / "run"
    command = mixmo(*FIT, run, prelude=slow)
    command.until_said("planning")
    command.signal(signal.SIGTERM)
    assert stopped(command, signal.SIGTERM, run).startswith("Interrupted. Nothing was saved yet")
    resumed(mixmo, run, whole())
