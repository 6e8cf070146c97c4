"""Backbones of others as MixMo networks: the same outputs, gradients everywhere, clear refusals."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models import get_model, list_models

from mixmo_fastai.checkpoints.weights import load_network, save_weights
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks
from mixmo_fastai.models import convert_to_mixmo, create_model
from mixmo_fastai.models.surgery import with_channels
from mixmo_fastai.names import TORCHVISION_NETWORKS
from mixmo_fastai.recipe import load_recipe, override
from mixmo_fastai.runs import create_run

FAMILIES = {  # name: height and width at which it is tried here
    "resnet18": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "alexnet": 64, "vgg11_bn": 32,
    "densenet121": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64,
    "convnext_tiny": 64, "regnet_y_400mf": 64, "mnasnet0_5": 64, "shufflenet_v2_x0_5": 64,
    "swin_t": 64, "vit_b_32": 224, "googlenet": 64,
    "timm/vit_tiny_patch16_224": 224, "timm/convnext_atto": 64, "timm/tf_efficientnet_b0": 64,
    "timm/mobilenetv3_small_050": 64, "timm/mixer_s32_224": 224, "timm/seresnet18": 64,
    "timm/poolformer_s12": 64, "timm/edgenext_xx_small": 64, "timm/regnetx_002": 64,
}  # fmt: skip
CLASSES = 5


def plain(name):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"), num_classes=CLASSES)
    else:
        auxiliary = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = get_model(name, num_classes=CLASSES, **auxiliary)
    for module in model.modules():  # some heads begin at zero, and would hide everything
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            nn.init.normal_(module.weight)
    return model.eval()


def largest_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_network_gives_what_it_gave(name):
    model, size = plain(name), FAMILIES[name]
    before = copy.deepcopy(model.state_dict())
    converted = convert_to_mixmo(model, 2).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        assert largest_difference(converted(x), expected) < 1e-4
        assert largest_difference(converted.fuse()(x), expected) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(converted.encoders[0].weight, converted.encoders[1].weight)
    assert not torch.equal(converted.heads[0].weight, converted.heads[1].weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient(name):
    size = FAMILIES[name]
    converted = convert_to_mixmo(plain(name), 2).train()
    shape = converted.mask_shape(size, size)
    masks, _ = draw_masks("cutmix", draw_lam(2, 2, 2.0), shape)
    logits = converted(torch.randn(2, 2, 3, size, size), masks)
    assert logits.shape == (2, 2, CLASSES)
    logits.square().sum().backward()
    without = [n for n, p in converted.named_parameters() if p.grad is None]
    assert not without
    assert converted.heads[0].weight.grad.abs().sum() > 0


def test_members_see_images_of_their_own():
    converted = convert_to_mixmo(plain("resnet18"), 2).eval()
    masks, _ = draw_masks("linear", draw_lam(1, 2, 2.0), converted.mask_shape(32, 32))
    images = torch.randn(1, 2, 3, 32, 32)
    before = converted(images, masks)
    for member in range(2):
        changed = images.clone()
        changed[:, member] += 1
        assert not torch.allclose(converted(changed, masks), before)


def test_patches_of_a_transformer_are_the_map_that_masks_are_laid_over():
    converted = convert_to_mixmo(plain("timm/vit_tiny_patch16_224"), 2)
    assert converted.mask_shape(224, 224) == (192, 14, 14)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(4, 3), nn.Conv2d(2, 4, 3, stride=2, bias=True)

    def forward(self, x):
        return self.last(self.first(x).relu().mean((2, 3)))


@pytest.mark.parametrize("names", [{}, {"encoder": "first", "head": "last"}])
@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_a_network_of_ones_own(names, num_members):
    model, x = Own(), torch.randn(2, 2, 9, 9)
    converted = convert_to_mixmo(model, num_members, **names)
    torch.testing.assert_close(converted(x), model(x))
    assert converted.num_members == num_members
    weights = torch.stack([encoder.weight for encoder in converted.encoders])
    torch.testing.assert_close(weights.sum(dim=0), model.first.weight)


def test_the_training_mode_of_each_part_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 3, 8, 8))
    model[1].eval()
    converted = convert_to_mixmo(model.train(False).train(), 2, image_size=8)
    assert converted.training
    model[1].eval()
    converted = convert_to_mixmo(model, 2, image_size=8)
    assert model.training
    assert not model[1].training


class Changing(Own):
    def forward(self, x):
        return super().forward(2 * x)


class Softmax(Own):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Twice(Own):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class Branching(Own):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(2, 4, 3, stride=2)

    def forward(self, x):
        return self.last((self.first(x) + self.other(x)).relu().mean((2, 3)))


class Tuple(Own):
    def forward(self, x):
        return super().forward(x), x


class Failing(Own):
    def forward(self, x):
        raise RuntimeError("no images today")


class Standardising(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


def standardising():
    model = Own()
    model.first = Standardising(2, 4, 3)
    return model


REFUSED = {
    "no convolution": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), "has no convolution"),
    "no linear layer": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1)), "MixMo needs logits"),
    "convolution at the end": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "does not end with a linear layer",
    ),
    "softmax": (Softmax, "does not end with linear layer 'last'"),
    "changed image": (Changing, "changes the image before its first convolution, 'first'"),
    "called twice": (Twice, "calls its convolution 'first' 2 times"),
    "image goes elsewhere": (Branching, "shows the image to more than its first convolution"),
    "tuple": (Tuple, "gives tuple"),
    "failing": (Failing, "no images today"),
    "weights normalised": (standardising, "cannot be converted"),
    "squeezenet": (lambda: get_model("squeezenet1_1"), "does not end with a linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_says_which_part_is_missing(case):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        convert_to_mixmo(make())
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "last"}, "names no convolution of Own"),
        ({"head": "first"}, "names no linear layer of Own"),
        ({"num_members": 0}, "num_members must be 1 or more"),
        ({"perturbation": 1.0}, "perturbation must be"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(InputError, match=message):
        convert_to_mixmo(Own(), **arguments)


def test_names_of_torchvision_are_its_names():
    import torchvision

    known = set(list_models(module=torchvision.models))
    assert known - set(TORCHVISION_NETWORKS) >= {"squeezenet1_0", "squeezenet1_1"}
    assert set(TORCHVISION_NETWORKS) <= known


@pytest.mark.parametrize("arch", ["resnet18", "timm/convnext_atto"])
def test_networks_by_name_are_drawn_from_their_generator(arch):
    def make(seed):
        return create_model(arch, 4, 2, 1, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.encoders[0].weight, other.encoders[0].weight)
    # Independent draws of one distribution.
    ours, theirs = (encoder.weight.flatten() for encoder in first.encoders)
    assert abs(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) < 0.1
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert first(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_an_unknown_network_of_timm_is_named():
    with pytest.raises(InputError, match="timm has no network 'resnet1800'"):
        create_model("timm/resnet1800", 4)


def test_there_are_no_trained_weights_of_published_networks():
    with pytest.raises(InputError, match="no trained weights of wrn10_1"):
        create_model("wrn10_1", 4, pretrained=True)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_give_the_same_for_grey_images(channels):
    model = plain("resnet18")
    grey = torch.randn(2, 1, 32, 32)
    expected = model(grey.expand(-1, 3, -1, -1))
    found = with_channels(model, channels)(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_run_of_such_a_network_is_read_back(tmp_path):
    recipe = override(load_recipe("digits/cut-mixmo"), ["model.arch=resnet18"])
    run = create_run(recipe, tmp_path / "run")
    model = create_model("resnet18", 10, 2, 1)
    save_weights(model, run)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(load_network(run)(x), model.eval()(x))
