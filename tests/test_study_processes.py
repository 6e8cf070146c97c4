"""Studies in several processes: claims, interruption, failures, and files that all may write."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from test_study import SMALL

from mixmo_fastai.cli import run as program
from mixmo_fastai.cli import study as cli_study
from mixmo_fastai.errors import InputError, RunFailedError, RunInterruptedError
from mixmo_fastai.runs.files import write_atomically
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.lock import claim, locked
from mixmo_fastai.study import execute
from mixmo_fastai.study.execute import Executor, is_in_use
from mixmo_fastai.study.plan import read_study
from mixmo_fastai.study.records import write_record


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.slow
def test_runs_of_other_processes_and_failures_do_not_stop_a_study(file, tmp_path):
    study = read_study(file)
    first, second, third = study.runs[:3]
    broken = replace(second.recipe, data=replace(second.recipe.data, limit=3))
    lines = []
    executor = Executor(tmp_path / "out", print_line=lines.append)
    in_use = first.folder(executor.folder).path
    in_use.mkdir(parents=True)
    with locked(in_use):  # as another process does
        assert is_in_use(in_use)
        with pytest.raises(
            RunFailedError, match=r"1 of 3 runs failed\.\nvanilla-400-seed1: Error: "
        ):
            executor.train([first, replace(second, recipe=broken), third])
    assert f"{first.name}: another process trains it" in lines
    assert not is_in_use(in_use)
    assert third.folder(executor.folder).is_finished
    assert not first.folder(executor.folder).is_finished
    assert "Run folder" in (tmp_path / "out" / "logs" / f"{third.name}.txt").read_text()


@pytest.mark.slow
def test_interrupted_studies_are_continued(file, tmp_path):
    file.write_text(
        SMALL.replace("images_seen = [400, 800]", "images_seen = [200_000]")
        .replace("images_seen = [800]", "images_seen = [200_000]")
        .replace("seeds = [0, 1]", "seeds = [0]")
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mixmo_fastai", "study", str(file), "--out", str(out)]
    with subprocess.Popen([*command, "--jobs", "2"], stdout=subprocess.PIPE, text=True) as process:
        runs = [out / "runs" / f"{name}-200000-seed0" for name in ("vanilla", "cut-mixmo")]
        deadline = time.monotonic() + 120
        while not all((run / "history.csv").exists() for run in runs):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "they save their states" in output
    for run in runs:
        folder = RunFolder(run)
        assert folder.has_state
        assert not folder.is_finished
        assert not is_in_use(run)
    study = read_study(file)
    rows = [RunFolder(run).history() for run in runs]
    executor = Executor(out)
    resumed = executor._start_if_free(study.runs[0], "1 of 2")
    try:
        deadline = time.monotonic() + 120
        while len(RunFolder(runs[0]).history()) <= len(rows[0]):
            assert time.monotonic() < deadline
            assert resumed.process.poll() is None
            time.sleep(0.1)
    finally:
        executor._stop([resumed])
    assert RunFolder(runs[0]).history()[: len(rows[0])] == rows[0]


@pytest.mark.slow
def test_processes_that_start_together_share_the_runs(file, tmp_path):
    out = tmp_path / "out"
    vanilla = SMALL.partition("[methods.cut-mixmo]")[0].replace("[400, 800]", "[400]")
    file.write_text(vanilla.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    command = [sys.executable, "-m", "mixmo_fastai", "study", str(file), "--out", str(out)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    names = [run.name for run in read_study(file).runs]
    lines = "\n".join(outputs).splitlines()
    for name in names:  # each was trained once
        assert sum(line.startswith(f"{name}: training, ") for line in lines) == 1, lines
        assert sum(line.startswith(f"{name}: finished in ") for line in lines) == 1, lines
        assert (out / "logs" / f"{name}.txt").read_text().count("Run folder") == 1
    for output in outputs:
        assert "training, " in output
    assert json.loads((out / "study.json").read_text())["unfinished"] == 0
    assert not [path for path in out.rglob(".*") if path.is_file()]


def test_claims_exclude_each_other(tmp_path):
    run = tmp_path / "runs" / "vanilla"
    end = claim(run)
    assert end is not None
    assert claim(run) is None
    end()
    assert not any(run.parent.iterdir())
    again = claim(run)
    assert again is not None
    again()


def test_a_run_that_is_claimed_or_was_finished_meanwhile_is_not_started(
    file, tmp_path, monkeypatch
):
    first, second, third = read_study(file).runs[:3]
    lines = []
    executor = Executor(tmp_path, print_line=lines.append)
    monkeypatch.setattr(executor, "_start", pytest.fail)
    end = claim(first.folder(tmp_path).path)

    def claim_late(path):
        claimed = claim(path)
        if path == second.folder(tmp_path).path:  # another process ended between both checks
            path.mkdir()
            (path / "metrics.json").write_text("{}")
        return claimed

    monkeypatch.setattr(execute, "claim", claim_late)
    third.folder(tmp_path).path.mkdir(parents=True)
    with locked(third.folder(tmp_path).path):
        executor.train([first, second, third])
    end()
    assert lines == [
        f"{first.name}: another process trains it",
        f"{second.name}: another process has trained it",
        f"{third.name}: another process trains it",
    ]
    again = claim(second.folder(tmp_path).path)  # its claim was ended
    assert again is not None
    again()


def test_a_run_whose_process_was_stopped_meanwhile_is_trained_at_the_end(
    file, tmp_path, monkeypatch
):
    first, second = read_study(file).runs[:2]
    lines, others = [], [claim(first.folder(tmp_path).path)]
    executor = Executor(tmp_path, print_line=lines.append)

    def start(run):
        while others:  # the other process is stopped
            others.pop()()
        run.folder(tmp_path).path.mkdir(parents=True)
        (run.folder(tmp_path).path / "metrics.json").write_text('{"seconds": 60}')
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(executor, "_start", start)
    executor.train([first, second])
    assert lines == [
        f"{first.name}: another process trains it",
        f"{second.name}: training, 1 of 2",
        f"{second.name}: finished in 1.0 minutes",
        f"{first.name}: training, 2 of 2",
        f"{first.name}: finished in 1.0 minutes",
    ]


def test_an_error_stops_the_other_runs(file, tmp_path, monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    started, popen = [], subprocess.Popen

    def start(command, **kwargs):
        started.append(popen(sleeper, start_new_session=True))
        (tmp_path / "logs").rename(tmp_path / "old-logs")
        (tmp_path / "logs").touch()  # the next log cannot be written
        return started[0]

    def print_line(line):
        if "Stopping" in line:
            raise BrokenPipeError  # a closed terminal keeps no process running

    executor = Executor(tmp_path, jobs=2, print_line=print_line)
    monkeypatch.setattr(subprocess, "Popen", start)
    runs = read_study(file).runs[:2]
    with pytest.raises(RunFailedError, match=r"Cannot write .*logs.*: File exists\.\n"):
        executor.train(runs)
    assert started[0].poll() == -signal.SIGTERM
    for run in runs:
        end = claim(run.folder(tmp_path).path)
        assert end is not None
        end()


SAVES_SLOWLY = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(1)
    Path(sys.argv[1]).touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
Path(sys.argv[2]).touch()
time.sleep(600)
"""


def test_a_signal_that_arrives_twice_lets_the_runs_save_their_states(file, tmp_path, monkeypatch):
    saved, ready, popen = tmp_path / "saved", tmp_path / "ready", subprocess.Popen
    started = []

    def start(command, **kwargs):
        command = [sys.executable, "-c", SAVES_SLOWLY, str(saved), str(ready)]
        started.append(popen(command, start_new_session=True))
        return started[0]

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored in a shell's background
            time.sleep(0.02)  # well below the time from which a second one exits at once

    monkeypatch.setattr(subprocess, "Popen", start)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RunInterruptedError, match="The states are saved") as caught:
        Executor(tmp_path).train(read_study(file).runs)
    thread.join()
    assert caught.value.exit_code == 143
    assert saved.exists()
    assert [process.poll() for process in started] == [0]


def test_a_run_that_is_started_during_a_signal_is_stopped(file, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def start(command, **kwargs):
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        started.append(popen(sleeper, start_new_session=True))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(RunInterruptedError) as caught:
        Executor(tmp_path, jobs=2).train(read_study(file).runs)
    assert caught.value.exit_code == 143
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_runs_that_do_not_stop_are_killed_and_named(file, tmp_path, monkeypatch):
    popen, ready = subprocess.Popen, tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    )

    def start(command, **kwargs):
        process = popen([sys.executable, "-c", code, str(ready)], start_new_session=True)
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(execute, "SECONDS_TO_STOP", 0)
    with pytest.raises(
        RunInterruptedError, match=r"^Interrupted\. Runs killed, .* 0 s: 1; the last"
    ):
        Executor(tmp_path).train(read_study(file).runs)


def test_results_that_fail_too_do_not_hide_why_runs_failed(file, tmp_path, monkeypatch, capsys):
    def train(self, runs):
        raise RunFailedError("1 of 2 runs failed.\nplain: Error: out of memory")

    def write(*_):
        raise InputError("vanilla-400-seed0 was evaluated on other images.")

    monkeypatch.setattr(Executor, "train", train)
    monkeypatch.setattr(cli_study, "_has_results", lambda *_: True)
    monkeypatch.setattr(cli_study, "_write_results", write)
    assert program(["study", str(file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "out of memory" in error
    assert "No results: vanilla-400-seed0 was evaluated on other images." in error


def test_runs_are_chosen_by_method_seed_and_length(file, tmp_path, monkeypatch, capsys):
    planned = read_study(file)
    assert planned.choose() == planned.runs
    trained = []
    monkeypatch.setattr(Executor, "train", lambda self, runs: trained.extend(runs))
    command = ["study", str(file), "--out", str(tmp_path / "out")]
    chosen = ["--method", "vanilla", "--method", "ensemble", "--seed", "0", "--images-seen", "800"]
    assert program([*command, *chosen]) == 0
    assert [run.name for run in trained] == ["vanilla-800-seed0", "ensemble-800-seed0"]
    assert "tiny: 2 runs in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "vanila"], "There is no method 'vanila'. Did you mean 'vanilla'?"),
        (["--seed", "7"], "has seed=7.\nAvailable: 0, 1."),
        (["--images-seen", "500"], "has images_seen=500.\nAvailable: 400, 800."),
        (["--method", "cut-mixmo", "--images-seen", "400"], "this combination of method, seed"),
        (["--summary", "--seed", "0"], "choose what is trained; --summary trains nothing"),
    ],
)
def test_wrong_choices_of_runs_are_explained(file, tmp_path, capsys, options, message):
    assert program(["study", str(file), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_files_of_several_writers_are_always_complete(tmp_path):
    path, errors = tmp_path / "study.md", []
    contents = [letter * 10_000 for letter in "ab"]
    write_atomically(path, contents[0], is_shared=True)

    def write(content):
        try:
            for _ in range(50):
                write_atomically(path, content, is_shared=True)
                assert path.read_text() in contents
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [each.name for each in tmp_path.iterdir()] == ["study.md"]


def test_a_run_changed_meanwhile_is_not_resumed(file, tmp_path, monkeypatch):
    """The study of this process is older than the one with which another started the run."""
    run = read_study(file).runs[0]
    changed = replace(
        run, recipe=replace(run.recipe, model=replace(run.recipe.model, arch="wrn10_3"))
    )
    lines = []
    executor = Executor(tmp_path, print_line=lines.append)
    monkeypatch.setattr(executor, "_start", pytest.fail)

    def claim_late(path):
        claimed = claim(path)  # the other process starts the run, and is interrupted
        path.mkdir()
        write_record(changed, tmp_path)
        return claimed

    monkeypatch.setattr(execute, "claim", claim_late)
    with pytest.raises(RunFailedError, match=r"1 of 1 runs failed\.\n.*: was started with model"):
        executor.train([run])
    assert "the study now has" in lines[-1]
