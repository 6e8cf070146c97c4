import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.data.corruptions import (
    BUILT_IN,
    NUM_SEVERITIES,
    OFFICIAL_TYPES,
    make_corrupted,
    read_official,
)
from mixmo_fastai.data.image_sets import Subset
from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.corruptions import evaluate_corruptions
from mixmo_fastai.evaluation.runs import open_finished
from mixmo_fastai.metrics.calibration import expected_calibration_error, nll
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

N = 6


def write_official(folder, *, num_images=N, num_classes=2):
    """Write files as in the official archives: five severities of the test set for each type."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(num_images) % num_classes, NUM_SEVERITIES)
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    for kind in OFFICIAL_TYPES:
        pixels = random.integers(0, 256, (NUM_SEVERITIES * num_images, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{kind}.npy", pixels)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupted")
    images = write_image_folder(folder / "pets", num_train=12, num_test=5)
    recipe = resolve_recipe(
        str(images),
        None,
        {"model.arch": "wrn10_1", "train.epochs": 1, "train.batch_size": 16, "train.device": "cpu"},
        ["data.valid_split=0.1"],
    )
    created = create_run(recipe, folder / "run")
    train_run(prepare(recipe, folder), created)
    return created


def test_official_files_are_read_by_type_and_severity(tmp_path):
    folder = write_official(tmp_path / "CIFAR-10-C")
    parts = list(read_official(folder))
    assert [(p.kind, p.severity) for p in parts] == [
        (kind, severity) for kind in OFFICIAL_TYPES for severity in range(1, 6)
    ]
    for part in parts:
        stored = np.load(folder / f"{part.kind}.npy")[(part.severity - 1) * N : part.severity * N]
        assert np.array_equal(part.pixels.permute(0, 2, 3, 1).numpy(), stored)
        assert part.labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "fog.npy").unlink(), r"fog\.npy is missing"),
        (lambda f: (f / "labels.npy").unlink(), r"labels\.npy is missing"),
        (lambda f: (f / "snow.npy").write_bytes((f / "snow.npy").read_bytes()[:-9]), r"snow\.npy"),
        (lambda f: (f / "frost.npy").write_bytes(b""), r"frost\.npy is truncated"),
        (lambda f: np.save(f / "fog.npy", np.zeros((5, 32, 32, 3), np.uint8)), r"fog\.npy must be"),
        (lambda f: np.save(f / "labels.npy", np.zeros(7, int)), r"labels\.npy must hold"),
        (
            lambda f: np.save(f / "contrast.npy", np.array([{}], dtype=object), allow_pickle=True),
            r"contrast\.npy is truncated or not a",
        ),
    ],
)
def test_invalid_files_are_named_before_any_is_used(tmp_path, damage, message):
    folder = write_official(tmp_path / "c")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        next(read_official(folder))
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("channels", [1, 3])
def test_built_in_corruptions_grow_with_severity(channels):
    random = torch.Generator().manual_seed(0)
    smooth = torch.randint(0, 256, (20, channels, 8, 8), generator=random).float()
    pixels = torch.nn.functional.interpolate(smooth, 32, mode="bilinear").to(torch.uint8)
    labels = torch.arange(20) % 4
    parts = list(make_corrupted(pixels, labels))
    assert len(parts) == len(BUILT_IN) * NUM_SEVERITIES
    for kind in BUILT_IN:
        same_kind = [part for part in parts if part.kind == kind]
        changes = [(p.pixels.float() - pixels.float()).abs().mean().item() for p in same_kind]
        assert all(
            p.pixels.shape == pixels.shape and p.pixels.dtype == torch.uint8 for p in same_kind
        )
        assert 0 < changes[0] < changes[-1], kind
    again = list(make_corrupted(pixels, labels))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(parts, again, strict=True))


def test_strengths_of_built_in_corruptions():
    grey = torch.full((50, 3, 32, 32), 128, dtype=torch.uint8)
    parts = {
        (p.kind, p.severity): p.pixels.float() / 255 for p in make_corrupted(grey, torch.zeros(50))
    }
    assert parts["noise", 5].std().item() == pytest.approx(0.10, abs=0.003)
    assert parts["brightness", 5].mean().item() == pytest.approx(128 / 255 + 0.3, abs=0.003)
    edge = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 200
    actual = next(
        p.pixels
        for p in make_corrupted(edge, torch.zeros(1))
        if (p.kind, p.severity) == ("contrast", 2)
    )
    assert sorted(actual.unique().tolist()) == [
        50,
        150,
    ]  # contrast is halved around the mean of 100


@pytest.mark.slow
def test_metrics_are_means_over_severities_and_types(run, tmp_path, capsys):
    folder = write_official(tmp_path / "c")
    actual = evaluate_corruptions(open_finished(run), str(folder))
    assert list(actual["types"]) == list(OFFICIAL_TYPES)
    finished = open_finished(run)
    accuracies, losses, errors = [], [], []
    for part in read_official(folder):
        logits = finished.logits([finished.loader(part.pixels)])[0][0].double().mean(1)
        accuracies.append((logits.argmax(1) == part.labels).double().mean().item())
        losses.append(nll(logits, part.labels).item())
        errors.append(expected_calibration_error(logits, part.labels).item())
    assert actual["cA"] == pytest.approx(np.mean(accuracies))
    assert actual["cNLL"] == pytest.approx(np.mean(losses))
    assert actual["cECE"] == pytest.approx(np.mean(errors))
    fog = OFFICIAL_TYPES.index("fog")
    assert actual["types"]["fog"]["severities"]["nll"] == pytest.approx(
        losses[5 * fog : 5 * fog + 5]
    )
    assert actual["types"]["fog"]["nll"] == pytest.approx(np.mean(losses[5 * fog : 5 * fog + 5]))


@pytest.mark.slow
def test_test_images_may_lack_a_class(run):
    finished = open_finished(run)
    rows = (finished.source.test.labels == 0).nonzero().flatten()
    source = replace(finished.source, test=Subset(finished.source.test, rows))
    found = evaluate_corruptions(replace(finished, source=source), "built-in")
    assert list(found["types"]) == list(BUILT_IN)


@pytest.mark.slow
def test_corruptions_option_of_eval(run, tmp_path, capsys):
    path = str(run.path)
    assert program(["eval", path, "--corruptions", "built-in", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)["corruptions"]
    assert list(actual["types"]) == list(BUILT_IN)
    assert program(["eval", path, "--corruptions", str(write_official(tmp_path / "c"))]) == 0
    out = capsys.readouterr().out
    assert "mean of 15 types of 5 severities" in out
    assert "jpeg_compression" in out
    assert program(["eval", path, "--corruptions", str(tmp_path / "none")]) == 2
    assert "labels.npy is missing" in capsys.readouterr().err
    for count in (6, 1):
        other = write_official(tmp_path / f"of {count}", num_classes=count)
        assert program(["eval", path, "--corruptions", str(other)]) == 2
        error = capsys.readouterr().err
        assert f"has {count} classes; the images of this run have 2." in error
