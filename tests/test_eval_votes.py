"""`mixmo eval --label-distribution`: the metrics of a run against the votes of annotators."""

import json

import numpy as np
import oracle_metrics as oracle
import pytest
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.evaluation.runs import evaluate_run, open_finished
from mixmo_fastai.runs.folder import RunFolder

pytestmark = pytest.mark.slow

FLAGS = ["--arch", "wrn10_1", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--quiet"]
MEANS = ("cross_entropy", "kl_divergence", "brier", "total_variation")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a run on the digits, with 200 validation images for its temperature."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    flags = [*FLAGS, "--limit", "64", "--valid-split", "0.14"]
    assert program(["fit", "digits", *flags, "--out", str(folder)]) == 0
    return RunFolder(folder)


@pytest.fixture(scope="module")
def logits(run):
    """Return the ensemble's logits (N, K) and the labels of the test images, in float64."""
    finished = open_finished(run)
    ((member_logits, labels),) = finished.logits([finished.final_loader()])
    return member_logits.double().mean(dim=1).numpy(), labels.numpy()


@pytest.fixture(scope="module")
def counts(logits):
    """Draw 20 votes per image, of which about nine in ten are for its label."""
    random = np.random.default_rng(0)
    return np.stack([random.multinomial(20, 0.9 * np.eye(10)[y] + 0.01) for y in logits[1]])


def evaluate(capsys, run, file, *flags):
    arguments = ["eval", str(run.path), "--label-distribution", str(file), *flags]
    assert program([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_means(found, logits, distributions, names):
    expected = oracle.label_distribution(logits, distributions)
    for name in names:
        assert found[name] == pytest.approx(expected[name].mean(), abs=1e-5), name
        low, high = found["intervals"][name]
        assert low < found[name] < high


def test_metrics_are_those_of_the_run_before_and_after_scaling(
    run, logits, counts, tmp_path, capsys
):
    np.save(tmp_path / "counts.npy", counts)
    metrics = evaluate(capsys, run, tmp_path / "counts.npy")
    found, distributions = metrics["label_distribution"], counts / 20
    check_means(found, logits[0], distributions, [*MEANS, "vote_agreement"])
    temperature = metrics["calibrated"]["temperature"]
    assert temperature != pytest.approx(1, abs=0.05)
    assert found["calibrated"]["temperature"] == temperature
    check_means(found["calibrated"], logits[0] / temperature, distributions, MEANS)
    assert found["calibrated"].keys() == {*MEANS, "temperature", "intervals"}
    size = len(counts)
    assert (found["num_images"], found["num_without_votes"]) == (size, 0)
    assert (found["num_votes"], found["source"]) == (20 * size, str(tmp_path / "counts.npy"))
    assert found["label_agreement"] == pytest.approx(distributions[range(size), logits[1]].mean())
    entropies = oracle.label_distribution(logits[0], distributions)["label_entropy"]
    assert found["label_entropy"] == pytest.approx(entropies.mean())
    assert "absent" not in found
    python = evaluate_run(run, label_distribution=tmp_path / "counts.npy")
    assert python["label_distribution"] == found


def test_votes_are_matched_by_image_and_images_without_votes_left_out(
    run, logits, counts, tmp_path, capsys
):
    random = np.random.default_rng(1)
    size = len(counts) - 30
    votes = [
        f"{image},w{image}-{number},{label}"
        for image in range(size)
        for number, label in enumerate(np.repeat(np.arange(10), counts[image]))
    ]
    rows = [votes[i] for i in random.permutation(len(votes))]
    (tmp_path / "votes.csv").write_text("\n".join(["image,annotator,label", *rows]))
    found = evaluate(capsys, run, tmp_path / "votes.csv")["label_distribution"]
    check_means(found, logits[0][:size], counts[:size] / 20, [*MEANS, "vote_agreement"])
    assert (found["num_images"], found["num_without_votes"]) == (size, 30)
    assert (found["num_votes"], found["layout"]) == (20 * size, "one row per vote")
    np.save(tmp_path / "probabilities.npy", counts / 20)
    found = evaluate(capsys, run, tmp_path / "probabilities.npy")["label_distribution"]
    assert "probabilities instead of numbers" in found["absent"]["num_votes"]


def test_result_is_printed_with_a_warning_about_the_order(run, counts, tmp_path, capsys):
    np.save(tmp_path / "counts.npy", counts)
    flags = ["eval", str(run.path), "--label-distribution", str(tmp_path / "counts.npy")]
    assert program(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    size = len(counts)
    assert f"one row per image: {20 * size:,} votes (20.0 per image) for {size} test" in lines[2]
    assert not any("Warning" in line for line in lines)
    assert sum(line.startswith(("cross-entropy", "total variation")) for line in lines) == 2
    np.save(tmp_path / "counts.npy", np.roll(counts, 1, axis=1))
    assert program(flags) == 0
    assert "check the order of rows and classes" in capsys.readouterr().out


@pytest.mark.parametrize("test_name", ["test", "valid"])
def test_images_of_folders_are_matched_by_path(test_name, tmp_path, capsys):
    """Without test images, the votes are on the validation images, and nothing is calibrated."""
    folder = write_image_folder(
        tmp_path / "pets", num_train=20, num_test=6, size=(8, 8), test_name=test_name
    )
    flags = [str(folder), *FLAGS, "--data-dir", str(tmp_path / "data"), "--valid-split", "0.1"]
    assert program(["fit", *flags, "--out", str(tmp_path / "run")]) == 0
    text = f"image,dog,cat\ndog/005.png,3,1\n{test_name}/cat/002.png,0,2\n"
    (tmp_path / "votes.csv").write_text(text)
    run, data = RunFolder(tmp_path / "run"), ["--data-dir", str(tmp_path / "data")]
    capsys.readouterr()
    metrics = evaluate(capsys, run, tmp_path / "votes.csv", *data)
    found = metrics["label_distribution"]
    finished = open_finished(run, tmp_path / "data")
    names = [finished.final_images.name(index) for index in range(12)]
    chosen = [names.index(f"{test_name}/{name}.png") for name in ("cat/002", "dog/005")]
    ((member_logits, _),) = finished.logits([finished.final_loader()])
    logits = member_logits.double().mean(dim=1).numpy()[chosen]
    expected = oracle.label_distribution(logits, np.array([[1, 0], [0.25, 0.75]]))
    for name in MEANS:
        assert found[name] == pytest.approx(expected[name].mean(), abs=1e-5)
    assert (found["num_images"], found["num_without_votes"]) == (2, 10)
    assert found["absent"]["calibrated"] == metrics["absent"]["calibrated"]
    arguments = ["eval", str(run.path), *data, "--label-distribution"]
    assert program([*arguments, str(tmp_path / "votes.csv")]) == 0
    split = {"test": "test", "valid": "validation"}[test_name]
    output = capsys.readouterr().out
    assert f"6 votes (3.0 per image) for 2 {split} images; 10 without votes" in output
    assert "calibrated: undefined" in output
    (tmp_path / "votes.csv").write_text(text + "train/cat/002.png,0,1\n")
    assert program([*arguments, str(tmp_path / "votes.csv")]) == 2
    error = capsys.readouterr().err
    assert "line 4" in error
    assert "'train/cat/002.png' is not in the" in error
    np.save(tmp_path / "votes.npy", np.ones((12, 2)))
    assert program([*arguments, str(tmp_path / "votes.npy")]) == 2
    assert "no official order" in capsys.readouterr().err
