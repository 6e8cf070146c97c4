"""Weights to start from: files of plain networks and of runs, and their pixel statistics."""

import json
import math
import shutil

import pytest
import timm
import torch
from networks import NUM_CLASSES, build_backbone
from safetensors.torch import save_file
from short_runs import fit
from synthetic import mixmo_dls
from test_untrusted import HarmfulPickle
from torch import nn
from torchvision.models import get_model

from mixmo_fastai import mixmo_learner
from mixmo_fastai.config.choices import parse_architecture
from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.config.resolve import override, resolve_recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.export.files import export_run
from mixmo_fastai.export.header import facts_of_exported
from mixmo_fastai.models import create_model
from mixmo_fastai.models.library import pretrained_statistics
from mixmo_fastai.models.pretrained import read_weights
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def plain():
    """A ResNet-18 of five classes with random weights."""
    return build_backbone("resnet18")


def save_torch(values, path):
    torch.save(values, path)
    return path


WRAPPERS = {
    "weights.pth": lambda tensors: tensors,
    "nested.pt": lambda tensors: {"epoch": 3, "state_dict": tensors},
    "twice.bin": lambda tensors: {"model": {"state_dict": tensors}},
    "parallel.ckpt": lambda tensors: {f"module.{n}": t for n, t in tensors.items()},
    "compiled.pth": lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_of_torch_are_read(tmp_path, name):
    tensors = nn.Linear(3, 2).state_dict()
    found = read_weights(save_torch(WRAPPERS[name](tensors), tmp_path / name))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_safetensors_are_read(tmp_path, prefix):
    tensors = nn.Linear(3, 2).state_dict()
    saved = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(saved, tmp_path / "weights.safetensors")
    found = read_weights(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def write_damaged(folder):
    path = folder / "damaged.safetensors"
    path.write_bytes(b"\xff" * 64)
    return path


def write_code(folder):
    return save_torch({"a": HarmfulPickle(folder / "created")}, folder / "code.pth")


def write_text(folder, text):
    path = folder / "text.pth"
    path.write_text(text)
    return path


def write_half(folder):
    path = save_torch({"a": torch.ones(99)}, folder / "half.pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


NOT_WRITTEN = r"cannot be read: it is damaged, incomplete, or was not written by torch.save\.$"
BAD_FILES = {
    "text": (lambda folder: write_text(folder, "hello"), NOT_WRITTEN),
    "page": (lambda folder: write_text(folder, "<!DOCTYPE html>"), NOT_WRITTEN),
    "half": (write_half, NOT_WRITTEN),
    "missing": (lambda folder: folder / "weights.pth", "There is no file of weights"),
    "damaged": (write_damaged, "cannot be read"),
    "code": (write_code, "holds Python objects, which are not loaded"),
    "list": (lambda f: save_torch([1, 2], f / "list.pth"), "holds list, not tensors by name"),
    "value": (
        lambda f: save_torch({"a": torch.ones(1), "b": 2}, f / "value.pth"),
        "holds 'b', which is not a tensor",
    ),
    "nan": (
        lambda f: save_torch({"a.weight": torch.tensor([1.0, math.nan])}, f / "nan.pth"),
        "the weights a.weight are not finite",
    ),
    "suffix": (lambda f: save_torch({}, f / "weights.onnx"), "Known suffixes: .safetensors"),
    "network": (lambda f: save_torch(nn.Linear(1, 1), f / "net.pth"), "holds Python objects"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_other_files_are_refused(tmp_path, kind):
    write, message = BAD_FILES[kind]
    with pytest.raises(InputError, match=message) as caught:
        read_weights(write(tmp_path))
    assert str(caught.value).count("\n") <= 2
    assert not (tmp_path / "created").exists()


def test_plain_network_keeps_its_outputs(tmp_path, plain):
    """With all classes, the converted network computes what the plain one computes."""
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    images = torch.randn(4, 3, 32, 32)
    for members in (1, 2, 3):
        model = create_model("resnet18", NUM_CLASSES, members, weights=path).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_head", [True, False])
def test_head_for_other_classes_is_new(tmp_path, plain, has_head):
    tensors = {n: t for n, t in plain.state_dict().items() if has_head or not n.startswith("fc.")}
    path = save_torch(tensors, tmp_path / "weights.pth")
    random = torch.Generator().manual_seed(0)
    model = create_model("resnet18", 7, weights=path, generator=random)
    torch.testing.assert_close(sum(e.weight for e in model.encoders), plain.conv1.weight)
    assert torch.equal(model.core.body.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    first, second = (head.weight for head in model.heads)
    assert first.shape == (7, 512)
    assert not torch.allclose(first, second, atol=1e-3)  # independent, as of a new network


@pytest.mark.parametrize("is_mixmo", [False, True])
def test_new_heads_are_those_of_torch(tmp_path, is_mixmo):
    """timm's would have weights of up to 0.38 for 7 classes, and a first loss far above log 7."""
    arch = "timm/test_efficientnet"
    build = create_model if is_mixmo else lambda name, k: timm.create_model(name[5:], num_classes=k)
    path = save_torch(build(arch, 5).state_dict(), tmp_path / "weights.pth")
    model = create_model(arch, 7, weights=path, generator=torch.Generator().manual_seed(0))
    for head in model.heads:
        assert 0.9 * 256**-0.5 < head.weight.abs().max() <= 256**-0.5
    assert not torch.allclose(model.heads[0].weight, model.heads[1].weight, atol=1e-3)


def test_grey_images_get_the_sum_over_colours(tmp_path, plain):
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    model = create_model("resnet18", NUM_CLASSES, 2, 1, weights=str(path)).eval()
    grey = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        expected = plain(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model(grey), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_network_are_refused(tmp_path, plain):
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    for arch, difference in (
        ("resnet50", "has no layer1.0.conv3.weight"),
        ("mobilenet_v2", "has no "),
        ("resnet34", "has no layer1.2.conv1.weight"),
    ):
        with pytest.raises(InputError, match=f"belong to another network: it {difference}"):
            create_model(arch, NUM_CLASSES, weights=path)
    narrow = get_model("resnet50", width_per_group=32).state_dict()
    with pytest.raises(InputError, match="has shape"):
        create_model("resnet50", 4, weights=save_torch(narrow, tmp_path / "narrow.pth"))
    larger = save_torch(plain.state_dict() | {"extra": torch.ones(1)}, tmp_path / "larger.pth")
    with pytest.raises(InputError, match="the network has no extra"):
        create_model("resnet18", NUM_CLASSES, weights=larger)


@pytest.mark.parametrize("arch", ["wrn10_1", "preact_resnet18_1", "resnet18"])
@pytest.mark.parametrize("members", [(2, 2), (2, 1), (1, 2), (2, 3), (3, 2)], ids=str)
def test_other_numbers_of_members_keep_the_outputs(tmp_path, arch, members):
    """For equal encoders' inputs and averaged heads, the sum and the mean are what counts."""
    random = torch.Generator().manual_seed(1)
    trained = create_model(arch, 4, members[0], generator=random).eval()
    save_file(
        {n: t.contiguous() for n, t in trained.state_dict().items()}, tmp_path / "w.safetensors"
    )
    model = create_model(arch, 4, members[1], weights=tmp_path / "w.safetensors").eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained(images), rtol=1e-4, atol=1e-5)
    if members[0] == members[1]:
        expected = trained.state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_run_of_other_classes_keeps_its_body(tmp_path):
    trained = create_model("wrn10_1", 4, generator=torch.Generator().manual_seed(1))
    path = save_torch(trained.state_dict(), tmp_path / "w.pth")
    model = create_model("wrn10_1", 6, weights=path)
    assert model.heads[0].out_features == 6
    assert torch.equal(model.encoders[1].weight, trained.encoders[1].weight)
    for arch, channels, message in (
        ("wrn10_2", 3, "it has no core.groups.0.0.shortcut"),
        ("wrn16_1", 3, "it has no core"),
        ("wrn10_1", 1, r"its encoders have shape \(16, 3, 3, 3\), not \(16, 1, 3, 3\)"),
    ):
        with pytest.raises(InputError, match=f"another network: .*{message}"):
            create_model(arch, 4, in_channels=channels, weights=path)


def test_plain_weights_do_not_fit_published_networks(tmp_path, plain):
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights.pth do not belong to wrn10_1.*\n.*of a run"):
        create_model("wrn10_1", 4, weights=path)


@pytest.mark.parametrize("arch", ["wrn10_1", "preact_resnet18_1"])
def test_fused_published_networks_are_loaded(tmp_path, arch):
    """As `mixmo export` writes them: the outputs stay, and heads of other classes are new."""
    trained = create_model(arch, 4, 2, generator=torch.Generator().manual_seed(1)).eval()
    fused, images = trained.fuse(), torch.randn(3, 3, 16, 16)
    save_file(fused.state_dict(), tmp_path / "w.safetensors")
    for members in (1, 2, 3):
        model = create_model(arch, 4, members, weights=tmp_path / "w.safetensors").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), trained(images), rtol=1e-4, atol=1e-5)
    model = create_model(arch, 6, 2, weights=tmp_path / "w.safetensors")
    assert [head.out_features for head in model.heads] == [6, 6]
    torch.testing.assert_close(sum(e.weight for e in model.encoders), fused.encoder.weight)
    with pytest.raises(InputError, match=r"another network: it has no core"):
        create_model("wrn16_1", 4, weights=tmp_path / "w.safetensors")


def test_learner_starts_from_weights(tmp_path, plain):
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    learn = mixmo_learner(mixmo_dls(), "resnet18", weights=str(path))
    summed = sum(encoder.weight for encoder in learn.model.encoders)
    torch.testing.assert_close(summed.detach(), plain.conv1.weight.detach())
    with pytest.raises(InputError, match=r"weights needs arch to be a name; got a network"):
        mixmo_learner(mixmo_dls(), get_model("resnet18"), weights=path)


RECIPE = {
    "name": "tuned",
    "data": {"dataset": "digits", "limit": 48, "valid_split": 0.05},
    "model": {"arch": "resnet18"},
    "train": {"epochs": 1, "batch_size": 32, "device": "cpu"},
}


def with_weights(path, **model):
    return recipe_from_mapping({**RECIPE, "model": {**RECIPE["model"], **model}}, "here"), [
        f"model.weights={path}"
    ]


def test_recipe_starts_from_weights_with_their_statistics(tmp_path, plain):
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    recipe, assignments = with_weights(path)
    training = prepare(override(recipe, assignments))
    summed = sum(encoder.weight for encoder in training.learn.model.encoders)
    expected = plain.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(summed.detach(), expected.detach())
    # The digits are grey: the mean of ImageNet's three channels.
    assert training.source.mean == pytest.approx((sum(IMAGENET[0]) / 3,))
    assert training.source.std == pytest.approx((sum(IMAGENET[1]) / 3,))
    assert prepare(recipe).source.mean != training.source.mean


@pytest.mark.slow
def test_run_starts_from_another_run(tmp_path):
    """The second run has the first one's weights and statistics, and is evaluated with them."""
    first = create_run(recipe_from_mapping({**RECIPE, "model": {"arch": "wrn10_1"}}, "here"),
                       tmp_path / "first")  # fmt: skip
    fit_whole(first)
    facts = json.loads((first.path / "data.json").read_text())
    facts |= {"mean": [0.25], "std": [0.5]}
    (first.path / "data.json").write_text(json.dumps(facts))
    recipe = override(first.recipe(), [f"model.weights={first.weights}", "data.limit=40"])
    training = prepare(recipe)
    assert (training.source.mean, training.source.std) == ((0.25,), (0.5,))
    trained = read_weights(first.weights)
    assert all(
        torch.equal(tensor, trained[name])
        for name, tensor in training.learn.model.state_dict().items()
    )
    second = create_run(recipe, tmp_path / "second")
    fit_whole(second)
    assert json.loads((second.path / "data.json").read_text())["mean"] == [0.25]


def test_fine_tuning_starts_from_a_published_network(tmp_path):
    """As from a run; no library has pretrained weights or statistics of it."""
    trained = create_model("wrn10_1", 10, in_channels=1)
    path = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), path)
    recipe = resolve_recipe(
        "digits", "fine-tune/cut-mixmo", {"model.arch": "wrn10_1"}, [f"model.weights={path}"]
    )
    assert recipe.model.pretrained
    model = prepare(recipe).learn.model
    assert torch.equal(model.heads[0].weight, trained.heads[0].weight)


def fit_whole(run):
    train_run(prepare(run.recipe()), run)


def test_path_of_weights_is_checked_and_absolute(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    save_torch(plain.state_dict(), tmp_path / "weights.pth")
    recipe = resolve_recipe(
        "digits", None, {"model.arch": "resnet18"}, ["model.weights=weights.pth"]
    )
    assert recipe.model.weights == str(tmp_path / "weights.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("other.pth", "there is no file 'other.pth'"),
        ("run", r"'run' is a folder.*\n.*--set model.weights=run/model.safetensors"),
        ("empty", "'empty' is a folder, not a file of weights.$"),
    ):
        with pytest.raises(InputError, match=f"model.weights: {message}"):
            resolve_recipe("digits", None, {"model.arch": "resnet18"}, [f"model.weights={name}"])


def test_weights_without_a_network_are_refused():
    with pytest.raises(InputError, match=r"model.weights='w.pth' needs model.arch"):
        recipe_from_mapping({"model": {"weights": "w.pth"}}, "here")


def test_statistics_of_pretrained_networks():
    for arch, expected in (
        ("resnet50", IMAGENET),
        ("timm/vit_tiny_patch16_224", ((0.5,) * 3, (0.5,) * 3)),
        ("timm/tf_efficientnet_lite0", ((0.5,) * 3, (0.5,) * 3)),
    ):
        assert pretrained_statistics(parse_architecture(arch)) == expected, arch


def test_exported_network_and_unknown_statistics(tmp_path):
    """Statistics come from the header of an exported file; otherwise a note says which are used."""
    run = create_run(recipe_from_mapping({**RECIPE, "model": {"arch": "wrn10_1"}}, "here"),
                     tmp_path / "run")  # fmt: skip
    fit_whole(run)
    export_run(run, tmp_path / "net.safetensors", raw=True)
    mean = tuple(run.data_facts().mean)
    assert facts_of_exported(tmp_path / "net.safetensors").mean == mean
    copy = shutil.copy(run.weights, tmp_path / "copy.safetensors")
    for weights, origin in (
        (tmp_path / "net.safetensors", "of the exported network net.safetensors"),
        (run.weights, f"of the run {run.path}"),
        (copy, "of these images, since none are stored with the weights"),
    ):
        recipe = override(run.recipe(), [f"model.weights={weights}", "data.limit=40"])
        notes = dict(prepare(recipe).source.notes)
        assert notes["Normalised"].endswith(origin)


@pytest.mark.slow
def test_resumed_run_does_not_need_the_weights_it_started_from(tmp_path, plain):
    path = save_torch(plain.state_dict(), tmp_path / "weights.pth")
    recipe, assignments = with_weights(path)
    recipe = override(recipe, [*assignments, "train.epochs=3", "model.arch=resnet18"])
    run = create_run(recipe, tmp_path / "run")
    fit(run, (1, 1))
    expected = run.data_facts()
    path.unlink()
    fit(run, resume=True, prepare=lambda recipe: prepare(recipe, None, run))
    assert run.is_finished
    assert run.data_facts() == expected
