"""Names of networks in timm and fastai are known without importing them."""

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


def message_of(name):
    with pytest.raises(InputError) as caught:
        parse_architecture(name)
    return str(caught.value)


def test_they_are_those_that_the_libraries_have():
    assert timm_networks() == {*timm.list_models()}
    functions = {name for name in xresnet.__all__ if name.startswith("x")}
    assert fastai_networks() == functions


def test_every_bare_name_of_timm_leads_to_timm():
    bare = timm_networks() - {*TORCHVISION_NETWORKS}
    assert len(bare) > 1000
    assert {name for name in bare if f"Write 'timm/{name}'" not in message_of(name)} == set()
    assert "Write 'timm/convnext_atto.d2_in1k'" in message_of("convnext_atto.d2_in1k")


def test_a_function_of_fastai_is_to_be_passed():
    said = message_of("xresnet18")
    assert "from fastai.vision.models.xresnet import xresnet18" in said
    assert "mixmo_learner(dls, xresnet18)" in said
    assert "Did you mean" not in said


@pytest.mark.parametrize("with_timm", [True, False])
@pytest.mark.parametrize(
    ("name", "meant"),
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
def test_slips_of_the_keyboard_are_corrected(monkeypatch, with_timm, name, meant):
    if not with_timm:
        monkeypatch.setattr(names, "timm_networks", frozenset)
    assert f"Did you mean {meant!r}?" in message_of(name)


@pytest.mark.parametrize("name", ["resnet20", "resnet9", "deit_micro", "vit_minuscule"])
def test_another_network_is_not_suggested(name):
    said = message_of(name)
    assert "Did you mean" not in said
    assert "such as 'timm/" not in said


@pytest.mark.parametrize("name", ["vit_small", "deit_tiny"])
def test_the_beginning_of_a_name_leads_to_names_that_begin_so(name):
    assert f"with this name, such as 'timm/{name}_" in message_of(name)


def test_without_timm_none_of_its_names_is_taken_for_another_network(monkeypatch):
    every = timm_networks() - {*TORCHVISION_NETWORKS}
    monkeypatch.setattr(names, "timm_networks", frozenset)

    def letters(name):
        return name.replace("_", "")

    taken = {}
    for name in every:
        first, _, guess = message_of(name).partition("\n")[0].partition("Did you mean '")
        if guess and letters(guess.rstrip("'?")) != letters(name):
            taken[name] = first + guess
    assert taken == {}
    assert "pip install 'mixmo-fastai[timm]'" in message_of("convnext_atto")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/convnxt_atto", "Did you mean 'timm/convnext_atto'"),
        ("timm/wrn28_10", "Write it without timm/: 'wrn28_10'"),
    ],
)
def test_names_that_timm_does_not_have(name, message):
    with pytest.raises(InputError, match=message):
        create_model(name, 3)


def test_a_function_of_fastai_is_not_taken_for_a_network_of_timm():
    with pytest.raises(InputError, match="timm has no network 'xresnet18'") as caught:
        create_model("timm/xresnet18", 3)
    assert "Did you mean" not in str(caught.value)


def test_neither_library_is_imported():
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
