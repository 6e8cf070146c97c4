"""Run the examples: the notebook in a kernel, the scripts as programs."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import optuna
import pytest
import timm
import torch
from PIL import Image
from processes import TIMEOUT
from run_notebook import NOTEBOOK, is_shown, run_notebook
from safetensors.torch import load_file, save_file
from synthetic import CLASSES, image_arrays
from torchvision.models import resnet50

from mixmo_fastai import MixMoLoss
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights
from mixmo_fastai.mixing.pairing import draw_pairing
from mixmo_fastai.models import create_model
from mixmo_fastai.runs.folder import open_run

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PLAIN_PYTORCH = "mixmo_in_plain_pytorch.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    pixels, labels = image_arrays(24, size=40)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = root / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


@pytest.fixture
def run(mixmo):
    """Return a function that runs a script in the test's folder and returns its output."""

    def run_script(script, *arguments, code=0):
        command = mixmo(*arguments, script=EXAMPLES / script)
        assert command.wait(timeout=5 * TIMEOUT) == code, command.printed
        return command.printed

    return run_script


def test_own_images(run, folder, tmp_path):
    output = run("own_images.py", folder, "--size", 32, "--epochs", 2, "--out", "it")
    assert re.search(r"accuracy \d+\.\d%, per member \d+\.\d%", output)
    assert re.search(rf"png: ({'|'.join(CLASSES)}), probability \d+%", output)
    network = torch.export.load(tmp_path / "it/network.pt2").module()
    assert network(torch.zeros(5, 3, 32, 32)).shape == (5, 3)
    assert (tmp_path / "it/learner.pkl").exists()
    assert (tmp_path / "it/history.csv").read_text().count("\n") >= 3


def test_pretrained_resnet50(run, folder, tmp_path):
    weights = resnet50().state_dict()  # pretrained weights would have to be downloaded
    torch.save(weights, tmp_path / "weights.pth")
    output = run(
        "pretrained_resnet50.py", folder, "--weights", "weights.pth", "--size", 32,
        "--epochs", 1, "--batch-size", 6,
    )  # fmt: skip
    assert float(re.search(r"logits differ by (\S+)", output)[1]) < 1e-4
    plain = torch.load(tmp_path / "resnet50-mixmo.pth")
    resnet50(num_classes=3).load_state_dict(plain)
    assert sum(tensor.numel() for tensor in plain.values()) < sum(
        t.numel() for t in weights.values()
    )


@pytest.fixture
def split_folder(folder, tmp_path):
    """A folder with the images of each class in train/ and test/."""
    for kind in ("train", "test"):
        shutil.copytree(folder, tmp_path / "split" / kind)
    return tmp_path / "split"


@pytest.fixture
def fine_tune(split_folder, tmp_path, monkeypatch):
    """Return a function that calls a function of `fine_tune_learner.py` with arguments."""
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.safetensors")
    page = runpy.run_path(str(EXAMPLES / "fine_tune_learner.py"))
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        common = [
            "split",
            "--arch",
            "test_efficientnet",
            "--weights",
            "weights.safetensors",
            "--size",
            "32",
        ]
        monkeypatch.setattr(sys, "argv", ["", *common, "--limit", "15", *map(str, arguments)])
        return page[name]() if name in ("main", "parse_arguments") else page[name]

    return call


@pytest.mark.parametrize("head", ["linear", "fastai"])
@pytest.mark.parametrize(("method", "epochs"), [("plain", 3), ("cutmix", 3), ("mixmo", 1)])
def test_fine_tune_learner(fine_tune, tmp_path, capsys, head, method, epochs):
    fine_tune(
        "main", "--method", method, "--head", head, "--views", 4, "--batch-size", 6,
        "--lr-mult", 2, "--out", "results.json",
    )  # fmt: skip
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(re.search(r"{.*}", output)[0]) == results
    assert results["fine_tune"] == [epochs, 8e-3, 2]
    assert 0 <= results["accuracy"] <= 1
    assert results["nll"] > 0
    assert results["nll_calibrated"] is None  # 24 test images are too few
    assert "No calibration: only 24 images" in output


@pytest.mark.parametrize("head", ["linear", "fastai"])
def test_fine_tune_learner_starts_from_the_weights(fine_tune, tmp_path, head):
    args = fine_tune("parse_arguments", "--head", head)
    dls, test = fine_tune("make_dataloaders")(args)
    assert (len(dls.train_ds), len(dls.valid_ds), len(test)) == (15, 9, 24)
    assert not {*dls.train_ds.items} & {*dls.valid_ds.items}
    body = fine_tune("make_learner")(dls, args).model[0]
    weights = load_file(tmp_path / "weights.safetensors")
    found = (body.model if head == "fastai" else body).conv_stem.weight
    torch.testing.assert_close(found, weights["conv_stem.weight"])


def test_fine_tune_learner_reports_invalid_arguments(run, fine_tune, tmp_path, capsys):
    output = run("fine_tune_learner.py", "split", "--limit", 2, code=1)
    assert "Error: --limit must be 3 or more" in output
    assert "Traceback" not in output
    save_file({"other": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=r"Error: .*weights.safetensors has no conv_stem.weight"):
        fine_tune("main")
    shutil.rmtree("split/test")
    for flags, message in (
        ([], "split contains no images in train/CLASS/ and test/CLASS/"),
        (["--method", "other"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            fine_tune("parse_arguments", *flags)
        assert message in capsys.readouterr().err


def test_fine_tune_learner_needs_two_epochs(fine_tune, capsys):
    with pytest.raises(SystemExit):
        fine_tune("parse_arguments", "--views", 3)
    assert "--views must leave one epoch frozen" in capsys.readouterr().err


def test_sweep_continues_and_stops_hopeless_trials(run, tmp_path):
    arguments = ["digits", "--epochs", 2, "--arch", "wrn10_1", "--out", "it"]
    output = run("sweep.py", *arguments, "--trials", 2)
    assert re.search(r"NLL \d\.\d{4} with trial [01]: \{'optimizer.lr': ", output)
    output = run("sweep.py", *arguments, "--trials", 1)
    study = optuna.load_study(study_name="mixmo", storage=f"sqlite:///{tmp_path / 'it/optuna.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert study.user_attrs["fixed"] == {"dataset": "digits", "arch": "wrn10_1", "epochs": 2}
    for trial in study.trials:
        folder = open_run(tmp_path / f"it/trial-{trial.number}")
        assert trial.value == pytest.approx(folder.metrics()["valid"]["nll"])
        assert folder.recipe().optimizer.lr == trial.params["optimizer.lr"]
        losses = [float(row["valid_loss"]) for row in folder.history()]
        assert [*trial.intermediate_values.values()] == pytest.approx(losses, rel=1e-4)


def test_sweep_stops_a_trial_that_is_worse_than_the_median(monkeypatch):
    prune = runpy.run_path(str(EXAMPLES / "sweep.py"))["Prune"]
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(1, 0))
    learn = SimpleNamespace(recorder=SimpleNamespace(values=[[0.1, 1.0]]), epoch=0)

    def trained(loss):
        learn.recorder.values.append([0.0, loss])
        trial = study.ask()
        callback = prune(trial)
        callback.learn = learn
        callback.after_epoch()
        study.tell(trial, loss)

    trained(1.0)
    trained(0.5)
    with pytest.raises(optuna.TrialPruned):
        trained(2.0)


@pytest.mark.parametrize(
    "script",
    # The help of those that extend mixmo is that of mixmo.
    [script for script in SCRIPTS if script.name not in ("unmixing.py", "own_method.py")],
    ids=lambda path: path.name,
)
def test_scripts_have_help(script, run):
    output = run(script, "--help")
    first = script.read_text(encoding="utf-8").splitlines()[0].strip('"')
    assert " ".join(first.split()) in " ".join(output.split())


def test_scripts_import_what_they_use():
    """A new interpreter has no modules that other tests imported."""
    source = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path, run_name=path)"
    command = [sys.executable, "-c", source, *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_pytorch_learns_the_digits(run):
    output = run(PLAIN_PYTORCH, "--epochs", 1)
    assert float(re.findall(r"accuracy (\S+)%", output)[-1]) > 90
    assert len((EXAMPLES / PLAIN_PYTORCH).read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("progress", [0.5, 1.0])  # with boxes and ratios; with ratios only
def test_plain_pytorch_loss_equals_that_of_the_package(progress):
    page = runpy.run_path(str(EXAMPLES / PLAIN_PYTORCH))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 2, 0])
    generator = torch.Generator().manual_seed(0)
    model = create_model("wrn10_1", 10, 2, 1, generator=generator).train()
    for seed in range(4):
        torch.manual_seed(seed)
        actual = page["training_loss"](model, x, y, progress)
        torch.manual_seed(seed)
        seen = draw_pairing(4, 2, 4) % 4
        kind = "cutmix" if torch.rand(()) < progress * (1 - progress) * 2 else "linear"
        masks, means = draw_masks(kind, draw_lam(16, 2, 2.0), model.mask_shape(8, 8))
        expected = MixMoLoss()(model(x[seen], masks), y[seen], loss_weights(means, 3.0))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("script", ["own_images.py", "pretrained_resnet50.py"])
def test_scripts_report_invalid_arguments_without_a_traceback(script, run):
    output = run(script, "nowhere", code=2)
    assert "Traceback" not in output
    assert "nowhere contains no class folders" in output


def test_own_images_reports_an_unknown_network(run, folder):
    output = run("own_images.py", folder, "--arch", "resnet19", code=1)
    assert "Traceback" not in output
    assert "Unknown architecture 'resnet19'." in output


def outputs(book):
    return [item for cell in book.cells for item in cell.get("outputs", ())]


def test_notebook_runs(tmp_path):
    visible_outputs = [*filter(is_shown, outputs(run_notebook(tmp_path, quick=True)))]
    assert sum("image/png" in item.get("data", {}) for item in visible_outputs) == 4
    output = "".join(item.get("text", "") for item in visible_outputs)
    differences = re.findall(r"largest difference of a \w+: (\S+)", output)
    assert len(differences) == 2
    assert all(float(difference) < 1e-4 for difference in differences)


def test_notebook_contains_its_outputs():
    """The stored notebook can be read without running it."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell.outputs for cell in cells)
    assert all(map(is_shown, outputs(book)))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|tmp|work)/", text)
    assert len(text) < 400_000
