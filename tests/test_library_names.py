"""Names of the networks in timm and fastai are known without importing the libraries."""

import subprocess
import sys

import pytest
import timm
from fastai.vision.models import xresnet

from mixmo_fastai.config import choices as names
from mixmo_fastai.config.choices import TORCHVISION_NETWORKS, parse_architecture
from mixmo_fastai.config.library_names import fastai_networks, timm_networks
from mixmo_fastai.errors import InputError
from mixmo_fastai.models import create_model


def error_for(name):
    with pytest.raises(InputError) as caught:
        parse_architecture(name)
    return str(caught.value)


def test_names_equal_those_of_the_libraries():
    assert timm_networks() == {*timm.list_models()}
    functions = {name for name in xresnet.__all__ if name.startswith("x")}
    assert fastai_networks() == functions


def test_timm_names_without_prefix_suggest_the_prefix():
    bare = timm_networks() - {*TORCHVISION_NETWORKS}
    assert len(bare) > 1000
    assert {name for name in bare if f"Write 'timm/{name}'" not in error_for(name)} == set()
    assert "Write 'timm/convnext_atto.d2_in1k'" in error_for("convnext_atto.d2_in1k")


def test_fastai_names_suggest_passing_the_function():
    message = error_for("xresnet18")
    assert "from fastai.vision.models.xresnet import xresnet18" in message
    assert "mixmo_learner(dls, xresnet18)" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize("with_timm", [True, False])
@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnt50", "resnet50"),
        ("ResNet-50", "resnet50"),
        ("efficientnetb0", "efficientnet_b0"),
        ("vgg16bn", "vgg16_bn"),
        ("wrn28_1o", "wrn28_10"),
        ("WRN-40-2", "wrn40_2"),
        ("wide_resnet_16_4", "wrn16_4"),
    ],
)
def test_typing_errors_are_corrected(monkeypatch, with_timm, name, suggestion):
    if not with_timm:
        monkeypatch.setattr(names, "timm_networks", frozenset)
    assert f"Did you mean {suggestion!r}?" in error_for(name)


@pytest.mark.parametrize("name", ["resnet20", "resnet9", "deit_micro", "vit_minuscule"])
def test_different_networks_are_not_suggested(name):
    message = error_for(name)
    assert "Did you mean" not in message
    assert "such as 'timm/" not in message


@pytest.mark.parametrize("name", ["vit_small", "deit_tiny"])
def test_prefix_of_timm_names_suggests_a_full_name(name):
    assert f"with this name, such as 'timm/{name}_" in error_for(name)


def test_without_timm_its_names_do_not_suggest_other_networks(monkeypatch):
    timm_names = timm_networks() - {*TORCHVISION_NETWORKS}
    monkeypatch.setattr(names, "timm_networks", frozenset)

    def letters(name):
        return name.replace("_", "")

    wrong_guesses = {}
    for name in timm_names:
        first, _, guess = error_for(name).partition("\n")[0].partition("Did you mean '")
        if guess and letters(guess.rstrip("'?")) != letters(name):
            wrong_guesses[name] = first + guess
    assert wrong_guesses == {}
    assert "pip install 'mixmo-fastai[timm]'" in error_for("convnext_atto")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/convnxt_atto", "Did you mean 'timm/convnext_atto'"),
        ("timm/wrn28_10", "Write it without timm/: 'wrn28_10'"),
    ],
)
def test_names_missing_from_timm(name, message):
    with pytest.raises(InputError, match=message):
        create_model(name, 3)


def test_timm_prefix_with_a_fastai_name():
    with pytest.raises(InputError, match="timm has no network 'xresnet18'") as caught:
        create_model("timm/xresnet18", 3)
    assert "Did you mean" not in str(caught.value)


def test_libraries_are_not_imported():
    program = (
        "import sys\n"
        "from mixmo_fastai.config.choices import parse_architecture\n"
        "for name in ('convnext_atto', 'xresnet18', 'resnt50'):\n"
        "    try: parse_architecture(name)\n"
        "    except ValueError as error: print(str(error).splitlines()[0])\n"
        "sys.exit(bool({'torch', 'timm', 'fastai'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "timm/convnext_atto" in done.stdout
