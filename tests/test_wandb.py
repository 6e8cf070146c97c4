"""wandb never asks for a login, and ends with its command."""

import json
import signal
import time
from pathlib import Path

import pytest
import wandb
from commands import FIT, SLOW_STEPS
from logs import all_steps, logged_fit, no_wandb_login, read_wandb
from short_runs import STEPS, TINY

from mixmo_fastai.config.load import override
from mixmo_fastai.loggers import wandb_ as wandb_module
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run

pytestmark = pytest.mark.slow

__all__ = ["no_wandb_login"]  # fixtures

KEY = "0123456789abcdef" * 5


class TestLogin:
    """wandb never asks for a login."""

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
    def test_mode_depends_on_the_login(
        self, tmp_path, monkeypatch, capfd, variables, netrc, expected
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "netrc").write_text(netrc)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        wandb.teardown()  # it has already read the environment
        try:
            mode, reason = wandb_module._choose_mode()
            assert mode == expected[0]
            assert reason.startswith(expected[1])
            assert capfd.readouterr() == ("", "")
        finally:
            wandb.teardown()

    def test_run_is_stored_locally_without_a_connection(self, tmp_path, monkeypatch):
        original = wandb.init

        def init(**settings):
            if settings["mode"] == "online":
                raise wandb.errors.CommError("Timed out\nin 90 s")
            return original(**settings)

        monkeypatch.setattr(wandb, "init", init)
        monkeypatch.setattr(wandb_module, "_choose_mode", lambda: ("online", ""))
        run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
        (line,) = logged_fit(run, ("wandb",))
        assert line.startswith("wandb: stored locally (CommError: Timed out); upload with")
        assert len(read_wandb(run)[0]["train/loss"]) == STEPS

    def test_disabled_wandb_writes_no_files(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "disabled")
        wandb.teardown()
        run = create_run(override(TINY, ["train.epochs=1"]), tmp_path / "run")
        try:
            assert logged_fit(run, ("wandb",)) == ["wandb: disabled."]
        finally:
            wandb.teardown()
        assert [*(run.logs / "wandb").iterdir()] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_command_is_interrupted_and_resumed(mixmo, tmp_path, number):
    run, more = tmp_path / "run", ["--logger", "csv,tensorboard,wandb"]
    command = mixmo(*FIT, run, *more, prelude=SLOW_STEPS)
    command.wait_until_printed("1/3 ")
    command.signal(number, group=True)
    assert command.wait() == 128 + number, command.printed
    assert "Traceback" not in command.printed
    assert command.printed.splitlines()[-1].startswith("Interrupted. The state is saved")
    assert_no_process_is_left(command)
    run = open_run(run)
    state = json.loads((CheckpointStore(run.checkpoint).newest().path / "state.json").read_text())
    done = state["epoch"] * state["steps_per_epoch"] + state["step"]
    for steps in all_steps(run):
        assert [step for step, *_ in steps] == [*range(done)]
    assert read_wandb(run)[3] == [128 + number]
    command = mixmo("fit", "--resume", run.path, *more)
    assert command.wait() == 0, command.printed
    for steps in all_steps(run):
        assert [step for step, *_ in steps] == [*range(3 * state["steps_per_epoch"])]
    assert read_wandb(run)[3] == [128 + number, 0]
    assert_no_process_is_left(command)


def assert_no_process_is_left(command):
    """Check that wandb's process, which has its own session, ends with its command."""
    deadline = time.monotonic() + 10
    while processes := [*processes_for(command.pid)]:
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)
    assert not command.other_processes()


def processes_for(pid):
    for path in Path("/proc").iterdir():
        try:
            arguments = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--pid" in arguments and arguments[arguments.index(b"--pid") + 1] == str(pid).encode():
            yield arguments


def test_open_wandb_run_of_the_user_is_not_changed(tmp_path):
    with wandb.init(project="mine", dir=tmp_path, mode="offline") as user_run:
        run = create_run(TINY, tmp_path / "run")
        logged_fit(run, ["wandb"])
        user_run.log({"still": 1})
        assert read_wandb(run)[1] != [user_run.id]
        assert wandb.run is user_run
