"""Training, evaluation and use of networks for several labels per image, by commands."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import assert_same, fit

from mixmo_fastai.cli.program import run as program
from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.data.decoding import decode_image
from mixmo_fastai.evaluation.runs import evaluate_ensemble, evaluate_run
from mixmo_fastai.export.files import load_fused
from mixmo_fastai.export.hub import FusedClassifier
from mixmo_fastai.metrics.fastai import MemberAccuracy
from mixmo_fastai.metrics.label_results import origin, origin_in_use
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runs.weights import load_network
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.train import train

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue")
_FLAGS = (
    "--arch wrn10_1 --epochs 8 --batch-size 32 --device cpu --threads 1 --valid-split 0.4 "
    "--set data.image_size=8 --quiet"
)
FLAGS = _FLAGS.split()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Write 200 images with each colour in two of five, and a table of their colours."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    rows = ["image,tags,scene"]
    for index in range(200):
        present = random.random(3) < 0.4
        pixels = random.integers(0, 100, (8, 8, 3)) + 150 * present
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        tags = " ".join(name for name, is_on in zip(COLOURS, present, strict=True) if is_on)
        rows.append(f"{index}.png,{tags},{index // 2}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """Train a network with a command, and return its run."""
    path = tmp_path_factory.mktemp("run") / "run"
    assert program(["fit", str(table), *FLAGS, "--out", str(path)]) == 0
    return open_run(path)


def printed(capsys, *arguments):
    assert program([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_network_learns_the_labels(run):
    metrics = run.metrics()
    assert metrics["multi_label"]["mean_ap"] > 0.9
    assert metrics["test"]["accuracy"] > 0.8
    assert run.data_facts().is_multi_label
    assert run.data_facts().classes == ("blue", "green", "red")
    assert not (run.path / "calibration.json").exists()


def test_training_uses_binary_cross_entropy(table):
    recipe = recipe_from_mapping(
        {
            "data": {"dataset": str(table), "image_size": 8},
            "model": {"arch": "wrn10_1"},
            "train": {"epochs": 1, "batch_size": 16, "device": "cpu"},
        },
        "here",
    )
    learn = prepare(recipe).learn
    images, targets = (part.as_subclass(torch.Tensor) for part in learn.dls.valid.one_batch())
    logits = learn.model.eval()(images)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert learn.loss_func(logits, targets).item() == pytest.approx(expected.item())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    values = learn.recorder.values[-1]
    names = [*learn.recorder.metric_names][1:-1]
    assert names[2:] == ["accuracy_multi", MemberAccuracy().name]
    assert len(values) == 4


def test_a_set_of_images_is_in_one_split_with_its_scene(run):
    drawn = json.loads((run.path / "split.json").read_text())["drawn"]
    scenes = [{int(name.split(".")[0]) // 2 for name in drawn[part]} for part in ("train", "test")]
    assert not scenes[0] & scenes[1]


def test_eval_equals_the_metrics_of_training(run, capsys):
    found = json.loads(printed(capsys, "eval", run.path, "--json"))
    stored = run.metrics()
    for name in ("test", "valid", "multi_label", "intervals", "calibrated"):
        assert json.dumps(found[name]) == json.dumps(stored[name]), name
    text = printed(capsys, "eval", run.path)
    for part in ("Test mAP ", "95 % CI of mAP", "F1 ", "Exact match", "Label accuracy", "recall"):
        assert part in text
    rows = text.partition("label  ")[2].splitlines()[1:4]
    assert {row.split()[0] for row in rows} == set(COLOURS)


def test_fused_network_has_the_same_metrics(run):
    plain, fused = evaluate_run(run), evaluate_run(run, fused=True)
    assert fused["test"]["nll"] == pytest.approx(plain["test"]["nll"], rel=1e-5)
    assert fused["multi_label"]["mean_ap"] == pytest.approx(plain["multi_label"]["mean_ap"])


def read_csv(text):
    return [*csv.DictReader(io.StringIO(text))]


def test_predictions_equal_the_network(run, table, capsys):
    rows = read_csv(
        printed(capsys, "predict", run.path, *(table.parent / f"{i}.png" for i in range(9)))
    )
    facts, decisions = run.data_facts(), run.metrics()["multi_label"]
    pixels = torch.stack([decode_image(table.parent / f"{i}.png", (8, 8)) for i in range(9)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    with torch.no_grad():
        logits = load_network(run).eval()((pixels / 255 - mean) / std).double()
    probabilities = (logits / decisions["temperature"]).sigmoid()
    for row, values in zip(rows, probabilities.tolist(), strict=True):
        assert [float(row[f"p:{name}"]) for name in facts.classes] == pytest.approx(
            values, abs=1e-4
        )
        pairs = zip(facts.classes, values, decisions["thresholds"], strict=True)
        assert row["labels"] == "|".join(name for name, p, t in pairs if p > t)
        entropy = -sum(p * np.log(p) + (1 - p) * np.log1p(-p) for p in values)
        assert float(row["entropy"]) == pytest.approx(entropy, abs=1e-3)
        assert float(row["mutual_information"]) >= 0
    raw = read_csv(printed(capsys, "predict", run.path, table.parent / "0.png", "--raw"))[0]
    assert raw["labels"] == rows[0]["labels"]
    assert float(raw["p:red"]) == pytest.approx(float(logits[0, 2].sigmoid()), abs=1e-4)


def test_header_has_the_labels_without_a_readable_image(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert program(["predict", str(run.path), str(tmp_path / "bad.png")]) == 1
    columns = [f"p:{name}" for name in run.data_facts().classes]
    expected = ["image", "labels", "entropy", "mutual_information", *columns]
    assert capsys.readouterr().out.splitlines() == [",".join(expected)]


@pytest.mark.parametrize("suffix", ["safetensors", "onnx"])
@pytest.mark.parametrize("flags", [[], ["--raw"]])
def test_exported_network_predicts_the_same(run, table, tmp_path, capsys, suffix, flags):
    file = tmp_path / f"net.{suffix}"
    text = printed(capsys, "export", run.path, "--to", file, *flags)
    assert "same labels for 100.00 %" in text
    images = [table.parent / f"{i}.png" for i in range(6)]
    expected, found = (
        read_csv(printed(capsys, "predict", name, *images, *extra))
        for name, extra in ((run.path, flags), (file, []))
    )
    for row, other in zip(expected, found, strict=True):
        assert row["labels"] == other["labels"]
        for name in COLOURS:
            assert float(row[f"p:{name}"]) == pytest.approx(float(other[f"p:{name}"]), abs=1e-4)
        assert other["mutual_information"] == ""
    expected, found = (
        read_csv(printed(capsys, "predict", name, *images, "--raw")) for name in (run.path, file)
    )
    for row, other in zip(expected, found, strict=True):
        assert row["labels"] == other["labels"]
        for name in COLOURS:
            assert float(row[f"p:{name}"]) == pytest.approx(float(other[f"p:{name}"]), abs=1e-4)


def test_hub_folder_states_labels_and_thresholds(run, tmp_path, capsys):
    printed(capsys, "push", run.path, "--to", tmp_path / "pushed")
    config = json.loads((tmp_path / "pushed/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert len(config["labels"]["thresholds"]) == 3
    card = (tmp_path / "pushed/README.md").read_text()
    assert "which of 3 labels an image has" in card
    assert "| mAP |" in card
    assert "--coverage" not in card
    loaded = load_fused(tmp_path / "pushed")
    model = FusedClassifier.from_pretrained(tmp_path / "pushed")
    assert model.facts == loaded.facts
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), loaded.model(images))
    model.save_pretrained(tmp_path / "again")
    assert load_fused(tmp_path / "again").labels == loaded.labels
    assert json.loads((tmp_path / "again/config.json").read_text()) == config


def test_card_and_report_describe_the_thresholds_of_predictions(run, tmp_path, capsys):
    """Without test images, the metrics are those at 0.5, but predictions use other thresholds."""
    copy = open_run(shutil.copytree(run.path, tmp_path / "run"))
    metrics = copy.metrics()
    chosen = {"thresholds": [0.4, 0.5, 0.6], "temperature": 0.647}
    changes = {"thresholds_from": "default", "temperature": 1.0, "deployed": chosen}
    metrics["multi_label"] |= changes
    copy.write_metrics(metrics)
    printed(capsys, "push", copy.path, "--to", tmp_path / "pushed")
    text = "at the thresholds with the best F1 on the evaluated images themselves"
    card = (tmp_path / "pushed/README.md").read_text()
    assert f"Labels are predicted {text}" in card
    assert "The logits contain the temperature 0.647" in card
    config = json.loads((tmp_path / "pushed/config.json").read_text())
    assert config["labels"]["thresholds"] == chosen["thresholds"]
    assert origin_in_use(metrics["multi_label"]).startswith(text)
    assert origin_in_use(run.metrics()["multi_label"]) == origin(run.metrics()["multi_label"])


def test_report_shows_labels(run, tmp_path, capsys):
    printed(capsys, "report", run.path, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in ("Average precision by label", "Test mAP", "Precision and recall of all labels"):
        assert text in page
    assert "prediction set" not in page.lower()
    assert 'id="labels"' in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "RUN", "IMAGE", "--coverage", "0.9"], "are for one label per image"),
        (["eval", "RUN", "--ood", "digits"], "mixmo eval --ood is for one label per image"),
        (["eval", "RUN", "--corruptions", "built-in"], "mixmo eval --corruptions is for one"),
        (["eval", "RUN", "--coverage", "0.8"], "mixmo eval --coverage is for one label"),
        (["eval", "RUN", "--max-risk", "0.1"], "mixmo eval --max-risk is for one label"),
        (["calibrate", "RUN"], "mixmo calibrate is for one label per image"),
        (["compare", "RUN", "OTHER"], "mixmo compare is for one label per image"),
        (["export", "RUN", "--to", "NEW.onnx", "--int8"], "--int8 is for one label per image"),
    ],
)
def test_what_needs_one_label_is_refused(run, table, tmp_path, capsys, arguments, message):
    names = {"RUN": run.path, "IMAGE": table.parent / "0.png", "NEW.onnx": tmp_path / "n.onnx"}
    if "OTHER" in arguments:
        names["OTHER"] = shutil.copytree(run.path, tmp_path / "other")
    assert program([str(names.get(word, word)) for word in arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_deep_ensemble_and_several_runs(table, run, tmp_path, capsys):
    flags = [*FLAGS, "--members", "1", "--set", "model.num_nets=2", "--epochs", "2"]
    assert program(["fit", str(table), *flags, "--out", str(tmp_path / "nets")]) == 0
    metrics = open_run(tmp_path / "nets").metrics()
    assert len(metrics["multi_label"]["member_mean_ap"]) == 2
    assert program(["fit", str(table), *FLAGS, "--seed", "1", "--out", str(tmp_path / "b")]) == 0
    found = evaluate_ensemble([run, open_run(tmp_path / "b")])
    assert found["multi_label"]["mean_ap"] > 0.9
    text = printed(capsys, "ensemble", run.path, tmp_path / "b")
    assert "Test mAP" in text
    assert str(tmp_path / "b") in text


@pytest.mark.parametrize("stop_at", [(0, 1), (1, 1)], ids=str)
def test_resumed_run_equals_an_uninterrupted_one(table, tmp_path, stop_at):
    recipe = recipe_from_mapping(
        {
            "name": "labels",
            "data": {"dataset": str(table), "image_size": 8, "limit": 24},
            "model": {"arch": "wrn10_1"},
            "train": {"epochs": 3, "batch_size": 32, "device": "cpu", "select": "best"},
        },
        "here",
    )
    whole, stopped = (create_run(recipe, tmp_path / name) for name in ("whole", "stopped"))
    fit_steps(whole)
    fit_steps(stopped, stop_at)
    assert not stopped.is_finished
    fit(stopped, resume=True)
    assert_same(whole, stopped)


def fit_steps(run, stop_at=None):
    if stop_at is None:
        train(prepare(run.recipe()), run)
    else:
        fit(run, stop_at)


@pytest.mark.parametrize(
    "settings",
    [
        ["--set", "data.loader=streaming"],
        ["--set", "data.loader=streaming", "--set", "data.transform=randaugment"],
        ["--set", "data.transform=random-resized-crop", "--set", "data.crop_from=original"],
        ["--msda", "cutmix"],
        ["--members", "3", "--mix", "linear"],
    ],
    ids=" ".join,
)
def test_labels_are_trained_with_every_loader_and_mixing(table, tmp_path, settings):
    flags = [*FLAGS, "--epochs", "1", "--set", "data.num_workers=0", *settings]
    assert program(["fit", str(table), *flags, "--out", str(tmp_path / "run")]) == 0
    assert open_run(tmp_path / "run").metrics()["multi_label"]["mean_ap"] > 0.2


def test_study_refuses_several_labels_before_training(table, tmp_path, capsys):
    study = tmp_path / "study.toml"
    study.write_text(
        'name = "labels"\ndataset = "digits"\nseeds = [0]\nimages_seen = [100]\n'
        '[methods.a]\nrecipe = "digits/vanilla"\n[methods.b]\nrecipe = "digits/mimo"\n'
    )
    arguments = ["study", str(study), "--dataset", str(table), "--out", str(tmp_path / "out")]
    assert program(arguments) != 0
    assert "mixmo study is for one label per image" in capsys.readouterr().err
    assert not [*tmp_path.rglob("model.safetensors")]
