"""Conversion of other networks: equal outputs, gradients everywhere, readable errors."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from fastai.layers import SigmoidRange
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model

from mixmo_fastai.errors import InputError
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
NUM_CLASSES = 5


def build_backbone(name):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"), num_classes=NUM_CLASSES)
    else:
        auxiliary = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = get_model(name, num_classes=NUM_CLASSES, **auxiliary)
    for module in model.modules():  # heads and norms initialised with zeros would hide errors
        if isinstance(module, nn.Linear) and module.out_features == NUM_CLASSES:
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model.eval()


def largest_difference(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Return a network, its original weights, the converted network and an image size."""
    model = build_backbone(request.param)
    before = copy.deepcopy(model.state_dict())
    return model, before, convert_to_mixmo(model, 2), FAMILIES[request.param]


@pytest.mark.slow
def test_converted_network_has_equal_outputs(family):
    model, before, converted, size = family
    converted.eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        assert largest_difference(converted(x), expected) < 1e-4
        assert largest_difference(converted.fuse()(x), expected) < 1e-4
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
    converted = convert_to_mixmo(build_backbone("resnet18"), 2).eval()
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


class SmallNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(4, 3), nn.Conv2d(2, 4, 3, stride=2, bias=True)

    def forward(self, x):
        return self.last(self.first(x).relu().mean((2, 3)))


@pytest.mark.parametrize("names", [{}, {"encoder": "first", "head": "last"}])
@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_custom_network(names, num_members):
    model, x = SmallNetwork(), torch.randn(2, 2, 9, 9)
    converted = convert_to_mixmo(model, num_members, **names)
    torch.testing.assert_close(converted(x), model(x))
    assert converted.num_members == num_members
    weights = torch.stack([encoder.weight for encoder in converted.encoders])
    torch.testing.assert_close(weights.sum(dim=0), model.first.weight)


def test_training_modes_of_all_parts_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 3, 8, 8))
    model[1].eval()
    converted = convert_to_mixmo(model.train(False).train(), 2, image_size=8)
    assert converted.training
    model[1].eval()
    converted = convert_to_mixmo(model, 2, image_size=8)
    assert model.training
    assert not model[1].training


class ScaledImage(SmallNetwork):
    def forward(self, x):
        return super().forward(2 * x)


class NoiseInTraining(SmallNetwork):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


class PaddedImage(SmallNetwork):
    """Pads the image to a multiple of 32; an image of 224 is not changed."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32)))


class PixelUnshuffle(SmallNetwork):
    """Rearranges pixels into channels before the first convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(48, 4, 3)

    def forward(self, x):
        return super().forward(nn.functional.pixel_unshuffle(x, 4))


class StridedHead(SmallNetwork):
    """Ends with a strided convolution, which is not equivalent to a linear layer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 3, 1, stride=2)

    def forward(self, x):
        features = nn.functional.adaptive_avg_pool2d(self.first(x).relu(), 2)
        return self.last(features).flatten(1)


class TiedWeights(SmallNetwork):
    """Two layers share their weights."""

    def __init__(self):
        super().__init__()
        self.between, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between.weight = self.last.weight

    def forward(self, x):
        return self.last(self.between(self.first(x).relu().mean((2, 3))))


class FiniteLogitsRequired(SmallNetwork):
    """Fails if the logits are not finite."""

    def forward(self, x):
        logits = super().forward(x)
        assert logits.isfinite().all()
        return logits


class GradientCheckpointing(SmallNetwork):
    """Computes the first convolution again in the backward pass."""

    def forward(self, x):
        features = checkpoint(lambda x: self.first(x).square(), x, use_reentrant=False)
        return self.last(features.mean((2, 3)))


class ChangedAtOneSize(SmallNetwork):
    def forward(self, x):
        return super().forward(x + (x.shape[2] == 97))


class Softmax(SmallNetwork):
    def forward(self, x):
        return super().forward(x).softmax(1)


class ClampedLogits(SmallNetwork):
    """Clamps the logits, which changes only large values."""

    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class RectifiedLogits(SmallNetwork):
    def forward(self, x):
        return super().forward(x).relu()


class TwoPasses(SmallNetwork):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class TwoFirstConvolutions(SmallNetwork):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(2, 4, 3, stride=2)

    def forward(self, x):
        return self.last((self.first(x) + self.other(x)).relu().mean((2, 3)))


class TwoFirstConvolutionsInTraining(TwoFirstConvolutions):
    def forward(self, x):
        return super().forward(x) if self.training else SmallNetwork.forward(self, x)


class AuxiliaryOutput(SmallNetwork):
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)


class LogSoftmaxInTraining(SmallNetwork):
    def forward(self, x):
        logits = super().forward(x)
        return logits.log_softmax(1) if self.training else logits


class RectifiedInPlace(SmallNetwork):
    """Changes the logits in place with a function, not with a layer."""

    def forward(self, x):
        return super().forward(x).relu_()


class SigmoidInEvaluation(SmallNetwork):
    """Applies its output layer only in evaluation."""

    def __init__(self):
        super().__init__()
        self.bound = nn.Sigmoid()

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training else self.bound(logits)


class SigmoidUsedTwice(SmallNetwork):
    """Uses its output layer also between other layers."""

    def __init__(self):
        super().__init__()
        self.bound, self.between = nn.Sigmoid(), nn.Linear(4, 4)

    def forward(self, x):
        return self.bound(self.last(self.bound(self.between(self.first(x).mean((2, 3))))))


class DropoutOfLogits(SmallNetwork):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class StoredActivations(SmallNetwork):
    def forward(self, x):
        self.stored = self.first(x).relu()
        return self.last(self.stored.mean((2, 3)))


def network_with_stored_activations():
    model = StoredActivations()
    model(torch.randn(1, 2, 9, 9))
    return model


class TupleOutput(SmallNetwork):
    def forward(self, x):
        return super().forward(x), x


class FailingNetwork(SmallNetwork):
    def forward(self, x):
        raise RuntimeError("forward fails")


class WeightDtype(SmallNetwork):
    def forward(self, x):
        return super().forward(x.to(self.first.weight.dtype))


class TwoHeads(SmallNetwork):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 3)

    def forward(self, x):
        features = self.first(x).relu().mean((2, 3))
        return (self.last(features) + self.other(features)) / 2


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


def network_with_standardised_convolution():
    model = SmallNetwork()
    model.first = StandardisedConv2d(2, 4, 3)
    nn.init.zeros_(model.last.weight)  # the error must not depend on the head
    return model


def network_with_normalised_layer(name, normalise):
    model = SmallNetwork()
    setattr(model, name, normalise(getattr(model, name)))
    return model


def network_on_meta_device():
    with torch.device("meta"):
        return SmallNetwork()


UNSUPPORTED = {
    "no convolution": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), "has no convolution"),
    "no linear layer": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1)), "MixMo needs logits"),
    "ends with a convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "does not end with a linear layer",
    ),
    "softmax": (Softmax, "does not end with linear layer 'last'"),
    "relu of logits": (RectifiedLogits, "does not end with linear layer 'last'"),
    "in-place relu of logits": (RectifiedInPlace, "does not end with linear layer 'last'"),
    "softmax layer": (
        lambda: nn.Sequential(SmallNetwork(), nn.Softmax(1)),
        "does not end with linear",
    ),
    "dropout layer": (lambda: nn.Sequential(SmallNetwork(), nn.Dropout()), "last' in training"),
    "batch norm of logits": (
        lambda: nn.Sequential(SmallNetwork(), nn.BatchNorm1d(3)),
        "does not end with linear",
    ),
    "output layer only in evaluation": (
        SigmoidInEvaluation,
        "does not end with linear layer 'last'",
    ),
    "output layer used twice": (SigmoidUsedTwice, "does not end with linear layer 'last'"),
    "clamped logits": (ClampedLogits, "does not end with linear layer 'last'"),
    "two heads": (TwoHeads, "does not end with linear layer 'other'"),
    "distilled transformer": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
        "does not end with linear",
    ),
    "image is scaled": (ScaledImage, "changes the image before its first convolution, 'first'"),
    "noise in training": (NoiseInTraining, "changes the image in training before its first"),
    "pixel unshuffle": (PixelUnshuffle, "changes the image before its first convolution, 'first'"),
    "tied weights": (TiedWeights, "'last' of TiedWeights shares its weights with 'between'"),
    "strided head": (StridedHead, "does not end with a linear layer"),
    "image is changed at one size": (ChangedAtOneSize, "changes the image of 97x97"),
    "dropout of the image": (
        lambda: nn.Sequential(nn.Dropout(0.5), SmallNetwork()),
        "image in training before",
    ),
    "two first convolutions in training": (
        TwoFirstConvolutionsInTraining,
        "passes the image in training to more layers",
    ),
    "auxiliary output": (AuxiliaryOutput, "does not end with 'last' in training"),
    "softmax in training": (LogSoftmaxInTraining, "does not end with 'last' in training"),
    "dropout of logits": (DropoutOfLogits, "does not end with 'last' in training"),
    "stored activations": (
        network_with_stored_activations,
        "cannot be copied: RuntimeError: Only Tensors created explicitly",
    ),
    "reads the dtype of weights": (
        WeightDtype,
        "without its first convolution and last layer: AttributeError",
    ),
    "lazy layers": (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), "uninitialised lazy layers"),
    "meta device": (network_on_meta_device, "is on the meta device"),
    "name instead of a network": (lambda: "resnet18", "model must be a network .*; got 'resnet18'"),
    "spectral norm": (
        lambda: network_with_normalised_layer("first", spectral_norm),
        "'first' .* computes its weights",
    ),
    "weight norm": (
        lambda: network_with_normalised_layer("last", weight_norm),
        "'last' .* computes its weights",
    ),
    "two passes": (TwoPasses, "calls its convolution 'first' 2 times"),
    "two first convolutions": (TwoFirstConvolutions, "passes the image to more layers than"),
    "tuple output": (TupleOutput, "returns tuple"),
    "failing forward pass": (FailingNetwork, "forward fails"),
    "standardised weights": (
        network_with_standardised_convolution,
        "'first' .*not linear in its weights",
    ),
    "squeezenet": (lambda: get_model("squeezenet1_1"), "does not end with a linear layer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_networks_are_explained(case):
    make, message = UNSUPPORTED[case]
    with pytest.raises(InputError, match=message) as caught:
        convert_to_mixmo(make())
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "last"}, "encoder must name a convolution of SmallNetwork; got 'last'"),
        ({"head": "first"}, "does not end with 'first'"),
        ({"num_members": 0}, "num_members must be an integer, 1 or more"),
        ({"perturbation": 1.0}, "perturbation must be"),
        ({"num_members": 2.5}, "num_members must be an integer"),
        ({"num_classes": 0}, "num_classes must be an integer"),
        ({"image_size": "64"}, "image_size must be a number of pixels or"),
        ({"image_size": (64, 0)}, "image_size must be a number of pixels or"),
        ({"image_size": 1}, "does not accept images of 1x1: RuntimeError"),
        ({"in_channels": 0}, "in_channels must be an integer, 1 or more"),
    ],
)
def test_invalid_arguments_are_explained(arguments, message):
    with pytest.raises(InputError, match=message):
        convert_to_mixmo(SmallNetwork(), **arguments)


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


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 97])
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "densenet121", "mobilenet_v2"])
def test_images_of_other_sizes(name, size):
    model = build_backbone(name)
    converted, x = convert_to_mixmo(model).eval(), torch.randn(2, 3, size, size)
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
    fused = convert_to_mixmo(model).eval().fuse()
    assert type(fused) is type(model)
    other = build_backbone(name)
    other.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert largest_difference(other(x), model(x)) < 1e-4


def test_images_that_the_network_pads_are_rejected():
    model = PaddedImage().eval()
    converted = convert_to_mixmo(model).eval()
    x = torch.randn(2, 2, 64, 96)
    torch.testing.assert_close(converted(x), model(x))
    small = x[..., :40]
    with pytest.raises(InputError, match="images of 64x40 to 64x64"):
        converted(small)
    torch.testing.assert_close(converted.fuse()(small), model(small))


@pytest.fixture
def dynamo():
    """Return torch.compile with a backend for tests; reset the compiler before and after."""
    torch.compiler.reset()
    yield partial(torch.compile, backend="eager")
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_network_rejects_images_that_it_pads(dynamo):
    compiled = dynamo(convert_to_mixmo(PaddedImage()).eval())
    with torch.no_grad(), pytest.raises(InputError, match="images of 64x40 to 64x64"):
        compiled(torch.randn(2, 2, 64, 40))


def test_gradient_checkpointing_of_the_first_convolution_is_rejected():
    converted = convert_to_mixmo(GradientCheckpointing())
    with pytest.raises(InputError, match="Exclude it from gradient checkpointing"):
        converted(torch.randn(2, 2, 9, 9)).sum().backward()


def test_fused_timm_network_has_num_classes():
    model = create_model("timm/resnet10t", 3, image_size=(32, 32))
    assert model.fuse().num_classes == 3


@pytest.mark.slow
def test_independent_members_are_permutations():
    model = build_backbone("resnet18")
    converted = convert_to_mixmo(model, 3, independent=True)
    for layers, original in ((converted.encoders, model.conv1), (converted.heads, model.fc)):
        weights = torch.stack([layer.weight.flatten() for layer in layers]).detach()
        assert torch.equal(
            weights.sort().values, original.weight.flatten().sort().values.expand(3, -1)
        )
        assert torch.corrcoef(weights).triu(1).abs().max() < 0.1


@pytest.mark.slow
def test_dtypes_of_all_parts_are_kept():
    model = build_backbone("resnet18").half()
    model.bn1.float()
    model.register_buffer("double_buffer", torch.full((1,), 1 / 3, dtype=torch.float64))
    body = convert_to_mixmo(model).core.body
    assert body.bn1.weight.dtype == torch.float32
    assert body.layer1[0].conv1.weight.dtype == torch.float16
    assert torch.equal(body.double_buffer, model.double_buffer)


class RandomForward(SmallNetwork):
    def forward(self, x):
        features = self.first(x).relu().mean((2, 3))
        return self.last(features + 0 * torch.randn_like(features))


def test_global_generator_is_restored_after_random_forward_passes():
    state = torch.get_rng_state()
    convert_to_mixmo(model := RandomForward(), generator=torch.Generator())
    assert not torch.equal(torch.get_rng_state(), state)  # creating the network changes the state
    state = torch.get_rng_state()
    convert_to_mixmo(model, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_weights_is_kept(dtype):
    model = build_backbone("resnet18").to(dtype)
    converted = convert_to_mixmo(model)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert {p.dtype for p in model.parameters()} == {dtype}
    if dtype == torch.float64:
        x = torch.randn(2, 3, 32, 32, dtype=dtype)
        torch.testing.assert_close(converted.eval()(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_conversion_inside_autocast():
    model, x = build_backbone("resnet18"), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        converted = convert_to_mixmo(model)
    with torch.no_grad():
        assert largest_difference(converted.eval()(x), model(x)) < 1e-4


def test_frozen_core_stays_frozen_but_encoders_and_heads_train():
    model = build_backbone("resnet18").requires_grad_(False)
    converted = convert_to_mixmo(model)
    trainable = {name.split(".")[0] for name, p in converted.named_parameters() if p.requires_grad}
    assert trainable == {"encoders", "heads"}


def test_network_with_nan_weights_is_converted():
    model = SmallNetwork()
    nn.init.constant_(model.last.weight, float("nan"))
    assert convert_to_mixmo(model)(torch.randn(1, 2, 9, 9)).isnan().all()


def test_conversion_does_not_change_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    convert_to_mixmo(model, generator=torch.Generator(), num_classes=7, image_size=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_inference_in_several_threads():
    """Each thread receives the predictions for its own images."""
    converted = convert_to_mixmo(build_backbone("resnet18")).eval()
    images = torch.randn(8, 1, 3, 32, 32)
    with torch.no_grad():
        expected = [converted(image) for image in images]

        def predict(number):
            with torch.no_grad():
                return number, converted(images[number])

        with ThreadPoolExecutor(4) as pool:
            for number, actual in pool.map(predict, [*range(8)] * 15):
                torch.testing.assert_close(actual, expected[number])


def test_copies_and_pickles_have_equal_outputs():
    converted, x = convert_to_mixmo(SmallNetwork()), torch.randn(2, 2, 9, 9)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(other(x), converted(x))


def test_features_are_not_kept_after_the_forward_pass():
    converted = convert_to_mixmo(SmallNetwork())
    converted(torch.randn(2, 2, 9, 9))
    assert converted.core.body.first.of_thread.features is None

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    converted.core.body.last.register_forward_hook(stop)
    with pytest.raises(StopError):
        converted(torch.randn(2, 2, 9, 9))
    assert converted.core.body.first.of_thread.features is None


@pytest.mark.slow
def test_compilation_and_export_without_graph_breaks(dynamo):
    converted, x = convert_to_mixmo(build_backbone("resnet18")).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = converted(x)
        compiled = dynamo(converted, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        for model in (converted, converted.fuse()):
            exported = torch.export.export(model, (x,)).module()
            torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-3)


class GraphBreak(SmallNetwork):
    """Cannot be compiled as one graph."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


@pytest.mark.slow
def test_compilation_with_graph_breaks(dynamo):
    converted, x = convert_to_mixmo(GraphBreak()).eval(), torch.randn(2, 2, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(dynamo(converted)(x), converted(x))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_numbers_of_channels_have_equal_outputs_for_grey_images(channels):
    model = build_backbone("resnet18")
    grey = torch.randn(2, 1, 32, 32)
    expected = model(grey.expand(-1, 3, -1, -1))
    converted = convert_to_mixmo(model, in_channels=channels)
    actual = converted(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert converted.in_channels == channels


OUTPUTS = {
    "y_range": lambda: SigmoidRange(-1, 6),
    "y_range per output": lambda: SigmoidRange(torch.tensor([0.0, 1, 2]), torch.tensor(7.0)),
    "sigmoid": nn.Sigmoid,
    "tanh and inactive layers": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.0), nn.Identity()),
    "in-place relu": lambda: nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_layer_after_the_last_linear_layer(name):
    torch.manual_seed(0)
    model = nn.Sequential(SmallNetwork(), OUTPUTS[name]()).eval()
    x = torch.randn(4, 2, 9, 9)
    with torch.no_grad():
        converted = convert_to_mixmo(model)
        torch.testing.assert_close(converted(x), model(x))
        for head in converted.heads:  # different members, as after training
            nn.init.normal_(head.weight, std=2.0)
        expected = converted.output(converted.member_logits(x).mean(dim=1))
        assert torch.equal(converted(x), expected)
        mean_of_predictions = converted.predictions(converted.member_logits(x)).mean(dim=1)
        assert (converted(x) - mean_of_predictions).abs().max() > 1e-2
        fused = converted.fuse()
        assert type(fused) is nn.Sequential
        assert not fused.training
        torch.testing.assert_close(fused(x), expected)
        fused_members = converted.fuse(keep_members=True)
        torch.testing.assert_close(fused_members(x), expected)
        torch.testing.assert_close(fused_members.member_logits(x), converted.member_logits(x))


def test_members_predict_within_the_range_in_training():
    converted = convert_to_mixmo(nn.Sequential(SmallNetwork(), SigmoidRange(2, 3)))
    nn.init.normal_(converted.heads[0].weight, std=20.0)
    x = torch.randn(4, 2, 2, 9, 9)
    masks = torch.full((4, 2, 1, *converted.mask_shape(9, 9)[1:]), 0.5)
    predictions = converted.train()(x, masks)
    assert predictions.shape == (4, 2, 3)
    assert predictions.min() >= 2
    assert predictions.max() <= 3


def test_output_layer_adds_no_tensors_and_old_pickles_load():
    unbounded, bounded = (
        convert_to_mixmo(m) for m in (SmallNetwork(), nn.Sequential(SmallNetwork(), nn.Sigmoid()))
    )
    assert len(unbounded.state_dict()) == len(bounded.state_dict())
    # Pickles of version 0.1.0 have no attribute `output`.
    del unbounded.__dict__["output"], unbounded.core.__dict__["output"]
    loaded = pickle.loads(pickle.dumps(unbounded))
    x = torch.randn(4, 2, 9, 9)
    assert torch.equal(loaded(x), unbounded(x))
    torch.testing.assert_close(loaded.eval().fuse()(x), unbounded(x))
