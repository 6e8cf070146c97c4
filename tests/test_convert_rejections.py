"""Networks that cannot be converted are rejected with a readable error."""

import pytest
import timm
import torch
from networks import PaddedImage, SmallNetwork
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model

from mixmo_fastai.errors import InputError
from mixmo_fastai.models import convert_to_mixmo


class ScaledImage(SmallNetwork):
    def forward(self, x):
        return super().forward(2 * x)


class NoiseInTraining(SmallNetwork):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


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
        ({"perturbation": 1.1}, "perturbation must be from 0 to 1"),
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


def test_images_that_the_network_pads_are_rejected():
    model = PaddedImage().eval()
    converted = convert_to_mixmo(model).eval()
    x = torch.randn(2, 2, 64, 96)
    torch.testing.assert_close(converted(x), model(x))
    small = x[..., :40]
    with pytest.raises(InputError, match="images of 64x40 to 64x64"):
        converted(small)
    torch.testing.assert_close(converted.fuse()(small), model(small))


def test_gradient_checkpointing_of_the_first_convolution_is_rejected():
    converted = convert_to_mixmo(GradientCheckpointing())
    with pytest.raises(InputError, match="Exclude it from gradient checkpointing"):
        converted(torch.randn(2, 2, 9, 9)).sum().backward()
