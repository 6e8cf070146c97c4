"""Checkpoints of the published implementation are imported as runs."""

import pickle

import golden
import pytest
import torch

from mixmo_fastai.cli import run
from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.recipe import Expected
from mixmo_fastai.errors import InputError
from mixmo_fastai.models import create_model
from mixmo_fastai.models.reference import import_reference, read_reference_checkpoint
from mixmo_fastai.runs.folder import open_run


def published_names(model):
    """Return a model's tensors by their published names, the inverse of `rename`."""
    names = {}
    multiple = model.num_members > 1
    for name, tensor in model.state_dict().items():
        part, *rest = name.split(".")
        if part == "encoders":
            new = f"list_conv1.{rest[0]}.weight" if multiple else "conv1.weight"
        elif part == "heads":
            new = f"list_fc.{rest[0]}.{rest[1]}" if multiple else f"fc.{rest[1]}"
        elif rest[0] == "bn":
            new = f"bn1.{rest[1]}"
        else:
            tail = ".".join(rest[2:]).replace("shortcut.weight", "shortcut.0.weight")
            new = f"layer{int(rest[1]) + 1}.{tail}"
        names[new] = tensor
    return names


@pytest.fixture(params=[1, 2, 3])
def model(request):
    return create_model("wrn10_1", 10, request.param)


def write(path, model, **extra):
    torch.save({"classifier_state_dict": published_names(model), "epoch": 7, **extra}, path)
    return path


def test_members_and_weights_are_read_from_a_checkpoint(model, tmp_path):
    tensors = read_reference_checkpoint(write(tmp_path / "a.ckpt", model))
    imported = import_reference(tensors, "wrn10_1", 10)
    assert imported.num_members == model.num_members
    expected, actual = model.state_dict(), imported.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@golden.needs_golden
@pytest.mark.parametrize("name", golden.NETWORKS[:3])
def test_imported_network_has_the_published_logits(name, tmp_path):
    path = tmp_path / "published.ckpt"
    torch.save({"classifier_state_dict": golden.published_weights(name)}, path)
    facts, expected = golden.facts(name), golden.arrays(name)
    arch = f"wrn{facts['depth']}_{facts['widen_factor']}"
    imported = import_reference(read_reference_checkpoint(path), arch, facts["num_classes"]).eval()
    with torch.no_grad():
        logits = imported(expected["inputs"][:, 0])
    torch.testing.assert_close(logits, expected["eval_logits"], rtol=1e-4, atol=1e-3)


def test_import_command_creates_a_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ckpt", model)
    assert run(["import", "a.ckpt", "--arch", "wrn10_1", "--dataset", "cifar10", "--out", "r"]) == 0
    assert "mixmo eval r" in capsys.readouterr().out
    recipe = open_run("r").recipe()
    assert (recipe.model.arch, recipe.model.num_members) == ("wrn10_1", model.num_members)
    assert recipe.name == "imported"  # the method is not stored in the file
    assert recipe.expected.accuracy is None
    assert recipe.data.valid_split == 0  # published networks are trained on all training images
    assert open_run("r").weights.is_file()


def test_recipe_must_have_the_same_number_of_members(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ckpt", model)
    arguments = ["import", "a.ckpt", "--arch", "wrn10_1", "--dataset", "cifar10", "--recipe"]
    names = {1: "cifar10/deep-ensemble", 2: "cifar10/mimo"}
    for members, name in names.items():
        matches = members == model.num_members
        assert run([*arguments, name, "--out", f"r{members}"]) == (0 if matches else 2)
        if not matches:
            assert f"The checkpoint has num_members={model.num_members}" in capsys.readouterr().err
    if model.num_members not in names:
        return
    recipe = open_run(f"r{model.num_members}").recipe()
    assert recipe.model.num_nets == 1
    mimo = load_recipe("cifar10/mimo").expected
    assert recipe.expected == (mimo if model.num_members == 2 else Expected())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "wrn16_1", "--dataset", "cifar10"], "is missing"),
        (["--arch", "wrn10_2", "--dataset", "cifar10"], "expected (32,"),
        (["--arch", "wrn10_1", "--dataset", "cifar100"], "expected (100,"),
        (["--arch", "wrn10_1", "--dataset", "cifar"], "must be one of"),
        (["--arch", "wrn11_1", "--dataset", "cifar10"], "6n+4"),
    ],
)
def test_other_networks_are_rejected(model, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ckpt", model)
    assert run(["import", "a.ckpt", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) <= 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


class HarmfulPickle:
    def __reduce__(self):
        return (open, ("harmed", "w"))


def test_code_in_a_pickle_is_rejected_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"classifier_state_dict": HarmfulPickle()}, tmp_path / "torch.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(HarmfulPickle()))
    for name in ("torch.ckpt", "plain.ckpt"):
        with pytest.raises(InputError, match=r"loaded safely|Cannot read"):
            read_reference_checkpoint(tmp_path / name)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_other_files_are_rejected(content, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.ckpt"):
        read_reference_checkpoint(tmp_path / "a.ckpt")


def test_checkpoint_without_network_is_rejected(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="has no tensors under 'classifier_state_dict'"):
        read_reference_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="Cannot read"):
        read_reference_checkpoint(tmp_path / "missing.ckpt")


def test_resuming_an_imported_run_is_rejected(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ckpt", model)
    assert run(["import", "a.ckpt", "--arch", "wrn10_1", "--dataset", "cifar10", "--out", "r"]) == 0
    before = open_run("r").weights.read_bytes()
    assert run(["fit", "--resume", "r"]) == 2
    err = capsys.readouterr().err
    assert "no checkpoint to resume from" in err
    assert len(err.splitlines()) <= 3
    assert open_run("r").weights.read_bytes() == before


def test_non_finite_weights_are_rejected(model, tmp_path):
    model.heads[0].bias.data[0] = float("nan")
    tensors = read_reference_checkpoint(write(tmp_path / "a.ckpt", model))
    with pytest.raises(InputError, match="not finite"):
        import_reference(tensors, "wrn10_1", 10)
