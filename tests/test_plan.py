"""What `mixmo fit` says before, during and after training."""

import io
import json
import re

import pytest
from datasets import write_image_folder
from rich.console import Console

from mixmo_fastai.cli import progress, run
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.progress import TrainingDisplay, format_clock
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.text import estimated_duration
from mixmo_fastai.training import speed
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.speed import Speed
from mixmo_fastai.training.train import train

TINY = ("--arch", "wrn10_1", "--limit", "48", "--batch-size", "16", "--device", "cpu")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def slow(monkeypatch):
    """A machine that trains half an image per second."""
    monkeypatch.setattr(speed, "measure_speed", lambda training: Speed(0.5))


def rows(text):
    """Give the rows of a plan or of figures by their labels."""
    return {line.split()[0]: line for line in text.splitlines() if line[:1].strip()}


def test_the_plan_tells_the_time_before_training(slow, capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "here"]) == 0
    out = capsys.readouterr().out
    assert "at 0.5 images/s" in rows(out)["Time"]
    assert out.index("\nTime ") < out.index(" train loss")


def test_a_short_plan_is_all_there_is_and_settings_go_to_the_log(capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "here"]) == 0
    out, log = capsys.readouterr().out, (open_run("here").path / "log.txt").read_text()
    assert len(out.split("\n\n")[0].splitlines()) <= 10
    assert "weight_root=" in log
    assert "weight_root=" not in out
    assert out.split("\n\n")[0] in log


@pytest.mark.slow
def test_hours_on_a_cpu_are_answered_with_what_fits(slow, capsys, monkeypatch):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    words = ["fit", *TINY, "--arch", "wrn16_8", "--epochs", "100", "--out", "here"]
    assert run(words) == 1
    out = capsys.readouterr().out
    assert "about 13 h" in rows(out)["Time"]
    assert re.search(r"For about 20 minutes: --arch wrn10_4 --epochs \d+\n", out)


@pytest.mark.parametrize("epochs", ["1", "6"])
def test_less_than_an_hour_is_not(slow, capsys, epochs, monkeypatch):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    assert run(["fit", *TINY, "--epochs", epochs, "--out", "here"]) == 1
    assert "20 minutes" not in capsys.readouterr().out


def test_a_folder_is_told_what_was_chosen_and_what_it_lacks(folder, capsys):
    write_image_folder(folder / "pets", num_train=8, size=(72, 72))
    words = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    assert run(["fit", "pets", *words]) == 0
    out = capsys.readouterr().out
    plan, _, end = out.partition("Run folder:")
    assert rows(out)["Defaults"].endswith(
        "images scaled to 64x64, chosen for a CPU; change with --set data.image_size=N"
    )
    assert "1,500,000 images seen (here 48) and a width of 4 (here 1)" in rows(plan)["Advice"]
    assert "use --members 1" in rows(end)["Advice"]
    assert "--members 1" in rows(plan)["Advice"]
    assert "use --members 1" in rows(end)["Advice"]


def test_a_shipped_recipe_is_neither_chosen_nor_advised_against(capsys):
    assert run(["fit", *TINY, "--epochs", "1"]) == 0
    plan = capsys.readouterr().out.split("\n\n")[0]
    assert not {"Defaults", "Advice"} & rows(plan).keys()


def test_the_end_says_what_comes_next(capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "a run"]) == 0
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line[21:] for line in last] == [
        "mixmo report 'a run'",
        "mixmo predict 'a run' IMAGE…",
        "mixmo export 'a run' --to net.safetensors",
    ]
    assert last[0].startswith("Next ")
    assert last[0] in (open_run("a run").path / "log.txt").read_text()


def test_one_network_of_a_deep_ensemble_is_exported(capsys):
    more = ["--members", "1", "--epochs", "1", "--set", "model.num_nets=2", "--out", "two"]
    assert run(["fit", *TINY, *more]) == 0
    command = capsys.readouterr().out.splitlines()[-1][21:]
    assert command == "mixmo export two/net-1 --to net.safetensors"
    assert run(command.split()[1:]) == 0


def test_curves_are_answered_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("mixmo_fastai.cli.plan.advise", lambda *_: "Do this")
    assert run(["fit", *TINY, "--epochs", "1"]) == 0
    assert rows(capsys.readouterr().out)["Advice"].split() == ["Advice", "Do", "this"]


def test_quiet_and_json_have_the_result_alone(capsys, monkeypatch):
    words = ["fit", *TINY, "--epochs", "1"]
    assert run([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "runs/digits-cut-mixmo-1"
    assert "Time" in rows(err)
    assert "Next" not in rows(err)
    monkeypatch.setattr(speed, "measure_speed", None)  # it would only cost time
    assert run([*words, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not {"Time", "Next", "Advice", "Data"} & rows(out).keys()


@pytest.mark.slow
def test_piped_output_has_no_escapes_and_whole_lines(mixmo):
    command = mixmo("fit", *TINY, "--epochs", "1", environment={"COLUMNS": 40})
    assert command.wait() == 0
    assert "Next" in command.said
    assert "\x1b" not in command.said
    assert any(len(line) > 80 for line in command.said.splitlines())


def test_a_resumed_run_tells_the_time_from_there_on(slow, capsys):
    assert run(["fit", *TINY, "--epochs", "2", "--out", "here", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["fit", "--resume", "here"]) == 0
    assert "remaining" in rows(capsys.readouterr().out)["Time"]


def test_a_terminal_indents_what_it_folds():
    output = Output()
    text = io.StringIO()
    output.console = Console(file=text, width=40, force_terminal=True, highlight=False)
    output.print("Data       many words of which forty columns hold only some")
    output.print_command("Next       mixmo report a/path/that/is/longer/than/a/line")
    first, *others = text.getvalue().splitlines()
    assert first.startswith("Data       many")
    assert all(line.startswith(" " * 11) for line in others[:-1])
    assert others[-1].endswith("longer/than/a/line")


# The bar


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_shows_speed_and_times_from_the_beginning(width, monkeypatch):
    text, shown = io.StringIO(), []
    output = Output()
    output.console = Console(file=text, width=width, force_terminal=True, color_system=None)
    assert run(["fit", *TINY, "--epochs", "2", "--out", "made", "--quiet"]) == 0
    display = TrainingDisplay(output, 16, Speed(1600.0))
    display.progress.live.auto_refresh = False
    started = display._start

    def start():
        started()
        display.progress.refresh()
        shown.append(text.getvalue())

    monkeypatch.setattr(display, "_start", start)
    train(prepare(open_run("made").recipe()), open_run("made"), cbs=[display])
    display.close()
    first = shown[0].splitlines()[-1].rpartition("\x1b[2K")[2]
    assert re.match(r"epoch 1/2 .* 0 % 1,600 images/s elapsed 0:00:00, left 0:00:00$", first)
    assert len(first) == width


def test_the_rate_leaves_out_the_first_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    display = TrainingDisplay(Output(quiet=True), 10)
    display.start_time = display.rate_start_time = 0.0
    assert display._speed() == ""
    display.steps_here, now[0] = 1, 100.0
    display.rate_start_time = 100.0
    assert display._speed() == "0.1 images/s"  # all that is known
    display.steps_here, display.rate_start_time, now[0] = 12, 110.0, 120.0
    assert display._speed() == "10 images/s"
    known = TrainingDisplay(Output(quiet=True), 10, Speed(77.0))
    known.steps_here = 1
    assert known._speed() == "77 images/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (61.4, "0:01:01"), (90_000, "25:00:00"), (10**6, "12 days")],
)
def test_times_of_the_bar_are_short(seconds, text):
    assert format_clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "a few seconds"),
        (42, "about 42 s"),
        (1200, "about 20 min"),
        (4000, "about 67 min"),
        (7000, "about 1.9 h"),
        (60_000, "about 17 h"),
        (3 * 86_400, "about 3 days"),
        (4e8, "about 13 years"),
    ],
)
def test_durations_are_in_their_largest_unit(seconds, text):
    assert estimated_duration(seconds) == text


def test_the_plan_names_the_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["fit", *TINY, "--epochs", "1", "--set", "optimizer.name=adamw", "--lr", "0.002"]
    assert run([*words, "--out", "here"]) == 0
    assert "learning rate 0.002; adamw, weight decay 0.0006" in capsys.readouterr().out
