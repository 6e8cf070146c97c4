"""Output of `mixmo fit` before, during and after training."""

import io
import json
import re

import pytest
from rich.console import Console
from small_data import write_image_folder

from mixmo_fastai.cli import progress, run
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.progress import TrainingDisplay, format_clock
from mixmo_fastai.cli.render import setup_lines
from mixmo_fastai.config.load import override
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime.text import estimated_duration
from mixmo_fastai.training import speed
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.speed import Speed
from mixmo_fastai.training.train import train

TINY = ("--arch", "wrn10_1", "--limit", "48", "--batch-size", "16", "--device", "cpu")


@pytest.fixture(autouse=True)
def working_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def slow_machine(monkeypatch):
    """Simulate a machine that trains half an image per second."""
    monkeypatch.setattr(speed, "measure_speed", lambda training: Speed(0.5))


def rows_by_label(text):
    """Return the rows of a plan or of metrics by their labels."""
    return {line.split()[0]: line for line in text.splitlines() if line[:1].strip()}


def test_plan_shows_the_estimated_time_before_training(slow_machine, capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "here"]) == 0
    out = capsys.readouterr().out
    assert "at 0.5 images/s" in rows_by_label(out)["Time"]
    assert out.index("\nTime ") < out.index(" train loss")


def test_plan_is_short_and_the_log_contains_all_settings(capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "here"]) == 0
    out, log = capsys.readouterr().out, (open_run("here").path / "log.txt").read_text()
    assert len(out.split("\n\n")[0].splitlines()) <= 10
    assert "weight_root=" in log
    assert "weight_root=" not in out
    assert out.split("\n\n")[0] in log


@pytest.mark.slow
def test_hours_on_a_cpu_suggest_a_smaller_training(slow_machine, capsys, monkeypatch):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    arguments = ["fit", *TINY, "--arch", "wrn16_8", "--epochs", "100", "--out", "here"]
    assert run([*arguments, "--precision", "float32"]) == 1  # "auto" would train some steps
    out = capsys.readouterr().out
    assert "about 13 h" in rows_by_label(out)["Time"]
    assert re.search(r"For about 20 minutes: --arch wrn10_4 --epochs \d+\n", out)


@pytest.mark.parametrize("epochs", ["1", "6"])
def test_no_suggestion_for_less_than_an_hour(slow_machine, capsys, epochs, monkeypatch):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    assert run(["fit", *TINY, "--epochs", epochs, "--out", "here"]) == 1
    assert "20 minutes" not in capsys.readouterr().out


def test_image_folder_shows_defaults_and_advice(working_folder, capsys, monkeypatch):
    # Whether a network reaches it on the few validation images depends on rounding.
    monkeypatch.setattr("mixmo_fastai.training.advice.GOOD_ACCURACY", 1.1)
    write_image_folder(working_folder / "pets", num_train=8, size=(72, 72))
    arguments = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    assert run(["fit", "pets", *arguments]) == 0
    out = capsys.readouterr().out
    plan, _, end = out.partition("Run folder:")
    assert rows_by_label(out)["Defaults"].endswith(
        "images scaled to 64x64, chosen for a CPU; change with --set data.image_size=N"
    )
    assert (
        "1,500,000 images seen (here 48) and a width of 2 (here 1)" in rows_by_label(plan)["Advice"]
    )
    assert "--members 1" in rows_by_label(plan)["Advice"]
    assert "use --members 1" in rows_by_label(end)["Advice"]


@pytest.mark.parametrize(
    ("selection", "text"),
    [("last", "721 validation and 355"), ("best", "361 validation, 360 calibration and 355")],
)
def test_the_plan_counts_images_that_only_calibrate(capsys, monkeypatch, selection, text):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    settings = ["--valid-split", "0.5", "--set", f"train.select={selection}", "--epochs", "1"]
    assert run(["fit", *TINY, *settings, "--out", "here"]) == 1
    assert f"48 training, {text} test images" in rows_by_label(capsys.readouterr().out)["Data"]


@pytest.mark.parametrize(("size", "steps"), [("24", "2 steps"), ("48", "1 step")])
def test_the_plan_counts_steps(capsys, monkeypatch, size, steps):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    settings = ["--epochs", "1", "--batch-size", size, "--set", "mix.batch_repetitions=1"]
    assert run(["fit", *TINY, *settings, "--out", "here"]) == 1
    training = rows_by_label(capsys.readouterr().out)["Training"]
    assert f" 1 epoch of {steps} with {size} images" in training


@pytest.mark.parametrize(
    ("requested", "text"),
    [(250, "192 images seen instead of 250, since epochs are whole"), (195, "192 images seen")],
)
def test_the_plan_says_what_whole_epochs_change(capsys, monkeypatch, requested, text):
    monkeypatch.setattr("mixmo_fastai.training.ensemble.train", lambda *_, **__: 1 / 0)
    arguments = ["fit", *TINY, "--set", f"train.images_seen={requested}", "--out", "here"]
    assert run(arguments) == 1
    assert rows_by_label(capsys.readouterr().out)["Training"].endswith(f" images: {text}")


def test_shipped_recipe_shows_no_defaults_or_advice(capsys):
    assert run(["fit", *TINY, "--epochs", "1"]) == 0
    plan = capsys.readouterr().out.split("\n\n")[0]
    assert not {"Defaults", "Advice"} & rows_by_label(plan).keys()


def test_next_commands_are_shown_at_the_end(capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "a run"]) == 0
    last = capsys.readouterr().out.splitlines()[-4:]
    assert [line[21:] for line in last] == [
        "mixmo eval 'a run'",
        "mixmo report 'a run'",
        "mixmo predict 'a run' IMAGE…",
        "mixmo export 'a run' --to net.safetensors",
    ]
    assert last[0].startswith("Next ")
    assert last[0] in (open_run("a run").path / "log.txt").read_text()


def test_next_command_exports_one_network_of_a_deep_ensemble(capsys):
    more = ["--members", "1", "--epochs", "1", "--set", "model.num_nets=2", "--out", "two"]
    assert run(["fit", *TINY, *more]) == 0
    command = capsys.readouterr().out.splitlines()[-1][21:]
    assert command == "mixmo export two/net-1 --to net.safetensors"
    assert run(command.split()[1:]) == 0


def test_advice_from_the_curves_is_shown(capsys, monkeypatch):
    monkeypatch.setattr("mixmo_fastai.cli.plan.advise", lambda *_, **__: "Do this")
    assert run(["fit", *TINY, "--epochs", "1"]) == 0
    assert rows_by_label(capsys.readouterr().out)["Advice"].split() == ["Advice", "Do", "this"]


def test_quiet_and_json_print_only_the_result(capsys, monkeypatch):
    arguments = ["fit", *TINY, "--epochs", "1"]
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "runs/digits-cut-mixmo-1"
    assert "Time" in rows_by_label(err)
    assert "Next" not in rows_by_label(err)
    monkeypatch.setattr(speed, "measure_speed", None)  # must not be called
    assert run([*arguments, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not {"Time", "Next", "Advice", "Data"} & rows_by_label(out).keys()


@pytest.mark.slow
def test_piped_output_has_no_escape_codes_or_wrapped_lines(mixmo):
    command = mixmo("fit", *TINY, "--epochs", "1", environment={"COLUMNS": 40})
    assert command.wait() == 0
    assert "Next" in command.printed
    assert "\x1b" not in command.printed
    assert any(len(line) > 80 for line in command.printed.splitlines())


def test_resumed_run_shows_the_remaining_time(slow_machine, capsys):
    assert run(["fit", *TINY, "--epochs", "2", "--out", "here", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["fit", "--resume", "here"]) == 0
    assert "remaining" in rows_by_label(capsys.readouterr().out)["Time"]


def test_wrapped_lines_are_indented_in_a_terminal():
    output = Output()
    text = io.StringIO()
    output.console = Console(file=text, width=40, force_terminal=True, highlight=False)
    output.print("Data       many words of which forty columns hold only some")
    output.print_command("Next       mixmo report a/path/that/is/longer/than/a/line")
    first, *others = text.getvalue().splitlines()
    assert first.startswith("Data       many")
    assert all(line.startswith(" " * 11) for line in others[:-1])
    assert others[-1].endswith("longer/than/a/line")


# Progress bar


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_progress_bar_starts_with_speed_and_times(width, monkeypatch):
    text, screens = io.StringIO(), []
    output = Output()
    output.console = Console(file=text, width=width, force_terminal=True, color_system=None)
    assert run(["fit", *TINY, "--epochs", "2", "--out", "made", "--quiet"]) == 0
    display = TrainingDisplay(output, 16, Speed(1600.0))
    display.progress.live.auto_refresh = False
    original_start = display._start

    def start():
        original_start()
        display.progress.refresh()
        screens.append(text.getvalue())

    monkeypatch.setattr(display, "_start", start)
    train(prepare(open_run("made").recipe()), open_run("made"), cbs=[display])
    display.close()
    first = screens[0].splitlines()[-1].rpartition("\x1b[2K")[2]
    assert re.match(r"epoch 1/2 .* 0 % 1,600 images/s elapsed 0:00:00, left 0:00:00$", first)
    assert len(first) == width


def test_speed_excludes_the_first_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    display = TrainingDisplay(Output(quiet=True), 10)
    display.start_time = display.rate_start_time = 0.0
    assert display._speed() == ""
    display.steps_here, now[0] = 1, 100.0
    display.rate_start_time = 100.0
    assert display._speed() == "0.1 images/s"  # no later step yet
    display.steps_here, display.rate_start_time, now[0] = 12, 110.0, 120.0
    assert display._speed() == "10 images/s"
    estimated = TrainingDisplay(Output(quiet=True), 10, Speed(77.0))
    estimated.steps_here = 1
    assert estimated._speed() == "77 images/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (61.4, "0:01:01"), (90_000, "25:00:00"), (10**6, "12 days")],
)
def test_times_of_the_progress_bar(seconds, text):
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
def test_durations_in_their_largest_unit(seconds, text):
    assert estimated_duration(seconds) == text


def test_plan_names_the_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", *TINY, "--epochs", "1", "--set", "optimizer.name=adamw", "--lr", "0.002"]
    assert run([*arguments, "--out", "here"]) == 0
    assert "learning rate 0.002; AdamW, weight decay 0.0006" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_dogs", "expected"),
    [
        (10, None),
        (6, None),
        (5, "from 4 training images of 'dog' to 8 of 'cat'; compare by balanced accuracy"),
        (2, "from 1 training image of 'dog' to 8 of 'cat'; compare by balanced accuracy"),
    ],
)
def test_sizes_of_very_different_classes_are_shown(working_folder, num_dogs, expected):
    folder = write_image_folder(working_folder / "pets", num_train=10, size=(16, 16))
    for path in sorted((folder / "train" / "dog").iterdir())[num_dogs:]:
        path.unlink()
    changes = ["data.valid_split=0.2", "train.device=cpu", "train.batch_size=8"]
    recipe = override(resolve_recipe(str(folder)), [*changes, "model.arch=wrn10_1"])
    rows = dict(re.split(" {2,}", line, maxsplit=1) for line in setup_lines(prepare(recipe)))
    weights = "; to weight them equally: --set loss.class_weights=balanced"
    assert rows.get("Classes") == (expected and f"{expected}{weights}")
    assert "Missing" not in rows
    weighted = override(recipe, ["loss.class_weights=balanced"])
    rows = dict(re.split(" {2,}", line, maxsplit=1) for line in setup_lines(prepare(weighted)))
    assert rows.get("Classes") == expected


def test_classes_without_validation_images_are_named(working_folder):
    folder = write_image_folder(working_folder / "pets", num_train=10, size=(16, 16))
    for path in sorted((folder / "train" / "dog").iterdir())[1:]:
        path.unlink()
    changes = ["data.valid_split=0.2", "train.device=cpu", "train.batch_size=8"]
    recipe = override(resolve_recipe(str(folder)), [*changes, "model.arch=wrn10_1"])
    rows = dict(re.split(" {2,}", line, maxsplit=1) for line in setup_lines(prepare(recipe)))
    assert rows["Missing"] == "validation images of 1 of 2 classes: dog"
    without = override(recipe, ["data.valid_split=0"])
    assert not any(line.startswith("Missing") for line in setup_lines(prepare(without)))
    for part in ("train", "valid"):  # named once if the folder has a validation split
        (folder / part / "dog").mkdir(parents=True, exist_ok=True)
        (folder / part / "cat").mkdir(parents=True, exist_ok=True)
    path = folder / "train" / "cat" / "000.png"
    path.rename(folder / "valid" / "cat" / "000.png")
    lines = setup_lines(prepare(recipe))
    assert sum(line.startswith("Missing") for line in lines) == 1
