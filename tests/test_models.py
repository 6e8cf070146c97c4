import golden
import pytest
import torch
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights, mix_features
from mixmo_fastai.mixing.loss import MixMoLoss
from mixmo_fastai.models import MixMoModel, create_model
from mixmo_fastai.models.reference import load_reference_state_dict, rename


def published_model(name):
    facts = golden.facts(name)
    family = (
        "wrn{depth}_" if facts["reference_class"].startswith("wide") else "preact_resnet{depth}_"
    )
    arch = (family + "{widen_factor}").format(**facts)
    model = create_model(arch, facts["num_classes"], facts["num_members"])
    load_reference_state_dict(model, golden.published_weights(name))
    return model


@golden.needs_golden
@pytest.mark.parametrize("name", golden.NETWORKS)
class TestPublishedNetworks:
    def test_number_of_parameters(self, name):
        model = published_model(name)
        assert sum(p.numel() for p in model.parameters()) == golden.facts(name)["num_parameters"]

    def test_evaluation_logits(self, name):
        model, expected = published_model(name).eval(), golden.arrays(name)
        x = expected["inputs"][:, 0]
        with torch.no_grad():
            assert_all_close(model(x), expected["eval_logits"])
            assert_all_close(model.member_logits(x), expected["eval_member_logits"])

    def test_training_logits_loss_and_gradients(self, name):
        model, expected = published_model(name).train(), golden.arrays(name)
        pred = model(expected["inputs"], expected["masks"])
        assert_all_close(pred, expected["train_member_logits"])

        weights = loss_weights(expected["lam"], root=3)
        assert_all_close(weights, expected["loss_weights_root3"])
        loss = MixMoLoss()(pred, expected["labels"].long(), weights)
        assert_all_close(loss, expected["loss_root3"])

        loss.backward()
        parameters = dict(model.named_parameters())
        norms = golden.facts(name)["grad_norms_loss_root3"]
        assert len(norms) == len(parameters)
        for tensor, norm in norms.items():
            assert_all_close(parameters[rename(tensor)].grad.norm(), torch.tensor(norm))


def assert_all_close(actual, expected):
    """Check that the largest error is at most 1e-4 of the largest expected value."""
    error = (actual - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_number_of_parameters_of_wrn28_10():
    with torch.device("meta"):  # without values, which take long to draw
        model = create_model("wrn28_10", num_classes=100, num_members=2)
    assert sum(p.numel() for p in model.parameters()) == 36_601_416


@pytest.mark.parametrize("arch", ["wrn10_1", "preact_resnet18_1"])
@pytest.mark.parametrize("num_members", [1, 2, 3])
class TestMixMoModel:
    def test_training_and_inference_formulas_agree(self, arch, num_members):
        """Training with the same image for all members and masks of 1/M equals inference."""
        model = create_model(arch, 5, num_members).eval()
        x = torch.randn(3, 3, 16, 16)
        inputs = x[:, None].expand(-1, num_members, -1, -1, -1)
        masks = torch.full((3, num_members, 1, *model.mask_shape(16, 16)[1:]), 1 / num_members)
        torch.testing.assert_close(model(inputs, masks), model.member_logits(x))
        torch.testing.assert_close(model(x), model.member_logits(x).mean(1))

    def test_every_parameter_has_a_gradient(self, arch, num_members):
        model = create_model(arch, 5, num_members)
        kind = "cutmix" if num_members > 1 else "sum"
        lam = draw_lam(4, num_members, 2.0)
        masks, _ = draw_masks(kind, lam, model.mask_shape(16, 16))
        model(torch.randn(4, num_members, 3, 16, 16), masks).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad.abs().sum() > 0 for p in model.encoders.parameters())

    def test_fused_network_has_the_same_logits(self, arch, num_members):
        model = create_model(arch, 5, num_members).eval()
        _randomize_batch_norms(model)
        fused = model.fuse()
        x = torch.randn(3, 3, 16, 16)
        assert _relative_error(fused(x), model(x)) <= 1e-5
        assert not fused.training
        with torch.device("meta"):
            plain = create_model(arch, 5, 1)
        assert sum(p.numel() for p in fused.parameters()) == sum(
            p.numel() for p in plain.parameters()
        )

    def test_fused_network_with_its_members(self, arch, num_members):
        model = create_model(arch, 5, num_members).eval()
        _randomize_batch_norms(model)
        fused = model.fuse(keep_members=True)
        x = torch.randn(3, 3, 16, 16)
        assert fused.member_logits(x).shape == (3, num_members, 5)
        assert _relative_error(fused.member_logits(x), model.member_logits(x)) <= 1e-5
        assert _relative_error(fused(x), model(x)) <= 1e-5
        assert isinstance(fused.encoder, nn.Conv2d)
        assert isinstance(fused.head, nn.Linear)


def _randomize_batch_norms(model):
    """Draw the statistics and weights of all BatchNorm layers."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(generator=generator)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)


def _relative_error(actual, expected):
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def test_fuse_does_not_change_the_network():
    model = create_model("wrn10_1", 5, 2).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = model.fuse()
    for parameter in fused.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fuse_encoders_with_bias_and_heads_without():
    encoders = [nn.Conv2d(3, 4, 3) for _ in range(3)]
    heads = [nn.Linear(4, 5, bias=False) for _ in range(3)]
    core = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = MixMoModel(encoders, core, heads).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.fuse()(x), model(x))
    torch.testing.assert_close(
        model.fuse(keep_members=True).member_logits(x), model.member_logits(x)
    )


def two_heads():
    return [nn.Linear(4, 2), nn.Linear(4, 2)]


@pytest.mark.parametrize(
    ("encoders", "heads", "message"),
    [
        ([nn.Conv2d(3, 4, 1), nn.Identity()], two_heads(), "found Identity"),
        (
            [nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)],
            [nn.Linear(4, 2), nn.Flatten()],
            "found Flatten",
        ),
        (
            [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)],
            two_heads(),
            "differ in more than their weights",
        ),
    ],
)
def test_networks_that_cannot_be_fused_are_rejected(encoders, heads, message):
    model = MixMoModel(encoders, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), heads)
    with pytest.raises(InputError, match=message):
        model.fuse()


def test_model_mixes_like_mix_features():
    model = create_model("wrn10_1", 5, 3)
    inputs = torch.randn(4, 3, 3, 8, 8)
    masks, _ = draw_masks("cutmix", draw_lam(4, 3, 1.0), (16, 8, 8))
    features = torch.stack([c(inputs[:, i]) for i, c in enumerate(model.encoders)], dim=1)
    torch.testing.assert_close(model._mix(inputs, masks), mix_features(features, masks))


def test_mask_shape_is_the_shape_of_encoder_outputs():
    assert create_model("wrn10_1", 5).mask_shape(32, 30) == (16, 32, 30)
    assert create_model("preact_resnet18_1", 5, in_channels=1).mask_shape(64, 33) == (64, 32, 17)


def test_mask_shape_keeps_the_training_mode_and_statistics():
    model = create_model("wrn10_1", 5).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.mask_shape(8, 8)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_initialisation_is_truncated_he_normal():
    model = create_model("wrn10_2", 10, generator=torch.Generator().manual_seed(0))
    weight = model.core.groups[2][0].conv2.weight
    std = (2 / (128 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert weight.abs().max() <= 2 * std / 0.8796 + 1e-6
    assert all(head.bias.abs().max() == 0 for head in model.heads)
    head = create_model("preact_resnet18_1", 100).heads[0]
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_generator_determines_the_initial_weights():
    a, b = (
        create_model("wrn10_1", 5, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.encoders[0].weight, a.encoders[1].weight)


@pytest.mark.parametrize(
    ("arch", "hint"),
    [
        ("wrn28x10", "wrn28_10"),
        ("wrn27_2", "wrn22_2 or wrn28_2"),
        ("preact_resnet50_1", "depth 18"),
        ("wrn16_0", "width"),
        ("vgg", "Examples: wrn28_10"),
    ],
)
def test_impossible_architectures_are_rejected(arch, hint):
    with pytest.raises(InputError, match=hint):
        create_model(arch, 10)


def test_numbers_out_of_range_are_rejected():
    with pytest.raises(InputError, match="num_members"):
        create_model("wrn10_1", 10, num_members=0)
    with pytest.raises(InputError, match="num_classes"):
        create_model("wrn10_1", 0)
    with pytest.raises(InputError, match="2 encoders and 1 heads"):
        MixMoModel([nn.Identity(), nn.Identity()], nn.Identity(), [nn.Identity()])


def test_weights_of_another_network_are_rejected():
    model = create_model("wrn10_1", 10, num_members=1)
    before = model.encoders[0].weight.clone()
    with pytest.raises(InputError, match=r"encoders\.0\.weight is missing"):
        load_reference_state_dict(model, {"fc.weight": torch.zeros(10, 64)})
    assert torch.equal(model.encoders[0].weight, before)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (10, 7), (50, 35), (62, 51)])
@pytest.mark.parametrize("arch", ["wrn10_1", "wrn16_1", "preact_resnet18_1"])
def test_images_of_any_size(arch, size):
    model = create_model(arch, 5, 2)
    masks, _ = draw_masks("cutmix", draw_lam(2, 2, 2.0), model.mask_shape(*size))
    assert model(torch.randn(2, 2, 3, *size), masks).shape == (2, 2, 5)


class Tokens(nn.Module):
    """A patch embedding that flattens the feature map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)


class DataDependentEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x) if x.sum().item() else x


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Tokens, r"Tokens returns \(B, 4, 8\); expected feature maps"),
        (DataDependentEncoder, r"output shape of encoder DataDependentEncoder for images of"),
    ],
)
def test_encoders_with_unknown_output_shape_are_rejected(encoder, message):
    model = MixMoModel([encoder(), encoder()], nn.Identity(), [nn.Linear(8, 2), nn.Linear(8, 2)])
    with pytest.raises(InputError, match=message) as caught:
        model.mask_shape(8, 8)
    assert len(str(caught.value).splitlines()) <= 3


def test_lazy_encoders_have_their_own_message():
    model = MixMoModel([nn.LazyConv2d(8, 3)], nn.Identity(), [nn.Linear(8, 2)])
    with pytest.raises(InputError, match="run lazy layers on one batch first"):
        model.mask_shape(8, 8)
