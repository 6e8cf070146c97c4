"""Networks of torchvision and timm by name."""

import pytest
import torch
from networks import NUM_CLASSES, build_backbone
from torchvision.models import get_model, list_models

from mixmo_fastai.config.choices import TORCHVISION_NETWORKS, parse_architecture
from mixmo_fastai.config.load import load_recipe, override
from mixmo_fastai.errors import InputError
from mixmo_fastai.models import create_model, library
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.weights import load_network, save_weights


def test_torchvision_names_exist_in_torchvision():
    import torchvision

    known = set(list_models(module=torchvision.models))
    assert known - set(TORCHVISION_NETWORKS) >= {"squeezenet1_0", "squeezenet1_1"}
    assert set(TORCHVISION_NETWORKS) <= known


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "timm/convnext_atto"])
def test_named_networks_are_initialised_from_the_generator(arch):
    def make(seed, in_channels=3):
        random = torch.Generator().manual_seed(seed)
        return create_model(arch, 4, 2, in_channels, image_size=(32, 32), generator=random)

    state = torch.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.encoders[0].weight, other.encoders[0].weight)
    # The encoders have the same values in an uncorrelated order.
    first_weights, second_weights = (encoder.weight.flatten() for encoder in first.encoders)
    assert abs(torch.corrcoef(torch.stack([first_weights, second_weights]))[0, 1]) < 0.1
    assert torch.equal(first_weights.sort().values, second_weights.sort().values)
    assert make(0, 1)(torch.randn(2, 1, 32, 32)).shape == (2, 4)


@pytest.mark.slow
def test_gpu_generators_are_not_seeded(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seen.append)
    create_model("resnet18", 4, image_size=(32, 32))
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size"),
    [("vit_b_32", (64, 64)), ("timm/vit_tiny_patch16_224", (32, 48))],
)
def test_fixed_size_networks_are_built_for_the_image_size(arch, size):
    model = create_model(arch, 4, image_size=size).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 4)


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("vit_b_32", {"image_size": (64, 32)}, "needs square images; got 64x32"),
        ("vit_b_32", {"image_size": (40, 40)}, "cannot be built for images of 40x40"),
        ("maxvit_t", {"image_size": (64, 64)}, "cannot be built for images of 64x64"),
        ("inception_v3", {"pretrained": True}, "inception_v3 standardises its input"),
    ],
)
def test_unsupported_settings_are_refused(arch, settings, message):
    with pytest.raises(InputError, match=message):
        create_model(arch, 4, **settings)


@pytest.mark.slow
def test_pretrained_weights_are_kept(monkeypatch):
    """The download is replaced by a network with random weights."""
    trained = build_backbone("resnet18")

    def load(url, **_):
        assert "resnet18" in url
        wide = get_model("resnet18", num_classes=1000)
        return wide.state_dict() | {
            name: tensor for name, tensor in trained.state_dict().items() if "fc" not in name
        }

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    model = create_model("resnet18", NUM_CLASSES, pretrained=True)
    summed = sum(encoder.weight for encoder in model.encoders)
    torch.testing.assert_close(summed, trained.conv1.weight)
    assert torch.equal(model.core.body.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert model.heads[0].out_features == NUM_CLASSES


def test_failed_download_is_reported(monkeypatch):
    def load(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    with pytest.raises(InputError, match="weights of resnet18 cannot be downloaded: no network"):
        create_model("resnet18", 4, pretrained=True)


def test_unknown_network_of_timm_is_refused():
    with pytest.raises(InputError, match="timm has no network 'resnet1800'"):
        create_model("timm/resnet1800", 4)


def test_published_networks_have_no_pretrained_weights():
    with pytest.raises(InputError, match="no pretrained weights for wrn10_1"):
        create_model("wrn10_1", 4, pretrained=True)


@pytest.mark.slow
def test_saved_torchvision_network_is_loaded(tmp_path):
    recipe = override(load_recipe("digits/cut-mixmo"), ["model.arch=resnet18"])
    run = create_run(recipe, tmp_path / "run")
    model = create_model("resnet18", 10, 2, 1)
    save_weights(model, run)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(load_network(run)(x), model.eval()(x))


def test_a_missing_timm_is_explained(monkeypatch):
    monkeypatch.setattr("mixmo_fastai.models.library.find_spec", lambda name: None)
    arch = parse_architecture("timm/convnext_atto")
    for use in (
        lambda: library.build_backbone(arch, 10),
        lambda: library.pretrained_statistics(arch),
    ):
        with pytest.raises(InputError, match=r"requires timm\.\nInstall it: pip install 'mixmo"):
            use()
