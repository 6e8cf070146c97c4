"""Runs of every release can be resumed with this version."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

import mixmo_fastai
from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.cli import run as program
from mixmo_fastai.runs.folder import open_run

RELEASES = Path(__file__).parent / "releases"
VERSIONS = sorted(path.name for path in RELEASES.iterdir() if (path / "recipe.toml").exists())


def test_this_version_has_a_stored_run_if_it_is_released():
    """The run is created by `python tests/releases/make.py`."""
    version = mixmo_fastai.__version__
    assert version in VERSIONS or ".dev" in version


@pytest.mark.parametrize("version", VERSIONS)
def test_stored_run_is_resumed(version, tmp_path, capsys):
    folder = shutil.copytree(RELEASES / version, tmp_path / "run")
    before = open_run(folder).history()
    assert program(["fit", "--resume", str(folder)]) == 0
    assert "1 of 3 epochs and 4 of 8 steps of the next are done" in capsys.readouterr().out
    rows = open_run(folder).history()
    assert rows[:1] == before[:1]
    losses = [float(row["train_loss"]) for row in rows]
    expected = json.loads((folder / "end.json").read_text())["train_losses"]
    # Equal up to the rounding differences between machines and versions of torch.
    assert losses == pytest.approx(expected, rel=0.02)


NAMES_IN_PICKLES = {
    "augment": ["Normalizer", "StoredImages"],
    "muon": ["Muon"],
    "averaging": ["EMACallback"],
    "callback": ["MixMoCallback", "MixMoGuard"],
    "deferred": ["_SmoothLossInPlace"],
    "losses": ["MixMoLoss", "_FunctionLoss"],
    "metrics": ["MemberAccuracy"],
    "models.backbone_core": ["BackboneCore", "GivenFeatures", "_OfThread"],
    "models.mixmo_model": ["MixMoModel"],
    "models.wide_resnet": ["WideBlock", "WideResNetCore"],
    "models.preact_resnet": ["PreActBlock", "PreActResNetCore"],
    "optimizers": ["TorchOptimizer", "_sgd"],
    "parameter_groups": ["ConvertedGroups", "body_and_heads"],
    "per_sample": ["BatchLoss", "FunctionLoss"],
}


@pytest.mark.parametrize("module", NAMES_IN_PICKLES)
def test_names_in_learners_exported_by_version_0_1_0_exist(module):
    imported = importlib.import_module(f"mixmo_fastai.{module}")
    assert all(hasattr(imported, name) for name in NAMES_IN_PICKLES[module])


def test_callbacks_pickled_by_version_0_1_0_are_loaded():
    callback = EMACallback(0.9)
    old = dict(vars(callback))
    old["skipped"], old["trained"] = old.pop("step_skipped"), old.pop("training_tensors")
    loaded = EMACallback.__new__(EMACallback)
    loaded.__setstate__(old)
    assert vars(loaded).keys() == vars(callback).keys()
