"""Exported ONNX files and programs of torch.export, and an app that uses them."""

import json
import re
import runpy
import sys
from pathlib import Path

import onnx
import pytest
import torch
from exports import images, run
from PIL import Image

from mixmo_fastai import load_fused
from mixmo_fastai.cli import run as program
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.predict import predict_images
from mixmo_fastai.export import onnx_network
from mixmo_fastai.export.files import export_run
from mixmo_fastai.runs.weights import load_network

__all__ = ["images", "run"]

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def onnx_file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_run(run, path)
    return path


def test_predictions_of_an_onnx_file_are_those_of_the_run(run, images, onnx_file):
    from_run, _ = predict_images(run, [images / "test"])
    from_file, _ = predict_images(load_fused(onnx_file), [images / "test"])
    assert [p.label for p in from_file] == [p.label for p in from_run]
    assert [p.probability for p in from_file] == pytest.approx(
        [p.probability for p in from_run], abs=1e-5
    )
    assert [p.entropy for p in from_file] == pytest.approx([p.entropy for p in from_run], abs=1e-4)
    assert {len(p.votes) for p in from_file} == {1}


def test_predict_command_reads_onnx_files(onnx_file, images, capsys):
    assert program(["predict", str(onnx_file), str(images / "test"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 15


def test_other_onnx_files_are_refused(onnx_file, images, tmp_path, capsys):
    (tmp_path / "damaged.onnx").write_bytes(b"onnx")
    assert program(["predict", str(tmp_path / "damaged.onnx"), str(images)]) == 2
    assert "damaged.onnx cannot be read: " in capsys.readouterr().err
    network = onnx.load(onnx_file)
    del network.metadata_props[:]
    onnx.save(network, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match=r"not an exported network.*\n.*--to FILE\.onnx"):
        load_fused(tmp_path / "foreign.onnx")
    network = onnx.load(onnx_file)
    network.graph.output[0].name = network.graph.node[-1].output[0] = "scores"
    onnx.save(network, tmp_path / "renamed.onnx")
    with pytest.raises(InputError, match=r"it has \['images'\] and \['scores'\]"):
        load_fused(tmp_path / "renamed.onnx")


def test_predicting_with_an_onnx_file_needs_onnxruntime(onnx_file, monkeypatch):
    monkeypatch.setattr(onnx_network, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs onnxruntime\.\nInstall: pip install"):
        load_fused(onnx_file)


def test_program_equals_the_run(run, images, tmp_path, capsys):
    path = tmp_path / "net.pt2"
    assert program(["export", str(run.path), "--to", str(path)]) == 0
    extra = {"mixmo": ""}
    exported = torch.export.load(path, extra_files=extra).module()
    facts = json.loads(extra["mixmo"])["data"]
    assert facts["classes"] == ["cat", "dog", "fish"]
    model = load_network(run)
    for count in (1, 2, 9):
        x = torch.randn(count, *facts["image_shape"])
        with torch.inference_mode():
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert program(["predict", str(path), str(images)]) == 2
    assert "torch.export.load" in capsys.readouterr().err


def test_app_without_torch_predicts_as_the_package(onnx_file, images, tmp_path, capsys):
    paths = sorted((images / "test").rglob("*.png"))[:6]
    Image.open(paths[0]).convert("RGB").resize((31, 19)).save(tmp_path / "wide.jpg")
    rotated = Image.open(paths[1]).convert("RGB").resize((20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.jpg", exif=exif)
    transparent = Image.open(paths[2]).convert("RGBA")
    transparent.putalpha(transparent.getchannel("R"))
    transparent.save(tmp_path / "transparent.png")
    paths += [tmp_path / name for name in ("wide.jpg", "rotated.jpg", "transparent.png")]
    app = runpy.run_path(str(EXAMPLES / "predict_with_onnxruntime.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["app", str(onnx_file), *map(str, paths)])
        app["main"]()
    lines = capsys.readouterr().out.splitlines()
    predictions, _ = predict_images(load_fused(onnx_file), paths)
    assert len(lines) == len(predictions) == 9
    for line, expected in zip(lines, predictions, strict=True):
        pattern = r"(.+): (.+), probability ([\d.]+)(?:, 90 %: .+)?"
        path, label, probability = re.fullmatch(pattern, line).groups()
        assert (path, label) == (expected.image, expected.label)
        assert float(probability) == pytest.approx(expected.probability, abs=1e-3)
