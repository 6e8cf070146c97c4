"""Studies: their files, the training of their runs, and their results."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.lines import Line2D
from pages import STUDY, TEXTS, blocks, command_lines
from PIL import Image
from safetensors.torch import load_file

from mixmo_fastai.cli import run as program
from mixmo_fastai.errors import InputError
from mixmo_fastai.plots import study as plots
from mixmo_fastai.plots.png import MAX_TICKS, format_size, size_ticks
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.study.plan import read_study
from mixmo_fastai.study.results import collect_results
from mixmo_fastai.study.tables import markdown
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

SMALL = """
name = "tiny"
dataset = "digits"
seeds = [0, 1]
images_seen = [400, 800]
set = [
  "model.arch=wrn10_1", "data.limit=40", "train.batch_size=8", "data.valid_split=0",
  "train.device=cpu", "train.precision=float32",
]

[methods.vanilla]
recipe = "digits/vanilla"

[methods.cut-mixmo]
recipe = "digits/cut-mixmo"
images_seen = [800]

[methods.ensemble]
recipe = "cifar10/deep-ensemble"
set = ["mix.msda=cutmix"]
seeds = [0]
images_seen = [800]
budget = "each"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SMALL)
    return path


class TestFile:
    def test_runs_are_planned(self, file):
        study = read_study(file)
        assert study.methods == ("vanilla", "cut-mixmo", "ensemble")
        assert [run.name for run in study.runs] == [
            "vanilla-400-seed0",
            "vanilla-400-seed1",
            "vanilla-800-seed0",
            "cut-mixmo-800-seed0",
            "ensemble-800-seed0",
            "vanilla-800-seed1",
            "cut-mixmo-800-seed1",
        ]
        recipes = {run.name: run.recipe for run in study.runs}
        assert {recipe.data.limit for recipe in recipes.values()} == {40}
        assert {recipe.train.epochs for recipe in recipes.values()} == {None}
        assert recipes["vanilla-400-seed1"].train.seed == 1
        ensemble = recipes["ensemble-800-seed0"]
        assert (ensemble.data.dataset, ensemble.mix.msda) == ("digits", "cutmix")
        assert (ensemble.model.num_nets, ensemble.train.images_seen) == (2, 1600)

    def test_networks_share_the_images_by_default(self, file):
        file.write_text(SMALL.replace('budget = "each"\n', ""))
        runs = {run.name: run for run in read_study(file).runs}
        assert runs["ensemble-800-seed0"].recipe.train.images_seen == 800

    def test_data_set_is_replaced(self, file, tmp_path):
        (tmp_path / "images").mkdir()
        study = read_study(file, str(tmp_path / "images"))
        assert {run.recipe.data.dataset for run in study.runs} == {str(tmp_path / "images")}

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("seeds = [0, 1]", "sedes = [0, 1]", "unknown key 'sedes'. Did you mean 'seeds'"),
            ("seeds = [0, 1]", "seeds = 3", "study.toml: seeds is '3'; it must be a list"),
            ("seeds = [0]", "seeds = 3", "methods.ensemble.seeds is '3'; it must be a list"),
            (
                '"train.batch_size=8"',
                '"train.seed=8"',
                "set contains train.seed.\nUse the study's seeds",
            ),
            ('"mix.msda=cutmix"', '"data.dataset=x"', "ensemble.set contains data.dataset.\n"),
            ("seeds = [0, 1]", "seeds = [1, 1]", "without repetitions"),
            ("seeds = [0, 1]", "seeds = [true]", "list of integers"),
            ("images_seen = [400, 800]\n", "", "study.toml: images_seen is missing"),
            ("images_seen = [400, 800]\n", "images_seen = [0]\n", "integers from 1 to"),
            ('recipe = "digits/vanilla"', "", "methods.vanilla.recipe is missing"),
            (
                'recipe = "digits/vanilla"',
                'recipe = "digits/vanila"',
                "study.toml: methods.vanilla: There is no recipe 'digits/vanila'",
            ),
            ("seeds = [0, 1]", f"seeds = [0, {2**63}]", "list of integers from 0 to 9223372"),
            ('budget = "each"', 'budget = "half"', "budget is 'half'; it must be 'in all' or"),
            ('"mix.msda=cutmix"', '"mix.msda=cutmax"', "methods.ensemble: mix.msda is 'cutmax'"),
            ('"mix.msda=cutmix"', '"msda"', "methods.ensemble 'msda': write section.key=value"),
            ('set = ["mix.msda=cutmix"]', "set = [1]", "list of assignments"),
            ('set = ["mix.msda=cutmix"]', 'set = ["data.image_size=4"]', "data.image_size differs"),
            ("[methods.vanilla]", '[methods."a b"]', "names consist of"),
            ("[methods.vanilla]", "[methods.vanilla", "not valid TOML"),
            ('name = "tiny"', "name = 3", "name is '3'; it must be a string"),
            ('name = "tiny"', 'name = "../x"', "name is '../x'; it may contain letters"),
        ],
    )
    def test_mistakes_are_explained(self, file, old, new, message):
        assert SMALL.count(old) >= 1
        file.write_text(SMALL.replace(old, new, 1))
        with pytest.raises(InputError) as error:
            read_study(file)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) <= 3

    def test_missing_files_and_methods_are_named(self, file, tmp_path):
        with pytest.raises(InputError, match=r"absent\.toml' cannot be read"):
            read_study(tmp_path / "absent.toml")
        file.write_text('name = "empty"\n')
        with pytest.raises(InputError, match="has no methods"):
            read_study(file)


ROOT = Path(__file__).resolve().parents[1]


def test_studies_of_docs_and_examples_are_valid(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    texts = blocks(TEXTS[STUDY], "toml")
    for file in sorted((ROOT / "examples").glob("*.toml")):
        texts.append(file.read_text(encoding="utf-8"))
    (tmp_path / "lite0.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for content, num_runs in zip(texts, (18, 5, 81, 33, 5, 15, 8, 63, 4), strict=True):
        (tmp_path / "study.toml").write_text(content)
        study = read_study(tmp_path / "study.toml", str(tmp_path / "images"))
        assert len(study.runs) == num_runs


def test_commands_of_the_docs_are_valid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in command_lines(TEXTS[STUDY]):
        assert program(line) == 2
        assert "cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study whose runs are trained in this process, and whose results the command wrote."""
    folder = tmp_path_factory.mktemp("study")
    file = folder / "study.toml"
    file.write_text(SMALL)
    study, out = read_study(file), folder / "out"
    for planned in study.runs:
        training = prepare(planned.recipe)
        train_run(training, create_run(training.recipe, out / "runs" / planned.name))
    assert program(["study", str(file), "--out", str(out), "--quiet"]) == 0
    return study, out, file


@pytest.mark.slow
class TestResults:
    def test_all_runs_are_finished_and_ordinary(self, trained):
        study, out, _ = trained
        for run in study.runs:
            folder = RunFolder(out / "runs" / run.name)
            assert folder.is_finished
            seen = folder.metrics()["images_seen"]
            total = run.images_seen * (2 if run.method == "ensemble" else 1)
            # To the nearest epoch, which has 40 inputs, or 160 with four repetitions.
            per_epoch = 160 if run.method == "cut-mixmo" else 40
            assert abs(seen - total) <= per_epoch / 2 * (2 if run.method == "ensemble" else 1)
            assert folder.recipe().train.seed == run.seed

    def test_cells_hold_the_metrics_of_the_runs(self, trained):
        study, out, _ = trained
        cells = collect_results(study, out)
        assert [(cell.method, cell.images_seen, cell.seeds) for cell in cells] == [
            ("vanilla", 400, (0, 1)),
            ("vanilla", 800, (0, 1)),
            ("cut-mixmo", 800, (0, 1)),
            ("ensemble", 800, (0,)),
        ]
        vanilla, mixmo, ensemble = cells[1:]
        runs = [RunFolder(out / "runs" / f"cut-mixmo-800-seed{seed}") for seed in (0, 1)]
        values = [run.metrics()["test"]["accuracy"] for run in runs]
        assert list(mixmo.metrics["accuracy"]) == values
        assert mixmo.mean("accuracy") == pytest.approx(sum(values) / 2)
        assert mixmo.spread("accuracy") == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert ensemble.spread("accuracy") is None
        assert {"nll", "ece", "nll_calibrated", "ece_calibrated"} <= mixmo.metrics.keys()
        assert vanilla.differences is None
        for cell in (mixmo, ensemble):
            for name, found in cell.differences.items():
                difference = cell.mean(name) - vanilla.mean(name)
                assert found.value == pytest.approx(difference)
                assert found.interval[0] <= difference <= found.interval[1]
        assert ensemble.differences["nll"].standard_error is None

    def test_stored_predictions_are_those_of_the_present_runs(self, trained):
        study, out, _ = trained
        cells = collect_results(study, out)
        stored = out / "predictions" / "vanilla-400-seed0.safetensors"
        before = stored.read_bytes()
        stored.write_bytes((out / "predictions" / "cut-mixmo-800-seed0.safetensors").read_bytes())
        assert collect_results(study, out) == cells
        assert stored.read_bytes() == before

    def test_predictions_equal_the_metrics_of_the_run(self, trained):
        study, out, _ = trained
        for cell in collect_results(study, out):
            assert cell.split == "test"
            bins = cell.reliability
            assert sum(each.images for each in bins) == 355 * len(cell.seeds)
            correct = sum(each.accuracy * each.images for each in bins)
            assert correct / (355 * len(cell.seeds)) == pytest.approx(cell.mean("accuracy"))
            if len(cell.seeds) == 1:
                gaps = [abs(each.accuracy - each.confidence) * each.images for each in bins]
                assert sum(gaps) / 355 == pytest.approx(cell.mean("ece"), abs=1e-3)
                stored = load_file(out / "predictions" / "ensemble-800-seed0.safetensors")
                assert stored["nll"].mean().item() == pytest.approx(cell.mean("nll"))

    def test_results_need_no_weights_once_predictions_are_stored(self, trained, tmp_path):
        study, out, _ = trained
        shutil.copytree(out, tmp_path / "out")
        for run in study.runs:
            folder = tmp_path / "out" / "runs" / run.name
            for file in folder.iterdir():
                if file.name != "metrics.json":
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        assert collect_results(study, tmp_path / "out") == collect_results(study, out)

    def test_another_reference_reverses_the_differences(self, trained):
        study, out, _ = trained
        forward = collect_results(study, out)[2].differences["nll"]
        cells = collect_results(study, out, reference="cut-mixmo")
        backward = cells[1].differences["nll"]
        assert backward.value == pytest.approx(-forward.value)
        assert backward.standard_error == pytest.approx(forward.standard_error)
        assert cells[0].differences is None  # the reference was not trained for 400 images
        with pytest.raises(InputError, match="Methods: vanilla, cut-mixmo, ensemble"):
            collect_results(study, out, reference="mimo")

    def test_files_of_the_results(self, trained):
        _, out, _ = trained
        text = (out / "study.md").read_text()
        assert "## 400 images seen" in text
        assert "not finished" not in text
        rows = [line for line in text.splitlines() if line.startswith("| cut-mixmo")]
        assert len(rows) == 1
        assert rows[0].count("|") == text.splitlines()[4].count("|")
        values = json.loads((out / "study.json").read_text())
        assert values["unfinished"] == 0
        assert len(values["cells"]) == 4
        for name in ("images-trained.png", "parameters.png", "calibration.png"):
            with Image.open(out / name) as picture:
                assert picture.width > 800

    def test_summary_trains_nothing(self, trained, tmp_path, capsys):
        study, out, file = trained
        copied = tmp_path / "out"
        (copied / "runs").mkdir(parents=True)
        for run in study.runs[:3]:
            (copied / "runs" / run.name).symlink_to(out / "runs" / run.name)
        assert program(["study", str(file), "--out", str(copied), "--summary", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["unfinished"] == 4
        assert "4 runs are not finished" in (copied / "study.md").read_text()
        empty = tmp_path / "empty"
        assert program(["study", str(file), "--out", str(empty), "--summary"]) == 2
        assert "There is no folder" in (message := capsys.readouterr().err)
        assert "is finished yet" in message
        assert not empty.exists()

    def test_a_tilde_in_paths_is_the_home_folder(self, trained, tmp_path, monkeypatch, capsys):
        _, out, file = trained
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "study.toml").symlink_to(file)
        (tmp_path / "home" / "out").symlink_to(out)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        assert program(["study", "~/study.toml", "--out=~/out", "--summary"]) == 0
        assert str(tmp_path / "home" / "out" / "study.html") in capsys.readouterr().out.replace(
            "\n", ""
        )
        assert not (tmp_path / "~").exists()

    def test_a_finished_study_is_not_trained_again(self, trained, capsys):
        _, out, file = trained
        recorded = out / "runs" / "vanilla-400-seed0" / "metrics.json"
        before = recorded.stat().st_mtime_ns
        assert program(["study", str(file), "--out", str(out)]) == 0
        assert "training" not in capsys.readouterr().out.partition("# tiny")[0]
        assert recorded.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "limits",
    [(0.9e6, 1.1e6), (3e5, 3e6), (1e3, 1e9), (7e4, 9e4), (2_748_890, 2_751_892), (5, 5)],
)
def test_ticks_are_round_and_few(limits):
    ticks = size_ticks(*limits)
    assert 1 <= len(ticks) <= MAX_TICKS
    assert all(limits[0] * 0.99 <= tick <= limits[1] * 1.01 for tick in ticks)
    assert all(float(f"{tick:.3g}") == tick for tick in ticks)
    assert format_size(1_500_000.0) == "1.5 M"


def test_ticks_do_not_overlap():
    assert size_ticks(0.84e6, 1.7e6) == [0.9e6, 1e6, 1.5e6]
    for ratio in (1.2, 1.5, 2, 5, 30, 1000):
        ticks = size_ticks(1.1e6, ratio * 1.1e6)
        assert len(ticks) >= 2
        assert all(after / before >= ratio ** (1 / 8) for before, after in pairwise(ticks))


@pytest.mark.slow
def test_markdown_without_spread_and_differences(trained):
    study, out, _ = trained
    cells = [cell for cell in collect_results(study, out) if cell.method == "ensemble"]
    cells = [replace(cell, differences=None) for cell in cells]
    (row,) = [line for line in markdown("x", cells, "vanilla").splitlines() if "| ensemble" in line]
    assert "±" not in row
    assert row.count("| - ") == 2


def made_up_cells(*methods_and_images):
    """Return what plots need of the cells of a study, one for each method and number of images."""
    return [
        SimpleNamespace(
            method=method,
            images_seen=images,
            images_trained=images,
            split="test",
            metrics={"accuracy": (0.5,)},
            mean=lambda name: 0.5,
            spread=lambda name: None,
            reliability=(),
        )
        for method, images in methods_and_images
    ]


def test_nearly_equal_sizes_look_nearly_equal(monkeypatch, tmp_path):
    """1.500 and 1.504 million images are not drawn at opposite ends of a picture."""
    limits = []
    monkeypatch.setattr(plots, "_save", lambda figure, axes, path: limits.append(axes.get_xlim()))
    cells = made_up_cells(("cutmix", 1_499_904), ("cut-mixmo", 1_504_000))
    plots.plot_study(cells, tmp_path / "study.png")
    ((low, high),) = limits
    assert 2 <= high / low < 4
    assert low < min(cell.images_trained for cell in cells)


def test_a_method_has_one_colour_in_all_plots(monkeypatch, tmp_path):
    """Also where it has no run of the longest training, or is not the first to have one."""
    colours = []

    def collect(figure, axes, path):
        handles, labels = axes.get_legend_handles_labels()
        lines = [handle if isinstance(handle, Line2D) else handle.lines[0] for handle in handles]
        colours.append({name: line.get_color() for name, line in zip(labels, lines, strict=True)})

    monkeypatch.setattr(plots, "_save", collect)
    cells = made_up_cells(("b", 400), ("a", 400), ("b", 800))
    methods = ("z", "a", "b")
    plots.plot_study(cells, tmp_path / "all.png", methods=methods)
    plots.plot_study(cells[2:], tmp_path / "longest.png", methods=methods)
    plots.plot_calibration(cells[2:], tmp_path / "calibration.png", methods=methods)
    assert list(colours[0]) == ["a", "b"]
    assert colours[0]["a"] != colours[0]["b"]
    assert colours[1] == colours[2] == {"b": colours[0]["b"]}
