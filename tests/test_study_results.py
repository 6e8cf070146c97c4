"""Results of a study, from stored predictions and metrics that are made up."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from mixmo_fastai.cli import run as program
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.metrics.bootstrap import resampled_means
from mixmo_fastai.runs.lock import locked
from mixmo_fastai.study.differences import bootstrap_interval, difference, standard_error
from mixmo_fastai.study.execute import Executor
from mixmo_fastai.study.plan import read_study
from mixmo_fastai.study.predictions import Predictions
from mixmo_fastai.study.records import write_record
from mixmo_fastai.study.results import collect_results
from mixmo_fastai.study.tables import legend, markdown, missing_text, table

TEXT = """
name = "made-up"
dataset = "digits"
seeds = [0, 1, 2]
images_seen = [1000]
set = ["model.arch=wrn10_1"]

[methods.plain]
recipe = "digits/vanilla"

[methods.mixed]
recipe = "digits/cut-mixmo"
"""
NUM_IMAGES, NUM_CLASSES = 2000, 4


def random_predictions(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(NUM_IMAGES, NUM_CLASSES, generator=generator, dtype=torch.float64)
    logits[torch.arange(NUM_IMAGES), labels] += 1
    return Predictions.of(logits, labels)


def write_run(out, run, predictions, **changes):
    """Write what the results need of a finished run."""
    folder = run.folder(out).path
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "accuracy": float(predictions.correct.double().mean()),
        "nll": float(predictions.nll.double().mean()),
        "ece": 0.25 + run.seed / 100,
    }
    recorded = {
        "test": metrics,
        "cross_fitted": {"nll": 0.5 + run.seed / 10, "ece": 0.125},
        "parameters": 77_562,
        "seconds": 1800 * (1 + run.seed),
        "images_seen": 960 + run.seed,
        **changes,
    }
    (folder / "metrics.json").write_text(json.dumps(recorded))
    stored = out / "predictions" / f"{run.name}.safetensors"
    stored.parent.mkdir(exist_ok=True)
    stored.write_bytes(predictions.to_bytes())
    write_record(run, out)
    return metrics


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TEXT)
    return read_study(path)


@pytest.fixture
def written(study, tmp_path):
    """A finished study: its folder, and the metrics of each run."""
    out = tmp_path / "out"
    metrics = {
        run.name: write_run(out, run, random_predictions(10 * number))
        for number, run in enumerate(study.runs)
    }
    return out, metrics


def test_cells_equal_an_oracle(study, written):
    out, metrics = written
    plain, mixed = collect_results(study, out)
    assert plain.metrics == {
        "accuracy": tuple(metrics[f"plain-1000-seed{seed}"]["accuracy"] for seed in range(3)),
        "nll": tuple(metrics[f"plain-1000-seed{seed}"]["nll"] for seed in range(3)),
        "ece": (0.25, 0.26, 0.27),
        "nll_calibrated": (0.5, 0.6, 0.7),
        "ece_calibrated": (0.125,) * 3,
    }
    assert (plain.parameters, plain.hours, plain.images_trained) == (77_562, (0.5, 1.0, 1.5), 961)
    assert plain.differences is None
    for name, found in mixed.differences.items():
        first, second = (np.array(cell.metrics[name]) for cell in (plain, mixed))
        assert found.value == pytest.approx(second.mean() - first.mean(), abs=1e-12)
        welch = stats.ttest_ind(second, first, equal_var=False)
        assert found.seeds_interval == pytest.approx(tuple(welch.confidence_interval()))
        assert found.standard_error == pytest.approx(found.value / welch.statistic)
    titles, first, second = table([plain, mixed], "plain")
    assert titles[:4] == ["method", "seeds", "images", "accuracy"]
    assert (first[2], first[-2:]) == ("961", ["77,562", "1.00"])
    assert first[titles.index("NLL, calibrated")] == "0.6000 ± 0.1000"
    assert first[titles.index("NLL - plain")] == "-"
    assert "; seeds " in second[titles.index("NLL - plain")]


def test_the_legend_explains_what_the_table_has(study, written):
    plain, mixed = collect_results(study, written[0])
    assert "Read the wider of the two." in legend([plain, mixed])
    one = {name: replace(each, seeds_interval=None) for name, each in mixed.differences.items()}
    text = legend([plain, replace(mixed, differences=one)])
    assert "Welch" not in text
    assert (
        "95 % bootstrap interval of the difference over test images, and over the seeds of methods "
        "with several; it does not show"
    ) in text
    single = [replace(plain, seeds=(0,)), replace(mixed, seeds=(0,), differences=one)]
    text = legend(single)
    assert text.startswith("One seed, on the test images.")
    assert legend([plain, mixed]).startswith("Means over seeds, ± their standard deviation, on the")
    assert "95 % bootstrap interval of the difference over test images; it does not show" in text
    both = legend([plain, mixed, replace(mixed, differences=one)])
    assert (
        "Read the wider of the two. A single interval is for a method with one seed, or compared"
        in both
    )
    assert "brackets" not in legend([plain])
    assert "Calibrated" in legend([plain])
    values = {name: each for name, each in plain.metrics.items() if "calibrated" not in name}
    assert "Calibrated" not in legend([replace(plain, metrics=values)])


def test_the_legend_explains_unequal_lengths(study, written):
    plain, mixed = collect_results(study, written[0])
    planned = plain.images_planned
    assert planned == plain.images_seen
    plain = replace(plain, images_trained=planned)
    unequal = replace(mixed, images_trained=1.25 * planned)
    assert "a method saw 25 % more images than another" in legend([plain, unequal])
    other_length = replace(unequal, images_seen=2 * planned)
    assert "more images than another" not in legend([plain, other_length])
    each = replace(mixed, images_trained=2 * planned, images_planned=2 * planned)
    text = legend([plain, each])
    assert text.endswith(f'network of {each.method} sees as many images as the title says '
                         '(budget "each").')  # fmt: skip


def test_bins_of_all_seeds_are_an_oracle(study, written):
    out, _ = written
    plain, _ = collect_results(study, out)
    runs = [random_predictions(10 * n) for n, r in enumerate(study.runs) if r.method == "plain"]
    confidence = np.concatenate([each.confidence.double().numpy() for each in runs])
    correct = np.concatenate([each.correct.numpy() for each in runs])
    numbers = np.ceil(confidence * 15).astype(int)
    assert len(plain.reliability) == len(np.unique(numbers))
    for found, number in zip(plain.reliability, np.unique(numbers), strict=True):
        inside = numbers == number
        expected = (confidence[inside].mean(), correct[inside].mean(), inside.sum())
        assert tuple(found) == pytest.approx(expected)


def test_images_are_resampled_in_pairs():
    """An equal difference for every image has an interval without width."""
    first = random_predictions(1)
    nll = {"a": first.nll.double(), "b": first.nll.double() - 0.1}
    samples = [resampled_means({"nll": values})["nll"][None] for values in nll.values()]
    assert bootstrap_interval(*samples) == pytest.approx((-0.1, -0.1), abs=1e-6)


def test_interval_over_images_agrees_with_the_normal_approximation():
    first, second = (random_predictions(seed).nll.double() for seed in (1, 2))
    samples = [resampled_means({"nll": values})["nll"][None] for values in (first, second)]
    low, high = bootstrap_interval(*samples)
    deviation = (second - first).std().item() / NUM_IMAGES**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.08)
    middle = (second - first).mean().item()
    assert (low + high) / 2 == pytest.approx(middle, abs=0.3 * deviation)


def test_seeds_of_both_methods_are_drawn_independently():
    resamples = torch.ones(3, 4000, dtype=torch.float64)
    values = torch.tensor([[0.0], [1.0], [4.0]]) * resamples
    low, high = bootstrap_interval(values, 5 + values)
    means = [np.mean(each) for each in itertools.product((0, 1, 4), repeat=3)]
    differences = [5 + b - a for a in means for b in means]
    expected = np.quantile(differences, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=1 / 3 + 1e-6)
    assert high - low > 4  # equal draws would give no width
    one = values[:1]
    assert bootstrap_interval(one, one + 1) == pytest.approx((1, 1))


def test_single_seeds_have_no_interval_over_seeds():
    samples = (torch.zeros(1, 100).double(), torch.ones(2, 100).double())
    found = difference([0.0], [1.0, 1.0], samples)
    assert (found.value, found.interval) == (1.0, (1.0, 1.0))
    assert found.standard_error is found.seeds_interval is None
    assert standard_error([1.0, 2.0, 3.0], [5.0, 9.0]) == pytest.approx((1 / 3 + 8 / 2) ** 0.5)
    equal = difference([1.0, 1.0], [2.0, 2.0], (samples[1], samples[1]))
    assert (equal.standard_error, equal.seeds_interval) == (0, None)  # too few to tell


@pytest.mark.parametrize("name", ["nll", "correct"])
def test_other_predictions_are_not_used(study, written, name):
    """Stored predictions whose accuracy or NLL is not that of the run are computed again."""
    out, _ = written
    path = out / "predictions" / f"{study.runs[0].name}.safetensors"
    former = Predictions.read(path)
    values = ~former.correct if name == "correct" else 3 * former.nll
    path.write_bytes(replace(former, **{name: values}).to_bytes())
    with pytest.raises(InputError, match="plain-1000-seed0"):  # which has no weights here
        collect_results(study, out)


def test_changed_settings_are_noticed(study, written, tmp_path, capsys):
    out, _ = written
    file = tmp_path / "study.toml"
    file.write_text(TEXT.replace('"model.arch=wrn10_1"', '"model.arch=wrn10_2"'))
    with pytest.raises(InputError, match=r"model\.arch='wrn10_1'; the study now has model"):
        collect_results(read_study(file), out)
    with pytest.raises(
        InputError, match=r"with the data set 'digits'; .* 'photos'\.\nAdd --dataset"
    ):
        collect_results(read_study(file, "photos", must_exist=False), out)
    for arguments in ([], ["--summary"]):
        assert program(["study", str(file), "--out", str(out), *arguments]) == 2
        assert "plain-1000-seed0 was started with model.arch=" in capsys.readouterr().err


def test_files_are_written_from_stored_results(study, written, tmp_path, capsys):
    out, _ = written
    file = tmp_path / "study.toml"
    assert program(["study", str(file), "--out", str(out), "--json", "--reference", "mixed"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["reference"], value["unfinished"]) == ("mixed", 0)
    names = {"study.md", "study.json", "study.html"}
    names |= {"images-trained.png", "parameters.png", "calibration.png"}
    assert names <= {path.name for path in out.iterdir()}
    page = (out / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "2 methods, seeds 0, 1, 2" in page
    assert 'arch = "wrn10_1"' in page.replace("&#34;", '"')
    assert "not finished" not in page
    assert "bars are their standard deviations" in page
    assert "seed = " not in page


def test_runs_of_other_processes_are_left_to_them(study, tmp_path, capsys):
    file, out = tmp_path / "study.toml", tmp_path / "out"
    folders = [run.folder(out).path for run in study.runs]
    for folder in folders:
        folder.mkdir(parents=True)
    with locked(folders[0]), locked(folders[1]), locked(folders[2]):
        file.write_text(TEXT.replace("seeds = [0, 1, 2]", "seeds = [0]"))
        assert program(["study", str(file), "--out", str(out)]) == 0
    assert "No run is finished yet: other processes train them." in capsys.readouterr().out


def test_missing_runs_are_named():
    names = [f"plain-400-seed{seed}" for seed in range(9)]
    assert missing_text(names[:1]).startswith("1 run is not finished and")
    assert missing_text(names[:2]).startswith("2 runs are not finished and")
    assert missing_text(names[:2]).endswith("missing below: plain-400-seed0, plain-400-seed1.")
    assert missing_text(names).endswith("plain-400-seed5 and 3 more.")


def test_finished_runs_of_a_former_method_are_named(study, written, tmp_path, capsys):
    out, _ = written
    file = tmp_path / "study.toml"
    command = ["study", str(file), "--out", str(out), "--summary"]
    assert program(command) == 0
    assert "not in the study" not in capsys.readouterr().out
    file.write_text(TEXT.replace("[methods.mixed]", "[methods.renamed]"))
    (out / "runs" / "begun").mkdir()  # not finished
    assert program(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    names = ", ".join(f"mixed-1000-seed{seed}" for seed in range(3))
    assert f"3 finished runs of the folder are not in the study: {names}. After" in printed
    assert "also rename its files in runs/, predictions/ and recipes/" in printed


def test_the_table_is_printed_although_a_run_failed(written, tmp_path, monkeypatch, capsys):
    def train(self, runs):
        raise RunFailedError("1 of 6 runs failed.\nplain: Error: out of memory")

    monkeypatch.setattr(Executor, "train", train)
    out, _ = written
    assert program(["study", str(tmp_path / "study.toml"), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "| mixed |" in printed.out
    assert "study.html" in printed.out
    assert "out of memory" in printed.err


def test_a_reference_without_runs_is_named(study, written):
    cells = collect_results(study, written[0])
    assert "There are no differences" not in markdown("x", cells, "plain")
    others = [replace(cell, differences=None) for cell in cells if cell.method != "plain"]
    text = markdown("x", others, "plain")
    assert "There are no differences: no run of plain is finished." in text


def test_confidences_and_nll_of_predictions():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).double()
    found = Predictions.of(logits, torch.tensor([0, 1]))
    assert found.confidence.tolist() == [0.75, 0.5]
    assert found.correct.tolist() == [True, False]  # the first of equal classes is predicted
    assert found.nll.tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
