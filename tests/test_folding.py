"""BatchNorm folded into convolutions, in networks for inference."""

import threading
from functools import partial

import pytest
import torch
from networks import build_backbone
from torch import nn
from torch.nn.utils import parametrizations

from mixmo_fastai import create_model
from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.models.folding import _is_equal, fold_batch_norm
from mixmo_fastai.models.ghost_norm import GhostBatchNorm2d, use_ghost_batches


def trained(network):
    """Give BatchNorm layers statistics and weights as after training."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms(network):
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_(std=0.1, generator=generator)
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2, generator=generator)
    return network.eval()


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def images(size=16, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal_outputs(actual, expected, x):
    with torch.no_grad():
        torch.testing.assert_close(actual(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "remaining"),  # in each block of the first two, one of two follows a sum
    [
        ("wrn10_1", 4),
        pytest.param("preact_resnet18_1", 8, marks=pytest.mark.slow),
        pytest.param("resnet18", 1, marks=pytest.mark.slow),
    ],
)
def test_networks_have_equal_outputs(arch, remaining):
    network, x = trained(create_model(arch, num_classes=4)), images(32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norm(network, x)
    assert len(norms(folded)) == remaining < len(norms(network))
    assert_equal_outputs(folded, network, x)
    assert_equal_outputs(folded.member_logits, network.member_logits, x)
    assert_equal_outputs(folded, network, images(20))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not folded.training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/efficientnet_b0"])
def test_all_norms_of_post_activation_networks_are_folded(name):
    network, x = trained(build_backbone(name)), images(64)
    folded = fold_batch_norm(network, x)
    assert norms(network)
    assert not norms(folded)
    assert_equal_outputs(folded, network, x)


@pytest.mark.parametrize("keep_members", [False, True])
def test_fused_mixmo_networks_have_equal_outputs(keep_members):
    network, x = trained(create_model("wrn10_1", num_classes=4)), images()
    fused = network.fuse(keep_members=keep_members)
    folded = fold_batch_norm(fused, x)
    assert len(norms(folded)) == 4
    assert_equal_outputs(folded, network, x)


def test_ghost_batches_are_folded():
    network, x = trained(create_model("wrn10_1", num_classes=4)), images()
    expected = network(x)
    use_ghost_batches(network, 16)
    folded = fold_batch_norm(network, x)
    assert sum(isinstance(m, GhostBatchNorm2d) for m in folded.modules()) == 4
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)


class Layers(nn.Module):
    """A convolution and BatchNorm, connected by a function."""

    def __init__(self, connect, conv=None, norm=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = norm or nn.BatchNorm2d(3)
        self.connect = connect

    def forward(self, x):
        return self.connect(self, x)


def directly(layers, x):
    return layers.norm(layers.conv(x))


def with_a_shortcut(layers, x):
    y = layers.conv(x)
    return layers.norm(y) + y


def with_two_convolutions(layers, x):
    return layers.norm(layers.conv(x)) + layers.norm(x)


def with_a_recurrent_convolution(layers, x):
    return layers.conv(layers.norm(layers.conv(x)))


def with_a_changed_output(layers, x):
    return layers.norm(layers.conv(x).mul_(2))


def with_other_layers_between(layers, x):
    return layers.norm(layers.conv(x).relu())


def with_a_use_in_a_list(layers, x):
    y = layers.conv(x)
    return torch.cat([layers.norm(y), y], 1)


def with_a_use_of_the_weight(layers, x):
    return layers.norm(layers.conv(x)) * layers.conv.weight.mean()


def with_a_use_of_the_norm(layers, x):
    return layers.norm(layers.conv(x)) * layers.norm.weight.mean()


def with_an_attribute_of_the_norm(layers, x):
    return layers.norm(layers.conv(x)) * layers.norm.num_features


CONNECTIONS = (
    with_a_shortcut,
    with_two_convolutions,
    with_a_recurrent_convolution,
    with_a_changed_output,
    with_other_layers_between,
    with_a_use_in_a_list,
    with_a_use_of_the_weight,
    with_a_use_of_the_norm,
    with_an_attribute_of_the_norm,
)


@pytest.mark.parametrize("connect", CONNECTIONS)
def test_layers_are_not_folded_if_that_is_not_exact(connect):
    network, x = trained(Layers(connect)), images()
    assert fold_batch_norm(network, x) is network


def test_an_excluded_class_does_not_hide_a_difference():
    expected = torch.tensor([[0.3, -0.2, -1e9], [0.1, 0.4, -1e9]])
    assert _is_equal(expected * (1 + 1e-6), expected)
    assert not _is_equal(expected + torch.tensor([0.1, 0.0, 0.0]), expected)
    # Rounding errors of a class whose logits are all close to zero are on the scale of the others.
    near_zero = torch.tensor([[0.3, 1e-9, 0.1], [0.1, 1e-9, 0.4]])
    assert _is_equal(near_zero + 1e-7, near_zero)


def test_other_uses_before_and_sizes_do_not_prevent_folding():
    def connect(layers, x):
        y = layers.conv(x.relu() + x)
        assert y.shape == x.shape
        assert y.dim() == 4
        return layers.norm(y).relu()

    network, x = trained(Layers(connect)), images()
    folded = fold_batch_norm(network, x)
    assert isinstance(folded.norm, nn.Identity)
    assert_equal_outputs(folded, network, x)


class DoublingConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def training(layer):
    layer.train = lambda mode=True: layer  # stays in training mode, such as a norm in MC dropout
    return layer


conv = partial(nn.Conv2d, 3, 3, 3, padding=1)


@pytest.mark.parametrize(
    "parts",
    [
        {"conv": DoublingConv(3, 3, 3, padding=1)},
        {"norm": DoublingNorm(3)},
        {"conv": hooked(conv())},
        {"norm": hooked(nn.BatchNorm2d(3))},
        {"conv": parametrizations.weight_norm(conv())},
        {"norm": training(nn.BatchNorm2d(3))},
    ],
)
def test_other_layers_are_not_folded(parts):
    network = trained(Layers(directly, **parts))
    assert fold_batch_norm(network, images()) is network


def test_norms_without_statistics_are_not_folded():
    network = Layers(directly, norm=nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert fold_batch_norm(network, images()) is network


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}, {"padding_mode": "reflect"}])
def test_every_kind_of_convolution_is_folded(bias, affine, layout, options):
    settings = {"padding": 1, "bias": bias, **options}
    network = Layers(directly, nn.Conv2d(4, 6, 3, **settings), nn.BatchNorm2d(6, affine=affine))
    network.norm.running_mean.uniform_()
    network = network.eval().to(memory_format=layout)
    x = images(channels=4)
    folded = fold_batch_norm(network, x)
    assert isinstance(folded.norm, nn.Identity)
    assert folded.conv.weight.is_contiguous(memory_format=layout)
    assert_equal_outputs(folded, network, x)


def test_networks_that_cannot_be_copied_or_have_nan_are_used_as_they_are():
    network = trained(Layers(directly))
    network.lock = threading.Lock()
    assert fold_batch_norm(network, images()) is network
    del network.lock
    network.conv.weight.data[0, 0, 0, 0] = torch.nan
    assert fold_batch_norm(network, images()) is network


def test_evaluation_folds_and_leaves_the_network_unchanged(monkeypatch):
    network, x = trained(create_model("wrn10_1", num_classes=4)), images()
    expected = network.member_logits(x).detach()
    calls = []
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(
        nn.BatchNorm2d, "forward", lambda self, x: calls.append(len(x)) or forward(self, x)
    )
    batches = [(x, torch.zeros(2, dtype=torch.int64))] * 5
    logits, _ = collect_member_logits(network.train(), batches)
    assert network.training
    torch.testing.assert_close(logits, expected.repeat(5, 1, 1), rtol=1e-4, atol=1e-4)
    # 7 layers in the first two batches and in the pass that finds pairs; then 4.
    assert len(calls) == 3 * 7 + 4 + 3 * 4
