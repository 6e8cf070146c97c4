"""`examples/own_method.py`: what a program registers is accepted everywhere, and only there."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from commands import FIT, train_small_study
from torch import nn

from mixmo_fastai import MixMoCallback, create_model
from mixmo_fastai.config.choices import MASK_REGIONS, NETWORKS, TRANSFORMS, parse_architecture
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.transforms import build_transform
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "own_method.py"
TABLES = {"diagonal": MASK_REGIONS, "tiny": NETWORKS, "invert": TRANSFORMS}
FLAGS = ["--mix", "diagonal", "--arch", "tiny", "--set", "data.transform=invert"]


@pytest.fixture
def registered(monkeypatch):
    """Import the program, so that its names are known in this test."""
    before = {name: dict(table) for name, table in TABLES.items()}
    spec = importlib.util.spec_from_file_location("own_method", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_method", module)
    spec.loader.exec_module(module)
    yield module
    for name, table in TABLES.items():
        del table[name]
        assert table == before[name]


def test_names_are_known_in_recipes(registered, tmp_path):
    assignments = ["data.transform=invert", "data.transform_options.prob=0.5"]
    recipe = resolve_recipe(
        "digits", None, {"mix.kind": "diagonal", "model.arch": "tiny"}, assignments
    )
    assert (recipe.mix.kind, recipe.model.arch, recipe.data.transform) == (
        "diagonal",
        "tiny",
        "invert",
    )
    (tmp_path / "a.toml").write_text('[mix]\nkind = "diagonal"\n')
    assert load_recipe(tmp_path / "a.toml").mix.kind == "diagonal"
    with pytest.raises(InputError, match="Did you mean 'diagonal'"):
        resolve_recipe("digits", None, {"mix.kind": "diagonl"})


def test_names_are_unknown_without_the_program(tmp_path):
    with pytest.raises(InputError, match="Unknown mask kind 'diagonal'"):
        resolve_recipe("digits", None, {"mix.kind": "diagonal"})
    (tmp_path / "a.toml").write_text('[mix]\nkind = "diagonal"\n')
    with pytest.raises(InputError, match=r"mix\.kind is 'diagonal'"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(InputError, match="Unknown architecture 'tiny'"):
        parse_architecture("tiny")


def test_masks_have_the_ratios(registered):
    generator = torch.Generator().manual_seed(0)
    lam = draw_lam(256, 2, 2.0, generator=generator)
    masks, means = draw_masks("diagonal", lam, (4, 32, 32), generator=generator)
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(256, 1, 32, 32))
    torch.testing.assert_close(means, lam, atol=0.03, rtol=0)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    MixMoCallback("diagonal")  # draws a mask to check it


def test_network_is_converted_with_reproducible_weights(registered):
    first, second = (
        create_model("tiny", 4, 3, 1, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0)
    )
    assert (first.num_members, first.in_channels, first.heads[0].out_features) == (3, 1, 4)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*(encoder.weight for encoder in first.encoders[:2]))
    images = torch.randn(2, 1, 16, 16)
    first.eval()
    torch.testing.assert_close(first.fuse()(images), first(images), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="no pretrained weights for tiny"):
        create_model("tiny", 4, pretrained=True)


def test_own_networks_have_priority(registered, monkeypatch):
    for name in ("wrn10_1", "resnet18"):
        assert parse_architecture(name).family != "registered"
        monkeypatch.setitem(NETWORKS, name, NETWORKS["tiny"])
        assert parse_architecture(name).family == "registered"
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda num_classes: None, "must return a module; it returned NoneType"),
        (lambda: nn.Linear(1, 1), r"cannot be built: TypeError.*\n.*called with the number of"),
    ],
)
def test_wrong_functions_of_networks_are_explained(registered, monkeypatch, build, message):
    monkeypatch.setattr(registered, "tiny", build)
    with pytest.raises(InputError, match=message):
        create_model("tiny", 4)


def test_transform_inverts_a_fraction(registered):
    pixels = torch.full((400, 3, 8, 8), 5, dtype=torch.uint8)
    transform = build_transform("invert", {"prob": 0.25})
    found = transform.function(pixels, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {5, 250}
    assert (found[:, 0, 0, 0] == 250).float().mean().item() == pytest.approx(0.25, abs=0.06)


@pytest.mark.slow
def test_the_program_trains_resumes_evaluates_and_exports(mixmo, tmp_path):
    flags = [flag for flag in FIT if flag not in ("--arch", "wrn10_1")]
    command = mixmo(*flags, "run", *FLAGS, script=SCRIPT)
    assert command.wait() == 0, command.printed
    assert 'kind = "diagonal"' in (tmp_path / "run" / "recipe.toml").read_text()
    for arguments in (
        ["eval", "run", "--save-logits", "logits.npz"],
        ["eval", "run", "--fused"],
        ["export", "run", "--to", "net.safetensors"],
        ["export", "run", "--to", "net.pt2"],
        ["fit", "--resume", "run"],
        ["show", "digits", "--mix", "diagonal", *FLAGS[4:], "--out", "pairs.png"],
        ["report", "run"],
    ):
        command = mixmo(*arguments, script=SCRIPT)
        assert command.wait() == 0, command.printed
    command = mixmo("eval", "run")
    assert command.wait() == 2
    assert "data.transform is 'invert'" in command.printed
    assert "If a program of yours registers it, run that program." in command.printed


@pytest.mark.slow
def test_a_study_compares_the_own_method(mixmo, tmp_path):
    methods = {"cutmix": "model.arch=tiny", "own": "mix.kind=diagonal"}
    train_small_study(mixmo, tmp_path, "tiny", methods, SCRIPT)
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [cell["method"] for cell in study["cells"]] == ["cutmix", "own"]
