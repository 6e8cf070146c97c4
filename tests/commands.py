"""A short training as a command: slow it down, and check how it failed or was resumed."""

import re

import pytest
from processes import uninterrupted_runs
from short_runs import assert_same

from mixmo_fastai.runs.folder import open_run

_FIT = (
    "fit --arch wrn10_1 --limit 64 --valid-split 0.05 --batch-size 32 --epochs 3 --device cpu "
    "--threads 1 --set train.ema_decay=0.9 --set train.select=best --out"
)
FIT = _FIT.split()
STREAMED = ["--set", "data.loader=streaming", "--set", "data.num_workers=2"]

SLOW_STEPS = """
import time
from mixmo_fastai.training.history import HistoryCallback
original_after_batch = HistoryCallback.after_batch
def slow(self):
    if self.learn.epoch:  # the first epoch is not slowed down, since most tests wait for its end
        time.sleep(0.1)
    original_after_batch(self)
HistoryCallback.after_batch = slow
"""
ALL_STEPS_SLOW = SLOW_STEPS.replace("if self.learn.epoch:", "if True:")


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """Return a function that trains uninterrupted runs with `FIT` and further arguments."""
    return uninterrupted_runs(server, tmp_path_factory.mktemp("uninterrupted"), FIT)


def check_resumed(mixmo, run_path, uninterrupted):
    """Resume a run and check that it equals the uninterrupted run."""
    command = mixmo("fit", "--resume", run_path)
    assert command.wait() == 0, command.printed
    assert_same(uninterrupted, open_run(run_path))


# Output of torch's loader if a worker is lost while others are being started.
IGNORED_EXCEPTION = re.compile(
    r"^Exception ignored in.*\nTraceback.*\n(  .*\n)*\S.*\n?", re.MULTILINE
)


def check_failed(command, code, *parts):
    """Check that a command failed with a readable error; return its message."""
    assert command.wait() == code, command.printed
    output = IGNORED_EXCEPTION.sub("", command.printed)
    assert "Traceback" not in output
    message = output[output.rindex("Error: ") :]
    assert len(message.splitlines()) <= 3
    for part in parts:
        assert part in message
    return message


def train_small_study(mixmo, folder, arch, methods, script):
    """Train a study of `digits/cut-mixmo` into out/, each method with a setting of its own."""
    sections = (
        f'[methods.{name}]\nrecipe = "digits/cut-mixmo"\nset = ["{setting}"]\n'
        for name, setting in methods.items()
    )
    (folder / "study.toml").write_text(
        f'images_seen = [400]\nset = ["model.arch={arch}", "data.limit=40", '
        f'"train.batch_size=8"]\n{"".join(sections)}'
    )
    command = mixmo("study", "study.toml", "--out", "out", script=script)
    assert command.wait() == 0, command.printed
