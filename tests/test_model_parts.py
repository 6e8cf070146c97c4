"""Layers, shapes and dtypes of the parts of MixMo and fused networks."""

import pytest
import torch
from learners import small_network
from torch import nn

from mixmo_fastai.errors import InputError
from mixmo_fastai.models import convert_to_mixmo, create_model
from mixmo_fastai.models.backbone_core import BackboneCore
from mixmo_fastai.models.fused import fuse_parts, run_core
from mixmo_fastai.models.mixmo_model import (
    MixMoModel,
    _in_fast_layout,
    find_first_difference,
    unwrap,
)
from mixmo_fastai.models.readout import Readout, average, embed


def small_model(encoders=None, heads=None, **options):
    encoders = encoders or [nn.Conv2d(3, 4, 3) for _ in range(2)]
    heads = heads or [nn.Linear(4, 5) for _ in encoders]
    core = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MixMoModel(encoders, core, heads, **options)


class TestDtypes:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_logits_have_at_least_single_precision(self, dtype, expected):
        model = create_model("wrn10_1", 5).to(dtype)
        x, masks = torch.zeros(2, 2, 3, 8, 8, dtype=dtype), torch.full((2, 2, 1, 8, 8), 0.5)
        assert model(x, masks.to(dtype)).dtype == model(x[:, 0]).dtype == expected

    def test_masks_are_copied_to_all_channels_in_bfloat16_only(self):
        mask = torch.rand(2, 1, 4, 4)
        for dtype, channels in ((torch.bfloat16, 8), (torch.float32, 1), (torch.float64, 1)):
            features = torch.zeros(2, 8, 4, 4, dtype=dtype, requires_grad=True)
            converted = _in_fast_layout(mask, features)
            assert converted.shape == (2, channels, 4, 4)
            assert converted.dtype == dtype
            assert not converted.requires_grad
            assert torch.equal(converted, mask.to(dtype).expand_as(converted))
        meta = _in_fast_layout(mask.to("meta"), torch.zeros(2, 8, 4, 4, device="meta").bfloat16())
        assert meta.shape == (2, 1, 4, 4)


class TestMaskShape:
    def test_it_is_computed_once_per_size(self):
        model = small_model()
        assert model.mask_shape(8, 10) == (4, 6, 8)
        assert model.mask_shape(8, 10) is model.mask_shape(8, 10)
        assert model.mask_shape(10, 8) == (4, 8, 6)

    def test_encoders_with_different_outputs_are_rejected(self):
        model = small_model([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)])
        with pytest.raises(InputError, match=r"equal shape.*\(4, 6, 6\), \(4, 4, 4\)"):
            model.mask_shape(8, 8)

    def test_the_first_line_of_an_error_is_the_reason(self):
        class Fails(nn.Conv2d):
            def forward(self, x):
                raise RuntimeError("first line\nsecond line")

        with pytest.raises(InputError, match=r"\(3, 8, 8\): first line\nMasks need this shape"):
            small_model([Fails(3, 4, 3) for _ in range(2)]).mask_shape(8, 8)

    def test_image_channels_are_those_of_the_first_layer(self):
        assert small_model([nn.Conv2d(7, 4, 3), nn.Conv2d(7, 4, 3)]).in_channels == 7
        linear = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4))]
        assert MixMoModel(linear, nn.Identity(), [nn.Linear(4, 2)]).in_channels == 12
        with pytest.raises(InputError, match="number of image channels"):
            MixMoModel([nn.Identity()], nn.Identity(), [nn.Linear(4, 2)]).mask_shape(4, 4)

    def test_encoders_that_are_not_plain_convolutions_run_with_their_hooks_off(self):
        def fail(*_):
            raise AssertionError("hook was called")

        encoders = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2)]
        for encoder in encoders:
            encoder.register_forward_hook(fail)
        assert small_model(encoders).mask_shape(8, 8) == (4, 6, 6)


class TestParts:
    def test_cores_of_other_outputs_are_rejected(self):
        heads = [nn.Linear(4, 5) for _ in range(2)]
        encoders = [nn.Conv2d(3, 4, 3) for _ in range(2)]
        for core, message in (
            (nn.Identity(), r"returned \(2, 4, 6, 6\); the heads need \(B, 4\)"),
            (nn.Flatten(), r"returned \(2, 144\); the heads need \(B, 4\)"),
        ):
            with pytest.raises(InputError, match=message):
                MixMoModel(encoders, core, heads)(torch.zeros(2, 3, 8, 8))
        sequence = [nn.Sequential(nn.Linear(4, 5)) for _ in range(2)]
        with pytest.raises(InputError, match=r"the heads need \(B, features\)"):
            MixMoModel(encoders, nn.Identity(), sequence)(torch.zeros(2, 3, 8, 8))

    def test_members_must_have_modules_of_their_own(self):
        shared, head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        with pytest.raises(InputError, match="encoders must be separate modules"):
            small_model([shared, shared])
        with pytest.raises(InputError, match="heads must be separate modules"):
            small_model(heads=[head, head])
        with pytest.raises(InputError, match="encoders must be a list of modules"):
            small_model(shared, [head])
        with pytest.raises(InputError, match="encoders must be modules; got 3"):
            small_model([shared, 3])
        for container in (nn.ModuleList, lambda layers: nn.Sequential(*layers)):
            encoders = container([nn.Conv2d(3, 4, 3) for _ in range(2)])
            assert small_model(encoders, [nn.Linear(4, 5) for _ in range(2)]).num_members == 2
        with pytest.raises(InputError, match="0 encoders and 0 heads"):
            MixMoModel([], nn.Identity(), [])

    def test_wrappers_are_removed(self):
        model = small_model()

        class Compiled(nn.Module):
            def __init__(self, module):
                super().__init__()
                self._orig_mod = module

        for wrapped in (model, nn.DataParallel(model), Compiled(model)):
            assert unwrap(wrapped) is model
        assert unwrap(nn.DataParallel(Compiled(model))) is model
        plain = nn.Linear(2, 2)
        assert unwrap(plain) is plain

    def test_weights_of_the_unconverted_network_are_explained(self):
        original = small_network()
        model = convert_to_mixmo(original, num_classes=3)
        weights, saved = original.state_dict(), model.state_dict()
        with pytest.raises(InputError, match="saved before the network was converted"):
            model.load_state_dict(weights)
        for others in ({"other.weight": torch.zeros(2)}, weights | saved, {}):
            with pytest.raises(RuntimeError, match="Error") as error:  # that of torch
                model.load_state_dict(others)
            assert not isinstance(error.value, InputError)
        assert str(model.load_state_dict(saved)) == "<All keys matched successfully>"
        plain = MixMoModel([nn.Conv2d(3, 4, 3)], Core(), [nn.Linear(4, 2)])
        with pytest.raises(RuntimeError, match="Unexpected key"):
            plain.load_state_dict(weights)

    def test_first_difference_between_weights(self):
        weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
        assert find_first_difference(weights, {k: v + 1 for k, v in weights.items()}) is None
        assert find_first_difference({"a": weights["a"]}, weights) == "b"
        assert find_first_difference(weights, {"b": weights["b"]}) == "a"
        assert find_first_difference(weights, weights | {"b": torch.zeros(4)}) == "b"
        assert find_first_difference(weights, weights | {"b": torch.zeros(3).double()}) == "b"


class Core(nn.Module):
    """A core with maps of the features themselves."""

    def maps(self, features):
        return features

    def forward(self, features):
        return average(features)


class Returns(Readout):
    """A readout that returns a tensor of a given shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, maps, masks=None):
        return torch.zeros(self.shape)


class TestEmbeddings:
    MAPS, MASKS = torch.zeros(6, 4, 5, 5), torch.ones(6, 3, 1, 5, 5)

    @pytest.mark.parametrize(
        ("shape", "masks", "num_features"),
        [
            ((6, 4), None, None),
            ((6, 4), MASKS, 4),
            ((6, 3, 4), MASKS, 4),
            ((6, 7), None, 7),  # the heads take other features than those of the maps
            ((6, 3, 7), MASKS, 7),
            ((6, 9), None, None),  # their number is unknown
            ((6, 3, 9), MASKS, None),
        ],
    )
    def test_one_embedding_for_all_heads_or_one_for_each(self, shape, masks, num_features):
        embedding = embed(Returns(*shape), Core(), self.MAPS, masks, num_features)
        assert embedding.shape == shape

    @pytest.mark.parametrize(
        ("shape", "masks", "num_features", "expected"),
        [
            ((6, 5), None, 4, r"\(6, 4\)\."),
            ((5, 4), None, None, r"\(6, 4\)\."),
            ((6, 3, 4), None, 4, r"\(6, 4\)\."),  # one for each without masks
            ((6, 3, 4), None, None, r"\(6, 4\)\."),
            ((6, 2, 4), MASKS, None, r"\(6, 4\) or \(6, 3, 4\)\."),
            ((6, 3, 4, 1), MASKS, 4, r"\(6, 4\) or \(6, 3, 4\)\."),
            ((6, 4), MASKS, 7, r"\(6, 7\) or \(6, 3, 7\)\."),
        ],
    )
    def test_embeddings_of_other_shapes_are_rejected(self, shape, masks, num_features, expected):
        with pytest.raises(InputError, match=rf"maps \(6, 4, 5, 5\); expected {expected}"):
            embed(Returns(*shape), Core(), self.MAPS, masks, num_features)

    def test_readouts_of_other_kinds_are_explained(self):
        with pytest.raises(InputError, match=r"pass an instance: readout=Returns\(\)"):
            small_model(readout=Returns)
        with pytest.raises(InputError, match="readout=a Readout"):
            small_model(readout=3)

    def test_modules_without_is_fusable_are_not_fused(self):
        class Average(nn.Module):
            def forward(self, maps, masks=None):
                return average(maps)

        encoders, heads = [nn.Conv2d(3, 4, 3)], [nn.Linear(4, 2)]
        model = MixMoModel(encoders, Core(), heads, readout=Average())
        assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 2)
        with pytest.raises(InputError, match="readout Average"):
            model.fuse()
        assert not Readout.is_fusable


class Scaled(nn.Conv2d):
    """A convolution whose output is linear in its weights."""

    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    """A convolution whose output does not depend on the size of its weights."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class OneLarger(nn.Conv2d):
    """A convolution whose output is larger by a fraction for large weights."""

    fraction = 0.004

    def forward(self, x):
        is_large = self.weight.abs().mean() > 1.5
        return super().forward(x) * (1 + self.fraction * is_large)


class Offset(nn.Conv2d):
    """A convolution with a slight deviation from linearity at all positions."""

    def forward(self, x):
        values = super().forward(x)
        return values + 1e-4 * values.abs().amax()


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TestFusing:
    def test_cores_of_other_backbones_get_the_size_of_the_image(self):
        class Backbone(BackboneCore):
            def __init__(self):
                nn.Module.__init__(self)

            def forward(self, features, size):
                return size

        assert run_core(Backbone(), torch.zeros(2, 8, 1, 1), torch.zeros(2, 3, 4, 6, 5)) == (6, 5)

    def test_heads_are_averaged_by_default(self):
        encoders, heads = ([nn.Conv2d(3, 4, 4), nn.Conv2d(3, 4, 4)], two_heads(4))
        fused = fuse_parts(encoders, nn.Flatten(), heads)
        assert (fused.num_votes, fused.head.out_features) == (1, 5)

    @pytest.mark.parametrize("num_members", [1, 2])
    def test_subclasses_of_linear_heads_are_fused(self, num_members):
        encoders = [Scaled(3, 4, 3) for _ in range(num_members)]
        model = small_model(encoders, [ScaledLinear(4, 5) for _ in encoders]).eval()
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(model.fuse()(x), model(x))

    @pytest.mark.parametrize("kinds", [(Standardized, nn.Conv2d), (nn.Conv2d, Standardized)])
    def test_every_layer_is_checked(self, kinds):
        model = small_model([kind(3, 6, 3) for kind in kinds], two_heads())
        with pytest.raises(InputError, match="type Standardized"):
            model.fuse()

    def test_layers_are_linear_up_to_a_thousandth(self):
        layers = [OneLarger(3, 6, 3, bias=False) for _ in range(2)]
        for layer in layers:
            nn.init.ones_(layer.weight)  # their sum is large
        model = small_model(layers, two_heads())
        with pytest.raises(InputError, match="not linear"):
            model.fuse()
        for layer in layers:
            layer.fraction = 1e-4
        assert model.fuse().encoder.weight.unique().tolist() == [2]

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_the_tolerance_is_relative_to_the_largest_output(self, scale):
        layers = [Offset(3, 6, 3, bias=False) for _ in range(2)]
        for layer in layers:
            layer.weight.data *= scale
        assert isinstance(small_model(layers, two_heads()).fuse().encoder, Offset)

    @pytest.mark.parametrize("groups", [1, 3])
    def test_subclasses_that_are_linear_in_their_weights_are_fused(self, groups):
        model = small_model([Scaled(3, 6, 3, groups=groups) for _ in range(2)], two_heads()).eval()
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(model.fuse()(x), model(x))

    def test_subclasses_that_are_not_linear_are_rejected(self):
        model = small_model([Standardized(3, 6, 3, bias=False) for _ in range(2)], two_heads())
        with pytest.raises(InputError, match="type Standardized, which is not linear"):
            model.fuse()

    @pytest.mark.parametrize("bias", [True, False])
    def test_stacked_heads_have_the_weights_of_all(self, bias):
        heads = [nn.Linear(4, 5, bias=bias).double() for _ in range(3)]
        model = small_model([nn.Conv2d(3, 4, 3).double() for _ in range(3)], heads)
        stacked = model.fuse(keep_members=True).head
        assert torch.equal(stacked.weight, torch.cat([head.weight for head in heads]))
        assert (stacked.bias is not None) == bias
        if bias:
            assert torch.equal(stacked.bias, torch.cat([head.bias for head in heads]))

    @pytest.mark.parametrize("keep_members", [False, True])
    def test_the_output_layer_is_applied_to_the_mean(self, keep_members):
        model = small_model(output=nn.Softmax(dim=1)).eval()
        x = torch.randn(2, 3, 8, 8)
        fused = model.fuse(keep_members=keep_members)
        torch.testing.assert_close(fused(x), model.member_logits(x).mean(1).softmax(1))
        assert fused.num_votes == (2 if keep_members else 1)
        assert not fused.training
        assert model.train().fuse(keep_members=keep_members).training


def two_heads(num_features=6):
    return [nn.Linear(num_features, 5) for _ in range(2)]
