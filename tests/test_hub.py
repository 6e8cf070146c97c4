"""Runs in the layout of the Hugging Face Hub, read back by its own library; without network."""

import csv
import io
import json
import shutil
import tomllib
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from httpx import ConnectError
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from short_runs import train_for_calibration, write_digits
from small_data import write_image_folder

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.load import recipe_from_mapping
from mixmo_fastai.errors import InputError
from mixmo_fastai.export import hub
from mixmo_fastai.export.files import load_fused
from mixmo_fastai.export.hub import FusedClassifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = ("data.valid_split=0.3", "data.limit=300")
    return train_for_calibration(tmp_path_factory.mktemp("runs") / "run", *settings)


@pytest.fixture(scope="module")
def pushed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed") / "digits"
    assert program(["push", str(run.path), "--to", str(folder), "--license", "mit"]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_digits(folder, 12)
    return folder


def predictions(capsys, network, images):
    assert program(["predict", str(network), str(images), "--coverage", "0.9"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_folder_has_the_layout_of_the_hub(run, pushed):
    assert sorted(path.name for path in pushed.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    config = json.loads((pushed / "config.json").read_text())
    assert config["architecture"] == "wrn10_1"
    assert config["classes"] == [*map(str, range(10))]
    assert config["id2label"]["7"] == "7"
    assert config["image_shape"] == [1, 8, 8]
    assert config["calibration"]["in_logits"]


def test_library_of_the_hub_loads_the_same_network(pushed, tmp_path):
    model = FusedClassifier.from_pretrained(pushed)
    assert not model.training
    images = torch.randn(5, 1, 8, 8)
    expected = load_fused(pushed).model(images)
    assert torch.equal(model(images), expected)
    assert torch.equal(load_fused(f"hf:{pushed}").model(images), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_fused(tmp_path / "again").model(images), expected)
    again = FusedClassifier.from_pretrained(tmp_path / "again")
    assert torch.equal(again(images), expected)
    assert again.calibration == model.calibration
    assert again.labels == model.labels
    text = (pushed / "config.json").read_text()
    assert (tmp_path / "again/config.json").read_text() == text
    config = json.loads(text)
    fresh = FusedClassifier(
        config["architecture"], **{k: config[k] for k in ("classes", "mean", "std", "image_shape")}
    )
    assert fresh(images).shape == (5, 10)


def test_card_states_what_was_measured(run, pushed):
    card, metrics = ModelCard.load(pushed / "README.md"), run.metrics()
    card.validate = None  # it asks a server
    assert card.data.license == "mit"
    assert card.data.library_name == "mixmo-fastai"
    assert card.data.tags == ["mixmo", "ensemble", "uncertainty"]
    values = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert values["accuracy"] == pytest.approx(metrics["test"]["accuracy"], abs=1e-6)
    for name in ("nll", "ece"):  # of the logits that were pushed
        assert values[name] == pytest.approx(metrics["calibrated"][name], abs=1e-6)
        assert values[name] != pytest.approx(metrics["test"][name], abs=1e-6)
    low, high = (f"{100 * value:.2f} %" for value in metrics["intervals"]["accuracy"])
    assert (
        f"| accuracy | {100 * metrics['test']['accuracy']:.2f} % | {low} to {high} |" in card.text
    )
    calibration = metrics["calibration"]
    assert f"fitted on {calibration['num_images']:,} images" in card.text
    assert f"{100 * metrics['sets']['raps']['coverage']:.2f} % of the test images" in card.text
    assert "It was trained on 300 images only." in card.text
    toml = card.text.partition("```toml\n")[2].partition("```")[0]
    recipe = recipe_from_mapping(tomllib.loads(toml), "card")
    assert recipe == run.recipe()
    assert str(run.path.parent) not in card.text


def test_card_of_a_folder_names_no_path_and_no_members(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    folder = write_image_folder(tmp_path / "secret/pets", num_train=20, size=(16, 16))
    arguments = ["--members", "1", "--arch", "wrn10_1", "--epochs", "1", "--batch-size", "8"]
    arguments += ["--valid-split", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert program(["fit", str(folder), *arguments]) == 0
    assert program(["push", str(tmp_path / "run"), "--to", str(tmp_path / "hub")]) == 0
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert "secret" not in card.content
    assert card.data.license == "unknown"
    assert not card.data.tags
    assert 'dataset = "pets"' in card.text
    assert "Not calibrated: the run has no calibration images." in card.text
    assert "accuracy of the members" not in card.text


def test_card_of_a_table_names_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "data"))
    folder = write_image_folder(tmp_path / "secret/pets", num_train=20, size=(16, 16))
    rows = [f"{p.parent.name}/{p.name},{p.parent.name}" for p in (folder / "train").rglob("*.png")]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]))
    arguments = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    arguments += ["--set", f"data.image_folder={folder / 'train'}", "--out", str(tmp_path / "run")]
    assert program(["fit", str(tmp_path / "table.csv"), *arguments]) == 0
    assert program(["push", str(tmp_path / "run"), "--to", str(tmp_path / "hub")]) == 0
    text = (tmp_path / "hub/README.md").read_text()
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert 'image_folder = "train"' in text
    assert "1 epoch, " in text


def test_card_leaves_out_what_was_measured_with_another_calibration(run, tmp_path, capsys):
    copy = shutil.copytree(run.path, tmp_path / "run")
    assert program(["calibrate", str(copy), "--method", "none"]) == 0
    assert program(["push", str(copy), "--to", str(tmp_path / "hub")]) == 0
    text = (tmp_path / "hub/README.md").read_text()
    assert "Not calibrated: calibration was not requested." in text
    assert "Prediction sets for" not in text


def test_predictions_are_those_of_the_run(run, pushed, images, capsys):
    expected = predictions(capsys, run.path, images)
    for name in (pushed, f"hf:{pushed}"):
        found = predictions(capsys, name, images)
        assert [row["set"] for row in found] == [row["set"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert float(row["probability"]) == pytest.approx(float(other["probability"]), rel=1e-4)


def test_folder_of_a_failed_push_can_be_used_again(run, tmp_path, capsys):
    copy, to = shutil.copytree(run.path, tmp_path / "run"), tmp_path / "pushed"
    arguments = ["push", str(copy), "--to", str(to)]
    (copy / "metrics.json").rename(tmp_path / "metrics.json")
    assert program(arguments) == 2
    assert "mixmo fit --resume" in capsys.readouterr().err
    shutil.rmtree(copy / "checkpoint")  # as after `mixmo import`
    assert program(arguments) == 2
    assert "it was imported, or its checkpoint was removed" in capsys.readouterr().err
    assert not to.exists()
    (tmp_path / "metrics.json").rename(copy / "metrics.json")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(b"")
    assert program(arguments) == 2
    assert [*to.iterdir()] == []
    (copy / "model.safetensors").write_bytes(weights)
    assert program(arguments) == 0
    assert len([*to.iterdir()]) == 3


def test_raw_logits_are_not_scaled(run, tmp_path):
    assert program(["push", str(run.path), "--to", str(tmp_path / "raw"), "--raw"]) == 0
    assert not json.loads((tmp_path / "raw/config.json").read_text())["calibration"]["in_logits"]
    assert (
        "The logits do not contain the temperature scaling"
        in (tmp_path / "raw/README.md").read_text()
    )


class TestRepository:
    """The Hub is replaced: nothing is sent."""

    @pytest.fixture
    def api(self, monkeypatch, tmp_path):
        calls = []

        class Api:
            def __init__(self, **settings):
                calls.append(settings)

            def repo_info(self, repo_id):
                if repo_id == "me/offline":
                    raise ConnectError("no connection")
                if repo_id not in ("me/full", "me/empty"):
                    response = SimpleNamespace(headers={}, request=None, status_code=404)
                    raise RepositoryNotFoundError("404", response=response)
                names = [".gitattributes", *(["README.md"] if repo_id == "me/full" else [])]
                siblings = [SimpleNamespace(rfilename=name) for name in names]
                return SimpleNamespace(private=False, siblings=siblings)

            def create_repo(self, repo_id, **settings):
                calls.append((repo_id, settings))
                if repo_id == "me/forbidden":
                    response = SimpleNamespace(headers={}, request=None, status_code=403)
                    raise HfHubHTTPError("403 Forbidden: no rights", response=response)
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

            def upload_folder(self, *, repo_id, folder_path, **settings):
                calls.append(repo_id)
                shutil.copytree(folder_path, tmp_path / "uploaded")

        monkeypatch.setattr(hub, "HfApi", Api)
        return calls

    def test_network_is_uploaded(self, run, api, tmp_path, capsys):
        assert program(["push", str(run.path), "--to", "hf:me/digits", "--private"]) == 0
        assert ("me/digits", {"private": True, "exist_ok": True}) in api
        assert api[-1] == "me/digits"
        assert "https://huggingface.co/me/digits: config.json" in capsys.readouterr().out
        uploaded = tmp_path / "uploaded"
        assert load_fused(uploaded).arch == "wrn10_1"
        text = (uploaded / "README.md").read_text()
        assert 'load_fused("hf:me/digits")' in text
        assert 'from_pretrained("me/digits")' in text

    @pytest.mark.parametrize(
        ("repository", "flags", "message"),
        [
            ("me/full", [], "has README.md. It was not changed."),
            ("me/full", ["--private"], "exists and is public"),
            ("me/empty", ["--private"], "exists and is public"),
            ("me/offline", [], "Cannot push to me/offline: ConnectError: no connection"),
        ],
    )
    def test_repository_is_checked_before_anything_is_sent(
        self, run, api, repository, flags, message, capsys
    ):
        assert program(["push", str(run.path), "--to", f"hf:{repository}", *flags]) == 2
        assert message in capsys.readouterr().err
        assert all(isinstance(call, dict) for call in api)

    @pytest.mark.parametrize(
        ("repository", "flags"), [("me/full", ["--overwrite"]), ("me/empty", [])]
    )
    def test_existing_repository_is_filled(self, run, api, repository, flags):
        assert program(["push", str(run.path), "--to", f"hf:{repository}", *flags]) == 0
        assert api[-1] == repository

    def test_nothing_is_created_if_the_export_fails(self, run, api, tmp_path, capsys):
        copy = shutil.copytree(run.path, tmp_path / "run")
        (copy / "model.safetensors").write_bytes(b"")
        assert program(["push", str(copy), "--to", "hf:me/digits"]) == 2
        assert all(isinstance(call, dict) for call in api)

    def test_refusal_is_explained(self, run, api, capsys):
        assert program(["push", str(run.path), "--to", "hf:me/forbidden"]) == 2
        error = capsys.readouterr().err
        assert "Cannot push to me/forbidden: HfHubHTTPError: 403 Forbidden: no rights" in error
        assert "hf auth login" in error
        assert len(error.splitlines()) == 2

    def test_network_is_downloaded(self, pushed, images, monkeypatch, capsys):
        asked = []

        def download(repo_id, filename, *, revision):
            asked.append((repo_id, filename, revision))
            if repo_id == "me/missing":
                raise LocalEntryNotFoundError("Cannot find it.\nMore.")
            return str(pushed / filename)

        monkeypatch.setattr(hub, "hf_hub_download", download)
        assert len(predictions(capsys, "hf:me/digits@v1", images)) == 12
        assert asked == [("me/digits", "model.safetensors", "v1")]
        assert program(["predict", "hf:me/missing", str(images)]) == 2
        error = capsys.readouterr().err
        assert "Cannot load model.safetensors of 'me/missing'" in error
        assert "no local folder of this name either" in error
        assert len(error.splitlines()) == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "'hf:' needs a name or a path"),
            ("./nothing", "There is no file or folder './nothing'"),
            ("net.safetensors", "There is no file or folder"),
        ],
    )
    def test_local_names_are_not_looked_up(self, monkeypatch, name, message):
        monkeypatch.setattr(hub, "hf_hub_download", None)
        with pytest.raises(InputError, match=message):
            load_fused(f"hf:{name}")


class TestWrongUse:
    def test_existing_folder_is_kept(self, run, pushed, tmp_path, capsys):
        assert program(["push", str(run.path), "--to", str(pushed)]) == 2
        assert "exists and was not changed" in capsys.readouterr().err
        (tmp_path / "file").touch()
        assert program(["push", str(run.path), "--to", str(tmp_path / "file")]) == 2
        (tmp_path / "empty").mkdir()
        assert program(["push", str(run.path), "--to", str(tmp_path / "empty")]) == 0

    def test_options_are_checked(self, run, tmp_path, monkeypatch, capsys):
        to = str(tmp_path / "x")
        assert program(["push", str(run.path), "--to", to, "--private"]) == 2
        assert "--private is for a repository" in capsys.readouterr().err
        monkeypatch.setattr("mixmo_fastai.cli.push.find_spec", lambda name: None)
        assert program(["push", str(run.path), "--to", to]) == 2
        assert "pip install 'mixmo-fastai[hub]'" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()

    def test_repository_without_configuration_is_refused(self, monkeypatch):
        def download(**settings):
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise HfHubHTTPError("404 Not Found", response=response)

        monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
        with pytest.raises(InputError, match=r"config\.json in 'me/pets' is missing, or has no"):
            FusedClassifier.from_pretrained("me/pets")

    def test_mixed_folders_are_refused(self, pushed, tmp_path):
        folder = shutil.copytree(pushed, tmp_path / "mixed")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "mean": [0.9]}))
        with pytest.raises(InputError, match=r"does not belong to the config\.json beside it"):
            FusedClassifier.from_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({**config, "classes": ["one"]}))
        with pytest.raises(InputError, match="Impossible configuration"):
            FusedClassifier.from_pretrained(folder)
        for labels in ({}, [0.5], "all", {"thresholds": 0.5}):
            (folder / "config.json").write_text(json.dumps({**config, "labels": labels}))
            with pytest.raises(InputError, match="Impossible configuration"):
                FusedClassifier.from_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "mixmo"}))
        with pytest.raises(InputError, match=r"mixed/config\.json has no 'architecture'"):
            FusedClassifier.from_pretrained(folder)
        (folder / "config.json").unlink()
        with pytest.raises(InputError, match=r"There is no file .*mixed/config\.json\.\nGive a"):
            FusedClassifier.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=r"mixed' has no config\.json: it is not one that"):
            load_fused(folder)
