"""Conversion of other networks: equal outputs, gradients everywhere, readable errors."""

import copy

import pytest
import torch
from networks import NUM_CLASSES, SmallNetwork, build_backbone, largest_difference
from torch import nn

from mixmo_fastai.mixing import draw_lam, draw_masks
from mixmo_fastai.models import convert_to_mixmo, create_model

FAMILIES = {  # name: height and width of the images in these tests
    "resnet18": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "alexnet": 64, "vgg11_bn": 32,
    "densenet121": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64,
    "convnext_tiny": 64, "regnet_y_400mf": 64, "mnasnet0_5": 64, "shufflenet_v2_x0_5": 64,
    "swin_t": 64, "vit_b_32": 224, "googlenet": 64,
    "timm/vit_tiny_patch16_224": 224, "timm/convnext_atto": 64, "timm/tf_efficientnet_b0": 64,
    "timm/mobilenetv3_small_050": 64, "timm/mixer_s32_224": 224, "timm/seresnet18": 64,
    "timm/poolformer_s12": 64, "timm/edgenext_xx_small": 64, "timm/regnetx_002": 64,
    "timm/dla34": 64, "timm/tnt_s_legacy_patch16_224": 224, "timm/visformer_tiny": 224,
}  # fmt: skip


FOUND_WITHOUT_SIZE = ("resnet18", "mobilenet_v3_small", "vit_b_32", "timm/convnext_atto")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Return a network, its original weights, the converted network and an image size."""
    model, size = build_backbone(request.param), FAMILIES[request.param]
    before = copy.deepcopy(model.state_dict())
    # Without a size, most networks would be run with images of 224 pixels, which takes long.
    image_size = None if request.param in FOUND_WITHOUT_SIZE else size
    return model, before, convert_to_mixmo(model, 2, image_size=image_size), size


@pytest.mark.slow
def test_converted_network_has_equal_outputs(family):
    model, before, converted, size = family
    converted.eval()
    # The weights are rounded to float32; its outputs differ by more on some CPUs.
    model64, converted64 = (copy.deepcopy(network).double() for network in (model, converted))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = model64(x)
        assert largest_difference(converted64(x), expected) < 1e-5
        assert largest_difference(converted64.fuse()(x), expected) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(converted.encoders[0].weight, converted.encoders[1].weight)
    assert not torch.equal(converted.heads[0].weight, converted.heads[1].weight)


@pytest.mark.slow
def test_every_parameter_has_a_gradient(family):
    *_, converted, size = family
    torch.manual_seed(0)
    converted.train().zero_grad()
    shape = converted.mask_shape(size, size)
    for _ in range(3):  # stochastic depth skips random blocks
        masks, _ = draw_masks("cutmix", draw_lam(2, 2, 2.0), shape)
        logits = converted(torch.randn(2, 2, 3, size, size), masks)
        assert logits.shape == (2, 2, NUM_CLASSES)
        logits.square().sum().backward()
        without_gradient = [
            n for n, p in converted.named_parameters() if p.grad is None or not p.grad.any()
        ]
        if not without_gradient:
            break
    assert not without_gradient
    assert converted.heads[0].weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_output_depends_on_the_images_of_all_members():
    converted = convert_to_mixmo(build_backbone("resnet18"), 2, image_size=32).eval()
    masks, _ = draw_masks("linear", draw_lam(1, 2, 2.0), converted.mask_shape(32, 32))
    images = torch.randn(1, 2, 3, 32, 32)
    before = converted(images, masks)
    for member in range(2):
        changed = images.clone()
        changed[:, member] += 1
        assert not torch.allclose(converted(changed, masks), before)


def test_mask_shape_of_a_transformer_is_its_grid_of_patches():
    converted = convert_to_mixmo(build_backbone("timm/vit_tiny_patch16_224"), 2)
    assert converted.mask_shape(224, 224) == (192, 14, 14)


@pytest.mark.parametrize("names", [{}, {"encoder": "first", "head": "last"}])
@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_custom_network(names, num_members):
    model, x = SmallNetwork(), torch.randn(2, 2, 9, 9)
    converted = convert_to_mixmo(model, num_members, **names)
    torch.testing.assert_close(converted(x), model(x))
    assert converted.num_members == num_members
    weights = torch.stack([encoder.weight for encoder in converted.encoders])
    torch.testing.assert_close(weights.sum(dim=0), model.first.weight)


class FiniteLogitsRequired(SmallNetwork):
    """Fails if the logits are not finite."""

    def forward(self, x):
        logits = super().forward(x)
        assert logits.isfinite().all()
        return logits


class TwoNamesPerLayer(SmallNetwork):
    """Each layer has two names, and the first is called with a keyword argument."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleList([self.first])
        self.classifier = nn.Sequential(nn.Dropout(), self.last)

    def forward(self, x):
        return self.classifier(self.first(input=x).relu().mean((2, 3)))


class Reordered(SmallNetwork):
    """The convolution that is registered first is not called first."""

    def __init__(self):
        super().__init__()
        first = self.first
        del self.first
        self.between, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3)
        del first

    def forward(self, x):
        return self.last(self.between(self.first(x)).relu().mean((2, 3)))


class ConvolutionalHead(SmallNetwork):
    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.last(self.first(x).relu().mean((2, 3), keepdim=True)).flatten(1)


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (TwoNamesPerLayer, 2),
        (Reordered, 3),
        (ConvolutionalHead, 2),
        (SmallNetwork, 2),
        (FiniteLogitsRequired, 2),
    ],
)
def test_networks_of_unusual_structure(network, channels):
    model = network().eval()
    x = torch.randn(3, channels, 20, 13)
    for arguments in ({}, {"encoder": "first"}):
        converted = convert_to_mixmo(model, **arguments).eval()
        torch.testing.assert_close(converted(x), model(x))
        torch.testing.assert_close(converted.fuse()(x), model(x))
    assert all(isinstance(head, nn.Linear) for head in converted.heads)


@pytest.fixture(scope="module", params=["resnet18", "convnext_tiny", "densenet121", "mobilenet_v2"])
def converted_without_size(request):
    model = build_backbone(request.param)
    return model, convert_to_mixmo(model).eval()


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 97])
def test_images_of_other_sizes(converted_without_size, size):
    model, converted = converted_without_size
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert largest_difference(converted(x), model(x)) < 1e-4


class UsesImageSize(SmallNetwork):
    """Uses the image size in its forward pass."""

    def forward(self, x):
        features = nn.functional.interpolate(self.first(x), x.shape[2:]).relu()
        return self.last(features.sum((2, 3)) / x.shape[2:].numel())


@pytest.mark.parametrize("size", [9, 32, 33])
def test_networks_that_use_the_image_size(size):
    model, x = UsesImageSize().eval(), torch.randn(2, 2, size, size + 2)
    converted = convert_to_mixmo(model).eval()
    for network in (converted, converted.fuse(), converted.fuse(keep_members=True)):
        torch.testing.assert_close(network(x), model(x))
    masks = torch.full((2, 2, 1, *converted.mask_shape(size, size + 2)[1:]), 0.5)
    same_images = x[:, None].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(converted(same_images, masks).mean(1), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto", "timm/dla34"])
def test_fused_network_has_the_original_class(name):
    """Its weights can be loaded into a network of that class."""
    model = build_backbone(name)
    fused = convert_to_mixmo(model, image_size=64).eval().fuse()
    assert type(fused) is type(model)
    other = build_backbone(name)
    other.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert largest_difference(other(x), model(x)) < 1e-4


def test_fused_timm_network_has_num_classes():
    model = create_model("timm/resnet10t", 3, image_size=(32, 32))
    assert model.fuse().num_classes == 3


@pytest.fixture(scope="module")
def resnet18():
    return build_backbone("resnet18")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_numbers_of_channels_have_equal_outputs_for_grey_images(resnet18, channels):
    model = resnet18
    grey = torch.randn(2, 1, 32, 32)
    expected = model(grey.expand(-1, 3, -1, -1))
    converted = convert_to_mixmo(model, image_size=32, in_channels=channels)
    actual = converted(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert converted.in_channels == channels
