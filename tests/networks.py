"""Networks to convert: by name, with weights that hide no error, and a small one."""

import timm
import torch
from torch import nn
from torchvision.models import (
    ConvNeXt,
    DenseNet,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    alexnet,
    get_model,
    vgg11_bn,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

NUM_CLASSES = 5


def with_narrow_classifier(function):
    """Build a network whose classifier has 64 units per layer in place of 4096."""
    with torch.device("meta"):  # initialising the wide classifier would take most of the time
        model = function()
    model.features.to_empty(device="cpu")
    linear = [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    inputs = model.classifier[linear[0]].in_features
    for i, features in zip(linear, [(inputs, 64), (64, 64), (64, NUM_CLASSES)], strict=True):
        model.classifier[i] = nn.Linear(*features)
    for layer in model.features:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return model


# Networks with all layers of those of these names, but with fewer blocks or channels, since the
# original ones take most of the time of the tests. Arguments of timm's networks, or functions.
SMALLER = {
    "resnext50_32x4d": lambda: ResNet(
        Bottleneck, [1, 1, 1, 1], NUM_CLASSES, groups=32, width_per_group=4
    ),
    "wide_resnet50_2": lambda: ResNet(Bottleneck, [1, 1, 1, 1], NUM_CLASSES, width_per_group=128),
    "alexnet": lambda: with_narrow_classifier(alexnet),
    "vgg11_bn": lambda: with_narrow_classifier(vgg11_bn),
    "densenet121": lambda: DenseNet(32, (2, 4, 4, 2), 64, num_classes=NUM_CLASSES),
    "convnext_tiny": lambda: ConvNeXt(
        [CNBlockConfig(24, 48, 2), CNBlockConfig(48, 96, 2), CNBlockConfig(96, None, 2)],
        stochastic_depth_prob=0.1,
        num_classes=NUM_CLASSES,
    ),
    "swin_t": lambda: SwinTransformer(
        [4, 4], 48, [2, 2, 2, 2], [3, 6, 12, 24], [7, 7],
        stochastic_depth_prob=0.2, num_classes=NUM_CLASSES,
    ),
    "vit_b_32": lambda: VisionTransformer(224, 32, 2, 4, 256, 512, num_classes=NUM_CLASSES),
    "timm/vit_tiny_patch16_224": {"depth": 4},
    "timm/tnt_s_legacy_patch16_224": {"depth": 2},
}  # fmt: skip


def build_backbone(name):
    torch.manual_seed(0)
    smaller = SMALLER.get(name, {})
    if name.startswith("timm/"):
        name = name.removeprefix("timm/")
        model = timm.create_model(name, num_classes=NUM_CLASSES, **smaller)
    elif smaller:
        model = smaller()
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


class SmallNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(4, 3), nn.Conv2d(2, 4, 3, stride=2, bias=True)

    def forward(self, x):
        return self.last(self.first(x).relu().mean((2, 3)))


class PaddedImage(SmallNetwork):
    """Pads the image to a multiple of 32; an image of 224 is not changed."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32)))


class NarrowResNet18(ResNet):
    """ResNet-18 with few channels after its first convolution, to be trained in little time."""

    def __init__(self, pretrained=False):
        assert not pretrained
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(self.inplanes, NUM_CLASSES)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)
