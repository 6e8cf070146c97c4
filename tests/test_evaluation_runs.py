import json
import shutil

import pytest
import torch
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.compare import compare_runs
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.evaluation.ood import read_ood_images
from mixmo_fastai.evaluation.runs import evaluate_ensemble, evaluate_run
from mixmo_fastai.metrics.bootstrap import paired_intervals
from mixmo_fastai.metrics.ood import UNCERTAINTIES
from mixmo_fastai.metrics.summary import evaluate_logits
from mixmo_fastai.plots import png
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

TINY = resolve_recipe(
    "digits",
    None,
    {"model.arch": "wrn10_1", "train.epochs": 1, "data.limit": 64, "data.valid_split": 0.1},
    ["optimizer.lr=0.05", "train.batch_size=32"],
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train two MixMo runs that differ in their seeds, and a vanilla run."""
    folder = tmp_path_factory.mktemp("runs")
    vanilla = ["mix.kind=sum", "mix.batch_repetitions=1", "model.num_members=1"]
    created = []
    for name, changes in {"a": [], "b": ["train.seed=1"], "vanilla": vanilla}.items():
        recipe = override(TINY, changes)
        run = create_run(recipe, folder / name)
        train(prepare(recipe), run)
        created.append(run)
    return created


def logits_of(run):
    """Compute the logits of a run on the test images, averaged over members."""
    from mixmo_fastai.runs.weights import load_weights

    training = prepare(run.recipe())
    load_weights(training.learn.model, run.weights)
    logits, labels = collect_member_logits(training.learn.model, training.learn.dls[2])
    return logits.mean(dim=1), labels


@pytest.mark.slow
def test_runs_are_the_members_of_the_ensemble(runs):
    metrics = evaluate_ensemble(runs)["test"]
    parts = [logits_of(run) for run in runs]
    expected = evaluate_logits(torch.stack([p for p, _ in parts], dim=1), parts[0][1])
    assert len(metrics["member_accuracy"]) == 3
    assert metrics.pop("member_accuracy") == pytest.approx(expected.pop("member_accuracy"))
    assert metrics == pytest.approx(expected)


def test_ensemble_of_a_run_with_itself_equals_the_run(runs):
    twice, once = evaluate_ensemble([runs[0], runs[0]]), evaluate_run(runs[0])
    for name in ("accuracy", "nll", "brier", "ece"):
        assert twice["test"][name] == pytest.approx(once["test"][name])
    assert twice["test"]["disagreement"] == 0


def test_calibration_uses_the_temperature_of_the_ensemble(runs):
    metrics = evaluate_ensemble(runs[:2])
    assert metrics["calibrated"]["temperature"] == metrics["valid"]["temperature"]


@pytest.mark.slow
def test_ensemble_command(runs, capsys):
    paths = [str(run.path) for run in runs]
    assert program(["ensemble", *paths, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["runs"] == paths
    assert value["test"] == evaluate_ensemble(runs)["test"]
    assert program(["ensemble", *paths]) == 0
    assert "mean of the runs' logits" in capsys.readouterr().out


def test_incompatible_runs_are_refused(runs, tmp_path, capsys):
    with pytest.raises(InputError, match="two runs or more; got 1"):
        evaluate_ensemble(runs[:1])
    other = create_run(override(TINY, ["data.valid_split=0.3"]), tmp_path / "other")
    with pytest.raises(InputError, match=r"data\.valid_split=0\.3"):
        evaluate_ensemble([runs[0], other])
    unfinished = create_run(TINY, tmp_path / "unfinished")
    with pytest.raises(InputError, match="not finished"):
        evaluate_ensemble([runs[0], unfinished])
    assert program(["ensemble", str(runs[0].path), str(tmp_path / "none")]) == 2
    assert "There is no run folder" in capsys.readouterr().err
    assert program(["ensemble", str(runs[0].path), f"{runs[0].path}/"]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.slow
def test_default_validation_split_is_stored_and_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "home"))
    folder = write_image_folder(tmp_path / "pets", num_train=20)
    created = []
    for name, assignments in (("default", []), ("explicit", ["data.valid_split=0.4"])):
        settings = {"model.arch": "wrn10_1", "train.epochs": 1, "data.image_size": 32}
        recipe = resolve_recipe(
            str(folder), None, settings, ["train.batch_size=8", "train.device=cpu", *assignments]
        )
        run = create_run(recipe, tmp_path / name)
        train(prepare(recipe), run)
        created.append(run)
    assert [run.recipe().data.valid_split for run in created] == [0.2, 0.4]
    with pytest.raises(InputError, match=r"data\.valid_split=0\.4; .* has 0\.2"):
        evaluate_ensemble(created)


def test_runs_that_calibrate_on_other_images_are_not_compared(tmp_path, capsys):
    """Without test images, those that calibrate are not among the compared ones."""
    folder = write_image_folder(tmp_path / "pets", num_train=20, num_test=20)
    (folder / "test").rename(folder / "valid")
    paths = [str(tmp_path / select) for select in ("last", "best")]
    for path in paths:
        select = f"train.select={path.rpartition('/')[2]}"
        flags = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "16", "--set", select]
        assert program(["fit", str(folder), *flags, "--device", "cpu", "--out", path]) == 0
    assert program(["compare", *paths]) == 2
    assert "see split.json and data.calibration_split in both" in capsys.readouterr().err
    # What is not evaluated has a reason.
    assert program(["eval", paths[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("calibrated", "sets", "abstention"):
        assert found["absent"][name].startswith("there are no labelled test images"), name
        assert name not in found


def test_runs_of_one_name_are_plotted_with_their_paths(runs, tmp_path, monkeypatch, capsys):
    names = []
    monkeypatch.setattr(png, "plot_comparison", lambda given, *_: names.append(given))
    other = shutil.copytree(runs[0].path, tmp_path / runs[0].path.name)
    monkeypatch.chdir(tmp_path)  # where the picture is written
    assert program(["compare", str(runs[0].path), str(other)]) == 0
    assert program(["compare", str(runs[0].path), str(runs[1].path)]) == 0
    assert names == [[str(runs[0].path), str(other)], [each.path.name for each in runs[:2]]]


def test_ood_images_are_compared_with_the_test_set(runs, tmp_path, capsys):
    write_image_folder(tmp_path / "ood", num_test=6)
    path = str(runs[0].path)
    assert program(["eval", path, "--ood", str(tmp_path / "ood"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ood"]
    assert (found["dataset"], found["num_images"]) == (str(tmp_path / "ood"), 12)
    assert set(found) == {"dataset", "num_images", *UNCERTAINTIES}
    assert found["entropy"].keys() == {"auroc", "auroc_interval", "aupr", "fpr95"}
    # Images need no classes. A network with one member has no mutual information.
    loose = tmp_path / "ood/train/cat"
    assert program(["eval", str(runs[2].path), "--ood", str(loose), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ood"]
    assert found["num_images"] == 4
    assert "mutual_information" in found["absent"]
    assert program(["eval", path, "--ood", str(loose)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"4 images of {loose}"  # the result of --ood comes first
    (entropy,) = [line.split() for line in lines if line.startswith("  entropy")]
    assert entropy[2] == entropy[4] == entropy[7] == entropy[9] == entropy[11] == "%"
    assert lines.index("") < next(i for i, x in enumerate(lines) if x.startswith("Test accuracy"))


def test_several_ood_data_sets_are_a_list_of_what_each_gives_alone(runs, tmp_path, capsys):
    paths = [
        str(write_image_folder(tmp_path / name, num_test=count))
        for name, count in (("long-name-" * 8, 6), ("few", 2))
    ]
    for run in (runs[0], runs[2]):  # two members, one member
        alone = [evaluate_run(run, ood=path)["ood"] for path in paths]
        arguments = ["eval", str(run.path), "--ood", paths[0], "--ood", paths[1]]
        assert program([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ood"] == alone
        assert evaluate_run(run, ood=[paths[1]])["ood"] == alone[1:]
        assert "ood" not in evaluate_run(run, ood=[])

        assert program(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        table = lines[2 : lines.index("", 2)]
        assert sum("AUROC" in line for line in table) == 1
        for entry in alone:
            start = table.index(f"{entry['num_images']} images of {entry['dataset']}")
            block = table[start + 1 : start + 1 + len(UNCERTAINTIES)]
            energy = next(line for line in block if line.startswith("  energy "))
            shown = [float(word) for word in energy.split()[1:] if word not in ("%", "to")]
            found = entry["energy"]
            values = [found["auroc"], *found["auroc_interval"], found["aupr"], found["fpr95"]]
            assert shown == pytest.approx([100 * value for value in values], abs=0.006)
        undefined = [line for line in table if "mutual information: undefined: " in line]
        assert len(undefined) == (run is runs[2])
        assert max(len(line) for line in table if str(tmp_path) not in line) <= 100
        assert table[-1].startswith("AUPR depends on the number of images")


@pytest.mark.parametrize("second", ["{0}", "{0}/", "{0}/../a", "{0}/test", "link"])
def test_ood_images_given_twice_are_refused(runs, second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "a", num_test=2)
    (tmp_path / "link").symlink_to("a")
    ood = ["--ood", "a", "--ood", "cifar10", "--ood", second.format("a")]
    assert program(["eval", str(runs[0].path), *ood]) == 2
    err = capsys.readouterr().err
    assert "Give each data set once" in err
    assert len(err.splitlines()) <= 3


def test_own_folder_of_a_run_is_refused_as_ood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = write_image_folder(tmp_path / "own", num_test=2)
    write_image_folder(tmp_path / "own/others", num_test=2)
    for ood in ("own", "own/", "own/test"):
        with pytest.raises(InputError, match=f"trained on {own}; give --ood another"):
            read_ood_images([ood], str(own), (3, 8, 8))
    (images,) = read_ood_images(["own/others"], str(own), (3, 8, 8))  # another folder in it
    assert images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("ood", "message"),
    [
        ("digits", "trained on digits"),
        ("cifra10", "Did you mean 'cifar10'"),
        ("./none", "no folder './none'"),
        ("empty", "No image was found"),
        ("broken", "a.png"),
    ],
)
def test_unusable_ood_data_is_refused(runs, ood, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"not an image")
    assert program(["eval", str(runs[0].path), "--ood", ood]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) <= 3


@pytest.mark.slow
def test_runs_are_compared_on_the_same_images(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compared = compare_runs(runs)
    logits = [logits_of(run) for run in runs]
    for result, (mean, labels), run in zip(compared, logits, runs, strict=True):
        assert result.metrics == evaluate_run(run)["test"]
        assert result.parameters == run.metrics()["parameters"]
        assert (result.images_seen, result.seconds) == tuple(
            run.metrics()[name] for name in ("images_seen", "seconds")
        )
        if run is not runs[0]:
            expected = paired_intervals(logits[0][0], mean, labels)
            for name, ends in result.differences.items():
                assert ends == pytest.approx(expected[name], abs=1e-6)
                assert ends[0] <= result.metrics[name] - compared[0].metrics[name] <= ends[1] or (
                    name == "ece"  # resampling biases the ECE upwards
                )
    assert compared[0].differences is None

    paths = [str(run.path) for run in runs]
    assert program(["compare", *paths, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [entry["run"] for entry in value["runs"]] == paths
    assert value["runs"][1]["differences"]["nll"] == pytest.approx(compared[1].differences["nll"])
    assert value["runs"][0]["difference"] is None
    nll = compared[1].metrics["nll"] - compared[0].metrics["nll"]
    assert value["runs"][1]["difference"]["nll"] == pytest.approx(nll)
    for result, entry in zip(compared, value["runs"], strict=True):
        low, high = result.intervals["accuracy"]
        assert low <= result.metrics["accuracy"] <= high
        assert entry["intervals"]["nll"] == pytest.approx(result.intervals["nll"])
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert program(["compare", *paths, "--out", "second.png"]) == 0
    out = capsys.readouterr().out
    assert f"Difference from {paths[0]}, 95 % CI (paired bootstrap)" in out
    for result in compared[1:]:
        points = 100 * (result.metrics["accuracy"] - compared[0].metrics["accuracy"])
        low, high = (100 * end for end in result.differences["accuracy"])
        assert f"{points:+.2f} points  ({low:+.2f} to {high:+.2f})" in out
        nll = result.metrics["nll"] - compared[0].metrics["nll"]
        assert f"{nll:+.4f}         ({result.differences['nll'][0]:+.4f} to" in out
    assert f"{compared[2].parameters:,}" in out


def test_runs_on_different_data_are_not_compared(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program(["compare", str(runs[0].path)]) == 2
    assert "two runs or more; got 1" in capsys.readouterr().err
    other = create_run(override(TINY, ["data.dataset=cifar10"]), tmp_path / "other")
    assert program(["compare", str(runs[0].path), str(other.path)]) == 2
    assert "data.dataset='cifar10'" in capsys.readouterr().err
    assert not (tmp_path / "compare.png").exists()
