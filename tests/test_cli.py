import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_data import write_cifar100, write_image_folder

import mixmo_fastai
from mixmo_fastai.cli import lr_find, run
from mixmo_fastai.cli.progress import TrainingDisplay
from mixmo_fastai.config.choices import DATASETS
from mixmo_fastai.config.load import load_recipe, recipe_names
from mixmo_fastai.config.schema import to_mapping
from mixmo_fastai.data.sources import SOURCES
from mixmo_fastai.runs import checkpoints as store
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.training.lr_find import LrSearch

TINY = ("--arch", "wrn10_1", "--limit", "48", "--batch-size", "16", "--device", "cpu")
FILES = {
    "recipe.toml",
    "environment.json",
    "data.json",
    "history.csv",
    "metrics.json",
    "calibration.json",
    "calibration.safetensors",
    "model.safetensors",
    "checkpoint",
    "log.txt",
}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run of two epochs."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert run(["fit", *TINY, "--epochs", "2", "--quiet", "--out", str(path)]) == 0
    return open_run(path)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_fit_writes_a_complete_run_folder(folder, capsys):
    assert run(["fit", *TINY, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    created_run = open_run(folder / "runs" / "digits-cut-mixmo-1")
    assert names(created_run.path) == FILES
    assert names(folder) == {"runs"}
    assert len(created_run.history()) == 2
    recipe = created_run.recipe()
    assert (recipe.model.arch, recipe.train.epochs, recipe.data.limit) == ("wrn10_1", 2, 48)
    accuracy = created_run.metrics()["test"]["accuracy"]
    for part in (f"{100 * accuracy:.2f} %", "1/2", "2/2", "runs/digits-cut-mixmo-1", "48 training"):
        assert part in out
    assert "143 images; 95 % CI of the accuracy: ±8.2 points" in out
    log = (created_run.path / "log.txt").read_text()
    assert f"{100 * accuracy:.2f} %" in log
    assert "[train]" in log


def test_default_run_folders_are_numbered(folder):
    for _ in range(2):
        assert run(["fit", *TINY, "--epochs", "1", "--quiet"]) == 0
    assert names(folder / "runs") == {"digits-cut-mixmo-1", "digits-cut-mixmo-2"}


def test_only_json_is_on_standard_output(folder, capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--out", "here", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": "here", **open_run("here").metrics()}
    assert "1/1" in err
    assert names(folder) == {"here"}


def test_quiet_prints_only_the_result(capsys):
    arguments = ["fit", *TINY, "--epochs", "1", "--out", "here", "--quiet"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Test accuracy" in out
    assert "1/1" not in out
    assert "1/1" in (open_run("here").path / "log.txt").read_text()


@pytest.mark.slow
def test_flags_and_assignments_reach_the_recipe(trained):
    arguments = ["--members", "3", "--repeat", "2", "--lr", "0.02", "--seed", "4", "--epochs", "1"]
    more = ["--valid-split", "0.2", "--mix", "linear", "--set", "optimizer.nesterov=false"]
    assert run(["fit", *TINY, *arguments, *more, "--out", "here", "--quiet"]) == 0
    recipe = open_run("here").recipe()
    assert (recipe.model.num_members, recipe.mix.batch_repetitions, recipe.lr) == (3, 2, 0.02)
    assert (recipe.train.seed, recipe.data.valid_split, recipe.mix.kind) == (4, 0.2, "linear")
    assert not recipe.optimizer.nesterov
    assert len(open_run("here").metrics()["test"]["member_accuracy"]) == 3


def test_one_member_trains_the_vanilla_network():
    assert run(["fit", *TINY, "--members", "1", "--epochs", "1", "--out", "a", "--quiet"]) == 0
    metrics = open_run("a").metrics()["test"]
    assert metrics["member_accuracy"] == [metrics["accuracy"]]
    assert "disagreement" in metrics["absent"]


def test_eval_prints_the_metrics_of_the_run(trained, capsys):
    assert run(["eval", str(trained.path), "--json"]) == 0
    out, err = capsys.readouterr()
    metrics = json.loads(out)
    assert err == ""
    assert metrics.pop("run") == str(trained.path)
    assert metrics == {name: trained.metrics()[name] for name in metrics}
    parts = {"valid", "test", "test_mean_probabilities", "intervals", "cross_fitted"}
    assert parts <= metrics.keys()
    assert run(["eval", str(trained.path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = next(line.split()[2] for line in lines if line.startswith("Test accuracy "))
    assert accuracy == f"{100 * metrics['test']['accuracy']:.2f}"


def test_resumed_run_equals_an_uninterrupted_one(monkeypatch, capsys):
    arguments = ["fit", *TINY, "--epochs", "3", "--quiet"]
    assert run([*arguments, "--out", "uninterrupted"]) == 0

    after_batch = TrainingDisplay.after_batch

    def interrupt(display):
        after_batch(display)
        if display.learn.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingDisplay, "after_batch", interrupt)
        capsys.readouterr()
        assert run(["fit", *TINY, "--epochs", "3", "--out", "part", "--json"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "mixmo fit --resume part" in err
    assert "Traceback" not in err
    assert len(open_run("part").history()) == 2

    assert run(["fit", "--resume", "part", "--quiet"]) == 0
    uninterrupted, part = open_run("uninterrupted"), open_run("part")
    assert uninterrupted.weights.read_bytes() == part.weights.read_bytes()
    times = ("seconds", "images_per_second")
    rows = [[{**row, **dict.fromkeys(times)} for row in r.history()] for r in (uninterrupted, part)]
    assert rows[0] == rows[1]
    assert uninterrupted.metrics()["test"] == part.metrics()["test"]


def test_run_interrupted_in_the_first_epoch_resumes_from_the_start(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDisplay, "after_batch", interrupt)
        assert run(["fit", *TINY, "--epochs", "1", "--out", "part"]) == 130
    assert "resume with: mixmo fit --resume part" in capsys.readouterr().err
    assert run(["fit", "--resume", "part"]) == 0
    assert (
        "there is no checkpoint yet; training starts from the beginning" in capsys.readouterr().out
    )
    assert (Path("part") / "metrics.json").is_file()


def test_diverging_run_fails_with_advice(capsys):
    assert run(["fit", *TINY, "--epochs", "1", "--lr", "1e30", "--json"]) == 1
    out, err = capsys.readouterr()
    message = err[err.index("Error: ") :]
    assert out == ""
    assert "not finite at step 2 of epoch 1" in message
    assert "--lr 0.00625" in message
    assert "Traceback" not in err
    assert len(message.splitlines()) <= 3


def test_debug_shows_the_traceback_of_a_failure(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("the first line\nthe second\nthe third")

    monkeypatch.setattr("mixmo_fastai.training.prepare.prepare", fail)
    assert run(["fit", *TINY]) == 1
    message = "Error: RuntimeError: the first line\nthe second\nAdd --debug to see the traceback.\n"
    assert capsys.readouterr().err == message
    assert run(["fit", *TINY, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_cifar100_trains_from_the_official_format(tmp_path, monkeypatch):
    source = dataclasses.replace(SOURCES["cifar100"], archive=write_cifar100(tmp_path / "cifar"))
    monkeypatch.setitem(SOURCES, "cifar100", source)
    place = ["--data-dir", str(tmp_path / "cifar"), "--out", "here", "--quiet"]
    arguments = ["fit", "cifar100", *TINY, "--mix", "cutmix", "--epochs", "1", *place]
    assert run(arguments) == 0
    created_run = open_run("here")
    assert created_run.recipe().name == "cifar100/cut-mixmo"
    assert 0 <= created_run.metrics()["test"]["top5"] <= 1
    assert load_file(created_run.weights)


def test_fit_trains_on_an_image_folder(tmp_path):
    root = write_image_folder(tmp_path / "pets", num_train=12, size=(16, 16))
    arguments = ["--arch", "wrn10_1", "--batch-size", "16", "--epochs", "1", "--quiet"]
    assert run(["fit", str(root), *arguments]) == 0
    assert open_run("runs/pets-cut-mixmo-1").recipe().data.dataset == str(root)


@pytest.mark.slow
def test_lr_find_plots_and_suggests_a_learning_rate(folder, capsys):
    assert run(["lr-find", *TINY, "--steps", "40", "--quiet"]) == 0
    assert names(folder) == {"lr-find-digits-cut-mixmo.png"}
    assert (folder / "lr-find-digits-cut-mixmo.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "valley" in out
    assert "lr-find-digits-cut-mixmo.png" in out
    *_, advice, command = out.splitlines()
    assert "learning rate" in advice
    options = "--arch wrn10_1 --limit 48 --batch-size 16 --device cpu --lr "
    assert command.startswith(f"  mixmo fit {options}")
    assert run([*shlex.split(command)[1:], "--epochs", "1", "--quiet", "--out", "trained"]) == 0
    rate = float(command.split()[-1])
    assert open_run("trained").recipe().lr == rate
    assert f"{rate:g}" in advice


def test_lr_find_prints_valid_json_if_the_loss_diverges(folder, capsys):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    arguments = ["--steps", "60", "--start", "1e-4", "--end", "1e6", "--out", "a.png", "--json"]
    assert run(["lr-find", *TINY, *arguments]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert names(folder) == {"a.png"}
    assert set(found["suggestions"]) == {"valley", "slide", "steep", "minimum"}
    assert all(1e-4 / 10 <= rate <= 1e6 for rate in found["suggestions"].values())
    assert len(found["lrs"]) == len(found["losses"]) > 15
    assert found["lrs"] == sorted(found["lrs"])
    assert found["command"].endswith(f"--lr {found['advised_lr']:g}")
    assert found["recipe_lr"] == load_recipe("digits/cut-mixmo").lr
    assert found["noise"] > 0
    if found["flat"]:
        assert found["advised_lr"] == found["recipe_lr"]


def test_lr_find_advises_the_learning_rate_of_the_recipe_on_a_flat_curve(folder, capsys):
    arguments = ["--steps", "40", "--end", "1e-4", "--out", "a.png", "--quiet"]
    assert run(["lr-find", *TINY, *arguments]) == 0
    *_, reason, advice, command = capsys.readouterr().out.splitlines()
    assert reason.startswith("The curve is too flat to recommend a learning rate")
    rate = load_recipe("digits/cut-mixmo").lr
    assert f"the recipe's learning rate, {rate:g}" in advice
    assert "--steps 120" in advice
    assert command.endswith(f"--lr {rate:g}")


@pytest.mark.parametrize(("steps", "advised"), [(40, 120), (5000, 10_000), (10_000, None)])
def test_lr_find_advises_at_most_the_allowed_steps(steps, advised):
    search = LrSearch([1e-4, 1e-3, 1e-2, 1e-1], [2.3] * 4, {})
    remedy = lr_find._advice(search, 0.1, steps)[1]
    assert remedy.startswith("Keep the recipe's learning rate, 0.1")
    assert (f"--steps {advised}." in remedy) == (advised is not None)
    assert ("--steps" in remedy) == (advised is not None)


def test_recipes_are_listed_with_their_accuracies(capsys):
    assert run(["recipes"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(recipe_names()) <= set(rows)
    assert "85.40 %" in rows["cifar100/cut-mixmo"]
    cells = ["cifar100/deep-ensemble", "wrn28_10", "2", "1", "sum", "none", "300", "83.17", "%"]
    assert rows["cifar100/deep-ensemble"].split() == cells
    assert run(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == recipe_names()


def test_recipe_for_images_of_ones_own_is_shown_with_changes(folder, capsys):
    (folder / "mine.toml").write_text('[data]\ndataset = "nowhere/flowers"\n')
    for name in ("fine-tune/cut-mixmo", "mine.toml"):
        assert run(["recipes", name, "--set", "train.epochs=5"]) == 0
        assert "epochs = 5" in capsys.readouterr().out


def test_printed_recipe_can_be_loaded(folder, capsys):
    assert run(["recipes", "cifar100/mimo"]) == 0
    (folder / "mine.toml").write_text(capsys.readouterr().out)
    assert load_recipe("mine.toml") == load_recipe("cifar100/mimo")
    assert run(["recipes", "mine.toml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(json.dumps(to_mapping(load_recipe("cifar100/mimo"))))


def test_datasets_are_listed_with_their_status(tmp_path, capsys):
    assert run(["datasets"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "data") in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "present" in lines["digits"]
    assert "absent" in lines["cifar100"]
    assert run(["datasets", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(DATASETS)


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_module_runs_the_command_line(folder):
    done = python("-m", "mixmo_fastai", "--version", cwd=folder)
    assert done.stdout == f"mixmo {mixmo_fastai.__version__}\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert python("-m", "mixmo_fastai", "fit", "cifra10", cwd=folder).returncode == 2


INVALID_ARGUMENTS = [
    ["fit", "cifra10"],
    ["fit", "--recipe", "cifar100/cutmixmo"],
    ["fit", "--arch", "wrn28_1o"],
    ["fit", "--mix", "cutmx"],
    ["fit", "--set", "train.epocs=3"],
    ["fit", "--set", "data.dataset=cifra10"],
    ["fit", "--epochs", "0"],
    ["fit", "--out", "file/run"],
    ["fit", "--resume", "none"],
    ["lr-find", "cifra10"],
    ["lr-find", "--out", "file"],
    ["eval", "none"],
    ["recipes", "none"],
    ["predict", "none", "file"],
    ["report", "none"],
    ["export", "none", "--to", "net.onnx"],
    ["import", "file", "--arch", "wrn10_1", "--dataset", "imagenet"],
    ["ensemble", "none", "file"],
    ["ensemble", "damaged"],
    ["compare", "damaged", "damaged/"],
    ["fit", "--resume", "damaged"],
    ["fit", "--resume", "future"],
    ["eval", "future", "--ood", "digits"],
    ["eval", "future", "--ood", "cifar10", "--ood", "none"],
    ["eval", "future", "--ood", "folder", "--ood", "./folder/"],
]


def test_invalid_arguments_are_refused_before_torch_is_imported(folder):
    (folder / "file").touch()
    (folder / "folder").mkdir()
    for name in ("damaged", "future"):
        created_run = create_run(load_recipe("digits/cut-mixmo"), folder / name)
        path = CheckpointStore(created_run.checkpoint).save([("state.json", b"{}")])
        if name == "damaged":
            (path / "state.json").unlink()
        else:
            (path / "manifest.json").write_text(store._signed({"format": 99, "files": {}}))
    code = (
        "import sys, mixmo_fastai\n"
        "from mixmo_fastai.cli import run\n"
        "assert run(['--help']) == 0\n"
        "assert run(['recipes']) == 0\n"
        f"for arguments in {INVALID_ARGUMENTS!r}:\n"
        "    assert run(arguments) == 2, arguments\n"
        "    heavy = {'torch', 'fastai', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)\n"
    )
    done = python("-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Error: ") == len(INVALID_ARGUMENTS)
