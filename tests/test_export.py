import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import images, run, train_small_run
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from short_runs import TINY, fit

from mixmo_fastai import load_fused
from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.predict import predict_images
from mixmo_fastai.evaluation.runs import evaluate_run
from mixmo_fastai.export import files as export
from mixmo_fastai.export import formats
from mixmo_fastai.export.files import check_export, export_run
from mixmo_fastai.export.header import FORMAT
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_network

__all__ = ["images", "run"]

pytestmark = pytest.mark.slow


DATA = {
    "classes": ["cat", "dog", "fish"],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "image_shape": [3, 8, 8],
}


@pytest.fixture(scope="module")
def fused_file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "net.safetensors"
    export_run(run, path)
    return path


def test_exported_network_equals_the_ensemble(run, fused_file):
    exported, model = load_fused(fused_file), load_network(run)
    x = torch.randn(7, 3, 12, 12)
    with torch.inference_mode():
        torch.testing.assert_close(exported.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert exported.arch == "wrn10_1"
    assert exported.facts == run.data_facts()
    tensors = load_file(fused_file)
    assert tensors["encoder.weight"].shape == (16, 3, 3, 3)
    assert tensors["head.weight"].shape == (3, 64)
    assert not any(name.startswith(("encoders", "heads")) for name in tensors)


def test_onnx_accepts_any_batch_size_and_contains_metadata(run, tmp_path):
    path = tmp_path / "net.onnx"
    result = export_run(run, path)
    assert result["relative_difference"] <= 1e-4
    assert result["num_images"] == 15
    assert result["num_bytes"] == path.stat().st_size
    model, session = load_network(run), onnxruntime.InferenceSession(str(path))
    for batch in (1, 2, 9):
        x = torch.randn(batch, 3, 12, 12)
        with torch.inference_mode():
            expected = model(x).numpy()
        logits = session.run(["logits"], {"images": x.numpy()})[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    info = json.loads(properties["mixmo"])
    assert info["arch"] == "wrn10_1"
    assert info["data"]["classes"] == ["cat", "dog", "fish"]


@pytest.mark.parametrize("arch", ["wrn10_2", "preact_resnet18_1"])
def test_onnx_equals_the_run_for_other_networks(images, tmp_path, arch):
    run = train_small_run(images, tmp_path / "run", **{"model.arch": arch})
    export_run(run, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    x = torch.randn(3, 3, 12, 12)
    with torch.inference_mode():
        expected = load_network(run)(x).numpy()
    logits = session.run(["logits"], {"images": x.numpy()})[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_exported_files_follow_the_umask(run, tmp_path):
    before = os.umask(0o077)
    try:
        export_run(run, tmp_path / "net.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == 0o600
    export_run(run, tmp_path / "other.safetensors")
    assert (tmp_path / "other.safetensors").stat().st_mode & 0o044


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    recipe = override(TINY, ["train.epochs=1", "data.limit=32"])
    created = create_run(recipe, tmp_path_factory.mktemp("digits") / "run")
    fit(created)
    return created


@pytest.mark.parametrize(("name", "value"), [("mean", [0.9]), ("image_shape", [1, 16, 16])])
def test_run_with_changed_data_facts_is_refused(digits_run, tmp_path, name, value):
    """A named data set does not change, so data.json did."""
    run_copy = RunFolder(shutil.copytree(digits_run.path, tmp_path / "run"))
    path = run_copy.path / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(InputError, match=rf"{name} is .* in .*data\.json"):
        export_run(run_copy, tmp_path / "net.onnx")


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    run_copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    tensors = load_file(run_copy.weights)
    tensors["encoders.0.weight"][:] = float("nan")
    save_file(tensors, run_copy.weights)
    with pytest.raises(InputError, match="logits of the run are not finite"):
        export_run(run_copy, tmp_path / "net.safetensors")


def test_file_that_differs_from_the_run_is_not_kept(run, tmp_path, monkeypatch):
    """The written file is checked, so that errors at any step of the export are found."""
    write, read = export._FORMATS[".safetensors"]

    def damage(model, facts, metadata, path):
        with torch.no_grad():
            model.encoder.weight.mul_(1.001)
        write(model, facts, metadata, path)

    monkeypatch.setitem(export._FORMATS, ".safetensors", (damage, read))
    with pytest.raises(InputError, match="must match the run's"):
        export_run(run, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_nan_logits_are_refused():
    bad = torch.full((2, 3), float("nan"))
    with pytest.raises(InputError, match="must match the run's"):
        export._compare(bad, torch.ones(2, 3), 1e-5)


def test_predictions_of_the_exported_network_equal_those_of_the_run(
    run, fused_file, images, capsys
):
    from_run, _ = predict_images(run, [images / "test"])
    from_file, _ = predict_images(load_fused(fused_file), [images / "test"])
    assert [p.label for p in from_file] == [p.label for p in from_run]
    assert [p.probability for p in from_file] == pytest.approx(
        [p.probability for p in from_run], abs=1e-5
    )
    assert all(p.mutual_information is None and p.votes == (p.label,) for p in from_file)
    image = next((images / "test").rglob("*.png"))
    assert program(["predict", str(fused_file), str(image), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["predictions"][0]["label"] in ("cat", "dog", "fish")


def test_fused_evaluation_equals_the_unfused_one(run):
    unfused, fused = evaluate_run(run), evaluate_run(run, fused=True)
    for name in ("accuracy", "nll", "brier", "ece"):
        assert fused["test"][name] == pytest.approx(unfused["test"][name], abs=1e-5)
    assert "ratio_error" in fused["test"]["absent"]
    assert len(fused["test"]["member_accuracy"]) == 1


def test_fused_deep_ensemble_has_one_member_per_network(images, tmp_path, capsys):
    changes = {"model.num_nets": 2, "model.num_members": 2}
    run = train_small_run(images, tmp_path / "two", **changes)
    unfused, fused = evaluate_run(run), evaluate_run(run, fused=True)
    assert fused["test"]["nll"] == pytest.approx(unfused["test"]["nll"], abs=1e-5)
    assert len(fused["test"]["member_accuracy"]) == 2
    for push_to, command in (
        (None, "export RUN/net-1 --to net.onnx"),
        ("hf:me/x", "push RUN/net-1 --to hf:me/x"),
    ):
        message = f"deep ensemble.*\n.*mixmo {command.replace('RUN', str(run.path))}"
        with pytest.raises(InputError, match=message):
            check_export(run, tmp_path / "net.onnx", push_to)
    assert program(["export", f"{run.path}/net-1", "--to", str(tmp_path / "one.safetensors")]) == 0
    assert "same class for 100.00 %" in capsys.readouterr().out


def test_export_command(run, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    assert program(["export", str(run.path), "--to", str(path)]) == 0
    out = capsys.readouterr().out
    assert "wrn10_1" in out
    assert "logits differ by at most" in out
    assert program(["export", str(run.path), "--to", str(path)]) == 2
    assert "exists and was not changed. Choose another --to." in capsys.readouterr().err
    assert program(["eval", str(run.path), "--fused"]) == 0
    assert "fused" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "net.bin"], "must end in .safetensors, .onnx, .pt2"),
        (["--to", "no/such/folder/net.onnx"], "There is no folder 'no/such/folder' for --to"),
        ([], "--to"),
    ],
)
def test_invalid_arguments_are_refused(run, arguments, message, capsys):
    assert program(["export", str(run.path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    assert program(["export", str(run.path), "--to", str(tmp_path / "net.onnx")]) == 2
    assert "ONNX files need onnxruntime." in capsys.readouterr().err


def test_existing_file_is_not_overwritten(run, fused_file):
    before = fused_file.read_bytes()
    with pytest.raises(InputError, match="exists and was not changed"):
        export_run(run, fused_file)
    assert fused_file.read_bytes() == before


def test_tensors_of_another_type_are_refused(fused_file, tmp_path):
    with safe_open(fused_file, "pt") as file:
        metadata = file.metadata()
    half_tensors = {
        name: t.half() if t.is_floating_point() else t for name, t in load_file(fused_file).items()
    }
    save_file(half_tensors, tmp_path / "half.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="its tensors are not those of wrn10_1"):
        load_fused(tmp_path / "half.safetensors")


def test_loading_does_not_use_the_global_generator(fused_file):
    before = torch.get_rng_state()
    model = load_fused(fused_file).model
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def test_failed_write_is_reported(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(formats, "save", fail)
    with pytest.raises(InputError, match=r"Cannot write .*: No space left"):
        export_run(run, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_predict_refuses_the_weights_of_a_run(run, images, capsys):
    assert program(["predict", str(run.weights), str(images)]) == 2
    assert "is not an exported network" in capsys.readouterr().err


def change_metadata(path, tmp_path, **changes):
    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()["mixmo"])
    copy = tmp_path / "changed.safetensors"
    save_file(load_file(path), copy, metadata={"mixmo": json.dumps({**info, **changes})})
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mixmo-fused-9"}, f"format 'mixmo-fused-9'; this version reads {FORMAT}"),
        ({"arch": "wrn16_1"}, "is damaged"),
        ({"arch": "lenet"}, "lenet"),
        ({"arch": "wrn604_999"}, "is damaged"),  # refused before memory is allocated
        ({"arch": None}, "None"),
        ({"data": {"classes": ["a"]}}, "is damaged"),
        ({"data": None}, "is damaged"),
        ({"data": {**DATA, "image_shape": []}}, "image_shape must be"),
        ({"data": {**DATA, "image_shape": [3, 0, 8]}}, "image_shape must be"),
        ({"data": {**DATA, "image_shape": [float("inf"), 8, 8]}}, "is damaged: OverflowError"),
        ({"data": {**DATA, "mean": [0.5, 0.5]}}, "one value per channel"),
        ({"data": {**DATA, "std": [0.2, 0.0, 0.2]}}, "std positive"),
        ({"data": {**DATA, "mean": [0.5, float("nan"), 0.5]}}, "mean must be finite"),
        ({"data": {**DATA, "classes": "abc"}}, "is damaged"),
    ],
)
def test_changed_files_are_refused(fused_file, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load_fused(change_metadata(fused_file, tmp_path, **changes))
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(fused_file, tmp_path, fraction):
    content = fused_file.read_bytes()
    part = tmp_path / "part.safetensors"
    part.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(InputError, match="cannot be read"):
        load_fused(part)


def test_missing_data_is_named(images, tmp_path, capsys):
    moved = tmp_path / "pets"
    shutil.copytree(images, moved)
    run = train_small_run(moved, tmp_path / "run")
    shutil.rmtree(moved)
    assert program(["export", str(run.path), "--to", str(tmp_path / "net.safetensors")]) == 2
    assert "pets" in capsys.readouterr().err
    assert not (tmp_path / "net.safetensors").exists()
