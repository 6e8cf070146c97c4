"""Export to 8-bit integers: accuracy before and after, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from exports import images, run

from mixmo_fastai import load_fused
from mixmo_fastai.cli import run as program
from mixmo_fastai.data.image_sets import no_images
from mixmo_fastai.data.run_data import read_source
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.predict import predict_images
from mixmo_fastai.export import int8
from mixmo_fastai.export.files import export_run
from mixmo_fastai.export.int8 import Quantised, check_drop, layer_errors, module_names, quantise

__all__ = ["images", "run"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def int8_file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    return path, export_run(run, path, max_drop=100.0)


def test_convolutions_and_linear_layers_are_quantised(int8_file):
    network = onnx.load(int8_file[0])
    weights = {tensor.name: tensor.data_type for tensor in network.graph.initializer}
    by_output = {name: node for node in network.graph.node for name in node.output}
    layers = [node for node in network.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) > 5
    for layer in layers:
        dequantised = by_output[layer.input[1]]
        assert dequantised.op_type == "DequantizeLinear"
        assert weights[dequantised.input[0]] == onnx.TensorProto.INT8
        assert by_output[layer.input[0]].op_type == "DequantizeLinear"


def test_file_is_smaller_and_predicts(run, images, int8_file, files, capsys):
    path, result = int8_file
    assert path.stat().st_size < 0.6 * files[1].stat().st_size
    assert result["num_bytes"] == path.stat().st_size
    predictions, _ = predict_images(load_fused(path), [images / "test"])
    float_predictions, _ = predict_images(run, [images / "test"])
    for found, expected in zip(predictions, float_predictions, strict=True):
        assert found.probability == pytest.approx(expected.probability, abs=0.1)
    assert program(["predict", str(path), str(images / "test")]) == 0
    assert [*path.parent.iterdir()] == [path]  # no temporary files


def test_command_shows_the_accuracies(run, tmp_path, capsys):
    arguments = ["export", str(run.path), "--int8", "--max-drop", "100", "--json"]
    assert program([*arguments, "--to", str(tmp_path / "net.onnx")]) == 0
    measured = json.loads(capsys.readouterr().out)["int8"]
    assert measured["split"] == "valid"
    assert measured["num_images"] == 3
    assert program([*arguments[:-1], "--to", str(tmp_path / "other.onnx")]) == 0
    assert "on 3 validation images: " in capsys.readouterr().out


def test_a_large_loss_of_accuracy_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(int8, "_compared", lambda before, after: (0.91, 0.9, 0.001))
    path = tmp_path / "net.onnx"
    assert program(["export", str(run.path), "--int8", "--to", str(path)]) == 2
    error = capsys.readouterr().err
    assert "int8 lowers the accuracy by 1.00 points (from 91.00 % to 90.00 %)" in error
    assert "more than --max-drop 0.5. Nothing was written." in error
    assert "Largest relative errors of layers: " in error
    assert len(error.splitlines()) == 2
    assert [*tmp_path.iterdir()] == []
    arguments = ["export", str(run.path), "--int8", "--max-drop", "1.01"]
    assert program([*arguments, "--to", str(path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--to", "net.safetensors"], "--int8 needs --to FILE.onnx"),
        (["--max-drop", "1", "--to", "net.onnx"], "--max-drop limits the loss of --int8"),
        (["--int8", "--max-drop", "-1", "--to", "net.onnx"], "--max-drop"),
    ],
)
def test_contradicting_flags_are_refused(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert program(["export", str(run.path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """Export the run; return its data source, the float network and a folder."""
    folder = tmp_path_factory.mktemp("quantised")
    export_run(run, folder / "net.onnx")
    return read_source(run.recipe(), folder, run), folder / "net.onnx", folder


@pytest.mark.parametrize(
    ("valid_split", "split", "count"), [(0.1, "valid", 3), (0.25, "valid", 9), (0.0, "test", 15)]
)
def test_accuracies_are_of_validation_images_or_else_test_images(files, valid_split, split, count):
    source, original, folder = files
    result = quantise(source, valid_split, original, folder / "int8.onnx")
    assert (result.split, result.num_images) == (split, count)


def test_accuracies_are_those_of_the_two_networks(files):
    source, original, folder = files
    result, predicted = quantise(source, 0.0, original, folder / "int8.onnx"), []
    for path, accuracy in ((original, result.before), (folder / "int8.onnx", result.after)):
        network = load_fused(path)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.mean, source.std))
        logits = network.model((source.test.tensor() / 255 - mean) / std)
        assert accuracy == (logits.argmax(1) == source.test.labels).double().mean().item()
        predicted.append(logits.argmax(1))
    assert result.same_class == (predicted[0] == predicted[1]).double().mean().item()


def test_runs_without_validation_and_test_images_are_refused(files):
    source, original, folder = files
    with pytest.raises(InputError, match="this run has neither"):
        quantise(replace(source, test=no_images(source.test)), 0.0, original, folder / "int8.onnx")


def test_layers_with_large_errors_are_first(files, monkeypatch):
    source, original, folder = files
    quantise(source, 0.0, original, folder / "int8.onnx")
    errors = layer_errors(source, folder / "prepared.onnx", folder / "int8.onnx")
    values = [error for _, error in errors]
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < values[0] < 0.5
    modules = module_names(original)
    assert modules["conv2d_1"] == "core.groups.0.0.conv1"
    assert modules["relu"] == "core.groups.0.0 (Relu)"
    assert {name for name, _ in errors} & modules.keys()
    named = [("conv2d_1", 0.25), ("layer2", 0.125)]
    monkeypatch.setattr(int8, "layer_errors", lambda *_: named)
    bad = Quantised("valid", 100, 0.9, 0.8, 0.01, 0.95)
    with pytest.raises(InputError, match=r"layers: core.groups.0.0.conv1 25 %, layer2 12 %\.$"):
        check_drop(bad, 9.0, source, original, folder / "int8.onnx")
    check_drop(bad, 10.001, source, original, folder / "int8.onnx")


def test_relative_error():
    expected = [np.array([3.0, 0.0]), np.array([4.0])]
    actual = [np.array([3.0, 1.0]), np.array([4.0])]
    assert int8._relative_error(expected, actual) == pytest.approx(1 / 5)
    assert int8._relative_error([np.zeros(2)], [np.zeros(2)]) == 0


def test_interval_of_the_difference():
    random = torch.Generator().manual_seed(0)
    before, after = (torch.rand(400, generator=random) < 0.8 for _ in range(2))
    found = int8._compared(before, after)
    differences = after.numpy().astype(float) - before.numpy().astype(float)
    assert found[:2] == (before.double().mean(), after.double().mean())
    assert found[2] == pytest.approx(1.96 * differences.std() / 20, rel=0.01)
    # Agresti and Min (2005): with no discordant pair, z / (N + 2).
    assert int8._compared(before, before)[2] == pytest.approx(1.96 / 402)


def test_calibration_passes_every_image_once():
    batches = int8._Calibration(torch.arange(150.0).view(150, 1, 1, 1))
    seen = []
    while (batch := batches.get_next()) is not None:
        seen += batch["images"].ravel().tolist()
    assert seen == list(range(150))
    assert batches.get_next() is None
