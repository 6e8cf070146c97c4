import gc
import json
import shutil

import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.config.recipe import Expected
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.loaders import ResidentLoader
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.runs import evaluate_ensemble, evaluate_run
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.lock import locked
from mixmo_fastai.training.ensemble import network_recipe, train_nets, train_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow

TINY = resolve_recipe(
    "digits",
    "digits/vanilla",
    {"model.arch": "wrn10_1", "train.epochs": 2, "data.limit": 64, "train.device": "cpu"},
    ["train.batch_size=32", "model.num_nets=3", "data.crop_padding=1", "data.flip=false"],
)
NETWORKS = ["net-1", "net-2", "net-3"]


class Interrupt(Callback):
    """Raise KeyboardInterrupt in an epoch of a network; both are counted from 1."""

    order, run_valid = 100, False

    def __init__(self, network, epoch):
        super().__init__()
        self.target, self.network = (network, epoch), 0

    def before_fit(self):
        self.network += 1

    def after_batch(self):
        if (self.network, self.learn.epoch + 1) == self.target:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    run = create_run(TINY, tmp_path_factory.mktemp("ensemble") / "run")
    lines = []
    train_run(prepare(TINY), run, say=lines.append)
    return run, lines


def weights(run):
    return [(network.path / "model.safetensors").read_bytes() for network in run.networks()]


def test_each_network_has_its_own_run_folder(ensemble):
    run, lines = ensemble
    assert [network.path.name for network in run.networks()] == NETWORKS
    assert not run.weights.exists()
    assert len(set(weights(run))) == 3
    for network, line in zip(run.networks(), lines, strict=True):
        recipe = network.recipe()
        assert recipe.model.num_nets == 1
        # The name and the published accuracy of the ensemble do not apply to one network.
        assert (recipe.name, recipe.title, recipe.expected) == ("", "", Expected())
        assert len(network.history()) == 2
        assert network.metrics()["test"] == evaluate_run(network)["test"]
        assert f"seed {recipe.train.seed}" in line


def test_first_network_equals_a_single_run_of_its_recipe(ensemble, tmp_path):
    single = override(TINY, ["model.num_nets=1", "name=", "title="])
    assert network_recipe(TINY, 0) == single
    run = create_run(single, tmp_path / "single")
    train(prepare(single), run)
    assert run.weights.read_bytes() == weights(ensemble[0])[0]


def test_ensembles_with_different_seeds_have_no_common_network():
    other = override(TINY, ["train.seed=1"])
    seeds = [network_recipe(r, i).train.seed for r in (TINY, other) for i in range(3)]
    assert len(set(seeds)) == 6


def test_metrics_are_those_of_the_ensemble_of_all_networks(ensemble):
    run, _ = ensemble
    metrics, expected = run.metrics(), evaluate_ensemble(run.networks())
    assert {name: metrics[name] for name in expected} == expected
    assert evaluate_run(run) == expected
    parts = [network.metrics() for network in run.networks()]
    accuracies = [part["test"]["accuracy"] for part in parts]
    assert metrics["test"]["member_accuracy"] == pytest.approx(accuracies)
    for name in ("images_seen", "parameters"):
        assert metrics[name] == sum(part[name] for part in parts)
    assert metrics["seconds"] == pytest.approx(sum(part["seconds"] for part in parts), abs=0.11)
    assert metrics["epochs"] == 2


@pytest.mark.parametrize("network_and_epoch", [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_ensemble_is_resumed_at_the_interrupted_network(ensemble, tmp_path, network_and_epoch):
    uninterrupted, _ = ensemble
    run = create_run(TINY, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train_run(prepare(TINY), run, cbs=[Interrupt(*network_and_epoch)])
    network, _ = network_and_epoch
    finished = [n.path / "model.safetensors" for n in run.networks()[: network - 1]]
    times = [path.stat().st_mtime_ns for path in finished]
    assert [n.is_finished for n in run.networks()] == [i < network - 1 for i in range(3)]
    with pytest.raises(InputError, match=f"{network - 1} of 3 networks are finished"):
        evaluate_run(run)
    with pytest.raises(InputError, match=r"has no 'net-9'.\n.*--resume"):
        open_run(run.path / "net-9")

    lines = []
    train_run(prepare(TINY), run, resume=True, say=lines.append)
    networks = [line for line in lines if line.startswith("Network ")]
    assert [line.endswith("finished.") for line in networks] == [i < network - 1 for i in range(3)]
    assert sum(line.startswith("Resuming: ") for line in lines) == 1
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert weights(run) == weights(uninterrupted)
    assert run.metrics()["test"] == uninterrupted.metrics()["test"]


class TestSomeNetworks:
    """Several processes train the networks of one run."""

    ARGUMENTS = (
        *("fit", "digits", "--recipe", "digits/vanilla", "--arch", "wrn10_1", "--epochs", "2"),
        *("--limit", "64", "--batch-size", "32", "--device", "cpu", "--set", "model.num_nets=3"),
        *("--set", "data.crop_padding=1", "--set", "data.flip=false", "--out"),
    )

    def test_networks_trained_apart_equal_those_trained_together(self, ensemble, tmp_path):
        together = ensemble[0]
        run = create_run(TINY, tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            train_nets(prepare(TINY), run, [3], cbs=[Interrupt(1, 2)])
        lines = []
        assert train_nets(prepare(TINY), run, [2], say=lines.append) is None
        assert lines[-1].startswith("1 of 3 networks are finished")
        assert not run.is_finished
        metrics = train_nets(prepare(TINY), run, [3, 1], say=lines.append)
        assert "Resuming: 1 of 2 epochs are done." in lines
        assert weights(run) == weights(together)
        assert metrics == run.metrics()
        for name, value in together.metrics().items():
            assert name == "seconds" or metrics[name] == value, name
        assert (run.path / "calibration.json").exists()
        assert train_nets(prepare(TINY), run, [1]) == metrics  # nothing is left to do

    def test_evaluation_by_another_process_is_left_to_it(self, ensemble, tmp_path):
        run, lines = open_run(shutil.copytree(ensemble[0].path, tmp_path / "run")), []
        (run.path / "metrics.json").unlink()
        with locked(run.path):
            assert train_nets(prepare(TINY), run, [1], say=lines.append) is None
        assert lines[-1] == "All networks are finished; another process evaluates the ensemble."
        assert not run.is_finished
        assert train_nets(prepare(TINY), run, [1])["test"] == ensemble[0].metrics()["test"]

    def test_processes_fill_one_run(self, mixmo, ensemble, tmp_path):
        commands = [
            mixmo(*self.ARGUMENTS, tmp_path / "run", "--nets", str(number)) for number in (1, 2, 3)
        ]
        for command in commands:
            assert command.wait() == 0, command.printed
        run = open_run(tmp_path / "run")
        assert weights(run) == weights(ensemble[0])
        assert run.metrics()["test"] == ensemble[0].metrics()["test"]
        assert sum("Test accuracy" in command.printed for command in commands) >= 1

    def test_launcher_of_several_processes_is_refused(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert program([*self.ARGUMENTS, str(tmp_path / "run"), "--nets", "1"]) == 2
        assert "Start one command per network" in capsys.readouterr().err

    def test_run_is_not_resumed_beside_a_process_that_trains_in_it(
        self, ensemble, tmp_path, capsys
    ):
        run = open_run(shutil.copytree(ensemble[0].path, tmp_path / "run"))
        (run.path / "metrics.json").unlink()
        with locked(run.networks()[2].path):
            assert program(["fit", "--resume", str(run.path)]) == 2
        assert "net-3 is in use" in capsys.readouterr().err

    def test_wrong_use_is_explained(self, ensemble, tmp_path, capsys):
        out = str(tmp_path / "run")
        copy = str(shutil.copytree(ensemble[0].path, tmp_path / "copy"))
        single = str(ensemble[0].networks()[0].path)
        for arguments, message in (
            ([*self.ARGUMENTS[:-1], "--nets", "1"], "--nets needs --out RUN"),
            ([*self.ARGUMENTS, out, "--nets", "0"], "numbered from 1 to 3"),
            ([*self.ARGUMENTS, out, "--nets", "1,4"], "There is no network 4"),
            ([*self.ARGUMENTS, out, "--nets", "1-2"], "takes numbers of networks"),
            (["fit", "--out", out, "--nets", "1"], "--nets is for deep ensembles"),
            (["fit", "--resume", single, "--nets", "1"], "--nets is for deep ensembles"),
            (["fit", "--resume", copy, "--nets", "4"], "There is no network 4"),
            (
                [*self.ARGUMENTS, copy, "--nets", "1", "--seed", "1"],
                "is a run with train.seed=0, not 1.\nUse the same settings",
            ),
        ):
            assert program(arguments) == 2, arguments
            error = capsys.readouterr().err
            assert message in error
            assert len(error.splitlines()) <= 3
        assert not (tmp_path / "run").exists()
        with locked(open_run(copy).networks()[1].path):
            (open_run(copy).networks()[1].path / "metrics.json").unlink()
            assert program(["fit", "--resume", copy, "--nets", "2"]) == 2
            assert "net-2 is in use" in capsys.readouterr().err


def test_resume_after_a_kill_before_the_recipe_was_written(ensemble, tmp_path):
    run = create_run(TINY, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train_run(prepare(TINY), run, cbs=[Interrupt(2, 1)])
    second = run.networks()[1].path
    (second / "recipe.toml").rename(second / ".recipe.toml.tmp")
    train_run(prepare(TINY), run, resume=True)
    assert weights(run) == weights(ensemble[0])


def test_networks_share_one_copy_of_the_data(tmp_path):
    class LoaderCounter(Callback):
        """Count the loaders in memory while a network trains."""

        def __init__(self):
            super().__init__()
            self.counts, self.seeds = [], []

        def before_train(self):
            alive = [o for o in gc.get_objects() if type(o) is ResidentLoader]
            self.counts.append(len(alive))
            self.seeds.append(self.learn.dls.train.seed)

    gc.collect()
    counter, before = LoaderCounter(), sum(type(o) is ResidentLoader for o in gc.get_objects())
    recipe = override(TINY, ["train.epochs=1"])
    train_run(prepare(recipe), create_run(recipe, tmp_path / "run"), cbs=[counter])
    assert counter.counts == [before + 3] * 3  # training, validation and test
    assert len(set(counter.seeds)) == 3


def test_best_epoch_of_each_network_is_recorded(tmp_path):
    recipe = override(TINY, ["train.select=best", "model.num_nets=2"])
    run = create_run(recipe, tmp_path / "run")
    metrics = train_run(prepare(recipe), run)
    assert metrics["selected_epoch"] == [n.metrics()["selected_epoch"] for n in run.networks()]


def test_each_mixmo_network_is_one_member(tmp_path):
    changes = ["model.num_members=2", "model.num_nets=2", "mix.kind=cutmix", "train.epochs=1"]
    recipe = override(TINY, [*changes, "mix.batch_repetitions=2"])
    run = create_run(recipe, tmp_path / "run")
    metrics = train_run(prepare(recipe), run)
    assert len(metrics["test"]["member_accuracy"]) == 2
    assert [len(n.metrics()["test"]["member_accuracy"]) for n in run.networks()] == [2, 2]
    first = load_file(run.networks()[0].weights)
    assert not torch.equal(first["encoders.0.weight"], first["encoders.1.weight"])


def test_later_networks_are_not_trained_on_other_images(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "pets", num_train=10, num_test=4, size=(16, 16))
    flags = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    flags += ["--members", "1", "--set", "model.num_nets=2", "--out", str(tmp_path / "run")]
    assert program(["fit", str(folder), *flags, "--nets", "1"]) == 0
    image = folder / "train" / "cat" / "000.png"
    shutil.copy(image, folder / "train" / "cat" / "zzz.png")
    capsys.readouterr()
    resume = ["fit", "--resume", str(tmp_path / "run")]
    assert program(resume) == 2
    assert "The images (train) differ from those of" in capsys.readouterr().err
    (folder / "train" / "cat" / "zzz.png").unlink()
    assert program(resume) == 0


def test_commands_train_evaluate_and_resume_an_ensemble(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--recipe", "digits/vanilla", "--arch", "wrn10_1", "--limit", "64"]
    options = ["--epochs", "1", "--device", "cpu", "--set", "model.num_nets=2"]
    assert program([*arguments, *options]) == 0
    out = capsys.readouterr().out
    for text in ("2 x wrn10_1", "Network 1 of 2, seed 0", "Network 2 of 2", "Networks "):
        assert text in out
    run = open_run("runs/digits-vanilla-x2-1")
    assert program(["eval", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == run.metrics()["test"]
    assert program(["fit", "--resume", str(run.path)]) == 0
    assert "2 of 2 networks are finished" in capsys.readouterr().out
    assert program(["ensemble", *(str(n.path) for n in run.networks()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == run.metrics()["test"]
    # An ensemble can be part of a larger ensemble.
    assert program(["ensemble", str(run.path), str(run.path / "net-1"), "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["test"]["member_accuracy"]
    assert members == [
        run.metrics()["test"]["accuracy"],
        run.networks()[0].metrics()["test"]["accuracy"],
    ]
