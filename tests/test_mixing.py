import json
import math
from dataclasses import FrozenInstanceError

import golden
import numpy as np
import oracle
import pytest
import torch

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import (
    BINARY_KINDS,
    MASK_KINDS,
    check_kind,
    draw_lam,
    draw_masks,
    draw_mixings,
    loss_weights,
    mix_features,
)
from mixmo_fastai.mixing import masks as masks_module


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestDrawLam:
    @pytest.mark.parametrize("num_members", [1, 2, 3, 5])
    @pytest.mark.parametrize("alpha", [0.01, 0.5, 2.0, 50.0])
    def test_ratios_have_dirichlet_moments(self, num_members, alpha):
        lam = draw_lam(40_000, num_members, alpha, generator=generator())
        assert lam.shape == (40_000, num_members)
        assert bool((lam >= 0).all())
        torch.testing.assert_close(lam.sum(1), torch.ones(40_000))
        mean = 1 / num_members
        variance = mean * (1 - mean) / (num_members * alpha + 1)
        sampling_error = 4 * math.sqrt(variance / 40_000) + 1e-6
        assert lam.mean(0) == pytest.approx(torch.full((num_members,), mean), abs=sampling_error)
        assert lam.var(0).mean().item() == pytest.approx(variance, rel=0.05, abs=1e-6)

    def test_generator_determines_the_ratios(self):
        assert torch.equal(
            draw_lam(9, 2, 2.0, generator=generator(1)), draw_lam(9, 2, 2.0, generator=generator(1))
        )

    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
    def test_alpha_out_of_range_is_rejected(self, alpha):
        with pytest.raises(InputError, match="alpha must be positive"):
            draw_lam(4, 2, alpha)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("num_members", [2, 3, 4])
class TestAllMaskKinds:
    def test_masks_sum_to_one_and_lam_is_their_mean(self, kind, num_members):
        lam = draw_lam(64, num_members, 1.0, generator=generator())
        masks, corrected = draw_masks(kind, lam, (16, 9, 12), generator=generator(1))
        channels = 16 if kind.startswith("channel") else 1
        assert masks.shape == (64, num_members, channels, 9, 12)
        assert bool(((masks >= 0) & (masks <= 1)).all())
        torch.testing.assert_close(masks.sum(1), torch.ones(64, channels, 9, 12))
        torch.testing.assert_close(corrected, masks.mean((2, 3, 4)))

    def test_only_the_passed_generator_is_used(self, kind, num_members):
        before = torch.random.get_rng_state()
        lam = draw_lam(8, num_members, 2.0, generator=generator())
        first, second = (draw_masks(kind, lam, (1, 8, 8), generator=generator(5))[0] for _ in "ab")
        assert torch.equal(first, second)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_double_precision_is_kept(self, kind, num_members):
        lam = draw_lam(8, num_members, 2.0).double()
        assert draw_masks(kind, lam, (1, 8, 8))[0].dtype == torch.float64


def test_sum_masks_ignore_lam():
    masks, lam = draw_masks("sum", draw_lam(4, 3, 2.0), (1, 2, 2))
    assert torch.equal(masks, torch.full((4, 3, 1, 2, 2), 1 / 3))
    torch.testing.assert_close(lam, torch.full((4, 3), 1 / 3))


def test_linear_masks_are_lam_everywhere():
    lam = draw_lam(5, 3, 2.0)
    masks, corrected = draw_masks("linear", lam, (8, 4, 6))
    assert torch.equal(masks, lam[:, :, None, None, None].expand(5, 3, 1, 4, 6))
    torch.testing.assert_close(corrected, lam)


@pytest.mark.parametrize("size", [(32, 32), (9, 14), (1, 1), (2, 5)])
def test_boxes_equal_the_oracle(size):
    """Each mask equals the oracle's box for one of the possible centres."""
    lam = draw_lam(25, 2, 1.0, generator=generator())
    masks, _ = draw_masks("cutmix", lam, (1, *size), generator=generator(1), shuffle_roles=False)
    for ratio, mask in zip(lam[:, 0].numpy(), masks[:, 0, 0].numpy(), strict=True):
        boxes = [
            oracle.box_mask(*size, ratio, row, column)
            for row in range(size[0])
            for column in range(size[1])
        ]
        assert any(np.array_equal(mask, box) for box in boxes)


def test_box_centres_are_uniform_over_the_map():
    lam = torch.tensor([[0.04, 0.96]]).repeat(
        40_000, 1
    )  # floor(10·√0.04) = 2: half of the side is 1
    masks, _ = draw_masks("cutmix", lam, (1, 10, 10), generator=generator(), shuffle_roles=False)
    boxes = masks[:, 0, 0]
    last_row_fraction = (boxes[:, 9].sum(1) > 0).float().mean().item()
    assert last_row_fraction == pytest.approx(0.1, abs=0.01)  # only centres in the last row
    first_row_fraction = (boxes[:, 0].sum(1) > 0).float().mean().item()
    assert first_row_fraction == pytest.approx(0.2, abs=0.01)  # centres in rows 0 and 1


def test_other_members_fill_the_complement_in_proportion():
    lam = draw_lam(20, 3, 2.0, generator=generator())
    masks, _ = draw_masks("cutmix", lam, (1, 8, 8), generator=generator(1), shuffle_roles=False)
    for b in range(20):
        expected = oracle.complement_masks(masks[b, 0, 0].numpy(), lam[b].numpy())
        np.testing.assert_allclose(masks[b, :, 0].numpy(), expected, atol=1e-6)


def test_member_with_lam_zero_has_an_empty_mask():
    lam = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    masks, corrected = draw_masks("cutmix", lam, (1, 8, 8), shuffle_roles=False)
    assert bool(torch.isfinite(masks).all())
    torch.testing.assert_close(corrected.sum(1), torch.ones(2))
    assert corrected[1, 1] == 0


def test_roles_are_shuffled_but_members_keep_their_lam():
    lam = torch.tensor([[0.9, 0.05, 0.05]]).repeat(16, 1)
    members_with_boxes = set()
    for seed in range(30):
        masks, _ = draw_masks("cutmix", lam, (1, 8, 8), generator=generator(seed))
        binary = [m for m in range(3) if bool(((masks[:, m] == 0) | (masks[:, m] == 1)).all())]
        boxed = min(binary, key=lambda m: -masks[:, m].max())
        members_with_boxes.add(boxed)
        if boxed != 0:  # a small box: the member with lam 0.9 has most of the rest
            assert bool((masks[:, 0].mean((1, 2, 3)) > 0.5).all())
    assert members_with_boxes == {0, 1, 2}


@pytest.mark.parametrize("num_members", [2, 3])
def test_roles_are_drawn_per_batch(num_members):
    lam = torch.full((60 * 4, num_members), 0.1)
    lam[:, 0] = 1 - 0.1 * (num_members - 1)
    masks, means = draw_masks("horizontal", lam, (1, 10, 10), num_batches=60, generator=generator())
    first_row = masks[:, :, 0, 0, 0].view(60, 4, num_members)  # weights of the members there
    in_role_0 = {int(batch[0].argmax()) for batch in first_row if batch.max() == 1}
    assert in_role_0 == set(range(num_members))
    assert torch.equal(first_row, first_row[:, :1].expand_as(first_row))  # same in each batch
    torch.testing.assert_close(means, masks.mean((2, 3, 4)))


class TestDrawMixings:
    def draw(self, kind="cutmix", uniforms=(0.1, 0.7, 0.4), mix_prob=0.5, **options):
        return draw_mixings(
            kind, uniforms, (6, 2), (1, 8, 8), mix_prob=mix_prob, alpha=2.0, weight_root=3.0,
            options=options, lam_generator=generator(1), mask_generator=generator(2),
        )  # fmt: skip

    def test_uniform_numbers_decide_which_steps_use_regions(self):
        drawn = self.draw()
        assert [mixing is None for mixing in drawn.regional] == [False, True, False]
        num_values = [len(drawn.select(i, 0.5).masks[0, 0].unique()) for i in range(3)]
        assert num_values == [2, 1, 2]
        assert len(drawn.select(2, 0.3).masks[0, 0].unique()) == 1  # the probability has decreased

    def test_numbers_equal_to_the_probability_use_no_regions(self):
        drawn = self.draw(uniforms=(0.5, 0.25), mix_prob=0.5)
        assert [mixing is None for mixing in drawn.regional] == [True, False]
        assert drawn.select(1, 0.25) is drawn.blended[1]
        assert drawn.select(1, 0.26) is drawn.regional[1]

    def test_drawn_mixings_are_immutable(self):
        with pytest.raises(FrozenInstanceError):
            self.draw().uniforms = []

    def test_lam_does_not_depend_on_the_kind_of_mixing(self):
        drawn = self.draw(mix_prob=1.0)
        lam = draw_lam(18, 2, 2.0, generator=generator(1)).view(3, 6, 2)
        for i in range(3):
            blended, boxes = drawn.blended[i], drawn.regional[i]
            assert torch.equal(blended.masks[:, :, 0, 0, 0], lam[i])
            means = boxes.masks.mean((2, 3, 4))
            torch.testing.assert_close(boxes.weights, loss_weights(means, 3.0))
            # The boxes belong to the same member in all samples, and are clipped and rounded down.
            clipped = [bool((means[:, m] <= lam[i, :, m] + 1e-6).all()) for m in range(2)]
            assert any(clipped)

    @pytest.mark.parametrize("kind", ["sum", "linear"])
    def test_blending_kinds_have_no_regions(self, kind):
        drawn = self.draw(kind)
        assert drawn.regional == [None] * 3
        expected, _ = draw_masks(kind, draw_lam(18, 2, 2.0, generator=generator(1)), (1, 8, 8))
        assert torch.equal(torch.cat([mixing.masks for mixing in drawn.blended]), expected)

    def test_options_are_passed_to_the_kind(self):
        small = self.draw("patchup", block_size=1, mix_prob=1.0)
        assert small.regional[0].masks.shape == (6, 2, 1, 8, 8)


@golden.needs_golden
def test_box_areas_match_the_published_implementation():
    published = json.loads((golden.GOLDEN / "mask_statistics_alpha2_32x32.json").read_text())
    expected = published["cutmix"]
    num_draws = 20_000
    lam = draw_lam(num_draws, 2, 2.0, generator=generator())
    _, corrected = draw_masks(
        "cutmix", lam, (1, 32, 32), generator=generator(1), shuffle_roles=False
    )
    areas = corrected[:, 0]
    # Both samples have a sampling error.
    standard_error = expected["std_area"] * math.sqrt(1 / expected["draws"] + 1 / num_draws)
    assert areas.mean().item() == pytest.approx(expected["mean_area"], abs=3 * standard_error)
    assert areas.std().item() == pytest.approx(expected["std_area"], rel=0.02)
    quantiles = areas.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert quantiles == pytest.approx(expected["quantiles_10_50_90"], abs=0.012)
    correlation = torch.corrcoef(torch.stack([areas, lam[:, 0]]))[0, 1].item()
    assert correlation == pytest.approx(expected["corr_with_lambda"], abs=0.012)


@golden.needs_golden
def test_linear_ratios_match_the_published_implementation():
    published = json.loads((golden.GOLDEN / "mask_statistics_alpha2_32x32.json").read_text())
    expected = published["mixup"]
    lam = draw_lam(50_000, 2, 2.0, generator=generator())[:, 0]
    assert lam.std().item() == pytest.approx(expected["std_area"], rel=0.02)
    assert lam.mean().item() == pytest.approx(expected["mean_area"], abs=0.006)


@pytest.mark.parametrize("root", [1, 2, 3, 10])
def test_loss_weights_equal_the_oracle(root):
    lam = draw_lam(50, 3, 0.5, generator=generator())
    expected = np.stack([oracle.weights(row, root) for row in lam.double().numpy()])
    np.testing.assert_allclose(loss_weights(lam, root).numpy(), expected, rtol=2e-5, atol=1e-6)


def test_loss_weights_for_extreme_roots():
    lam = torch.tensor([[0.0, 1.0], [0.3, 0.7]])
    assert torch.equal(loss_weights(lam, math.inf), torch.ones(2, 2))
    torch.testing.assert_close(loss_weights(lam, 1), 2 * lam)
    with pytest.raises(InputError, match="weight_root must be 1 or more"):
        loss_weights(lam, 0.5)


def test_mix_features_equals_the_oracle():
    features = torch.randn(3, 3, 4, 5, 6, generator=generator(), dtype=torch.float64)
    lam = draw_lam(3, 3, 1.0, generator=generator())
    masks, _ = draw_masks("cutmix", lam, (4, 5, 6), generator=generator(1))
    masks = masks.double()
    expected = oracle.mix(features.numpy(), masks.numpy())
    np.testing.assert_allclose(mix_features(features, masks).numpy(), expected)


def test_mix_features_keeps_the_dtype():
    features = torch.ones(1, 2, 4, 5, 5, dtype=torch.bfloat16)
    masks, _ = draw_masks("cutmix", draw_lam(1, 2, 1.0), (4, 5, 5))
    assert mix_features(features, masks).dtype == torch.bfloat16


def test_binary_kinds_are_binary():
    for kind in BINARY_KINDS:
        masks, _ = draw_masks(kind, draw_lam(16, 2, 1.0), (1, 8, 8))
        assert bool(((masks == 0) | (masks == 1)).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cutmx", (4, 2), (1, 8, 8), {}), "Did you mean 'cutmix'"),
        (("cutmix", (4, 1), (1, 8, 8), {}), "needs at least two members"),
        (("linear", (4, 1), (1, 8, 8), {}), "needs at least two members"),
        (("cutmix", (4,), (1, 8, 8), {}), r"\(B, M\)"),
        (("cutmix", (4, 2), (8, 8), {}), r"\(D, h, w\)"),
        (("cutmix", (4, 2), (1, 0, 8), {}), "1 or more"),
        (("cutmix", (4, 2), (1, 8, 8), {"sigma": 2}), "'sigma' of mask kind 'cutmix'"),
        (("cutmix", (4, 2), (1, 8, 8), {"num_batches": 3}), "4 samples cannot be split into 3"),
        (("cutmix", (4, 2), (1, 8, 8), {"num_batches": 0}), "4 samples cannot be split into 0"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    kind, lam_shape, shape, options = arguments
    with pytest.raises(InputError, match=message):
        draw_masks(kind, torch.rand(lam_shape), shape, **options)


def test_sum_mask_of_one_member_is_one():
    masks, lam = draw_masks("sum", torch.ones(4, 1), (1, 8, 8))
    assert torch.equal(masks, torch.ones(4, 1, 1, 8, 8))
    assert torch.equal(lam, torch.ones(4, 1))


class TestCustomRegions:
    def test_area_is_lam_of_the_member_in_role_0(self):
        areas = []

        def left_columns(area, shape, generator):
            areas.append(area)
            return (torch.arange(shape[2]) < (shape[2] * area)[:, None]).float()[:, None, None]

        lam = draw_lam(6, 3, 2.0, generator=torch.Generator().manual_seed(0))
        masks, means = draw_masks(left_columns, lam, (4, 5, 1000), shuffle_roles=False)
        assert torch.equal(areas[0], lam[:, 0])
        assert masks.shape == (6, 3, 1, 5, 1000)
        torch.testing.assert_close(masks.sum(dim=1), torch.ones(6, 1, 5, 1000))
        torch.testing.assert_close(means[:, 0], lam[:, 0], atol=1e-3, rtol=0)
        torch.testing.assert_close(masks.mean(dim=(2, 3, 4)), means)
        others = lam[:, 1:] / lam[:, 1:].sum(dim=1, keepdim=True)
        torch.testing.assert_close(masks[:, 1:, 0, 0, -1], others)

    def test_options_are_passed_as_keyword_arguments(self):
        def half(area, shape, generator, *, side="left"):
            assert side == "right"
            return torch.zeros(len(area), 1, 1, shape[2])

        draw_masks(half, draw_lam(2, 2, 2.0), (1, 4, 4), side="right")
        with pytest.raises(
            InputError, match=r"Unknown option 'size' of mask kind 'half'.\nIts options: side"
        ):
            draw_masks(half, draw_lam(2, 2, 2.0), (1, 4, 4), size=3)

    @pytest.mark.parametrize(
        "region",
        [torch.zeros(2, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 3), "left", None]
        + [torch.zeros(2, 1, 4, 4, dtype=torch.bool)],
    )
    def test_invalid_regions_are_rejected(self, region):
        with pytest.raises(
            InputError, match=r"'<lambda>' must return torch.float32 of shape \(2, "
        ):
            draw_masks(lambda *_: region, draw_lam(2, 2, 2.0), (3, 4, 4))

    def test_registered_functions_of_other_modules_are_checked(self, monkeypatch):
        monkeypatch.setitem(
            masks_module.REGIONS, "cutmix", lambda *_: torch.full((2, 1, 4, 4), 1.5)
        )
        with pytest.raises(InputError, match=r"'cutmix' must return values in \[0, 1\]"):
            draw_masks("cutmix", draw_lam(2, 2, 2.0), (1, 4, 4))

    def test_function_with_any_option_and_a_fixed_map_size(self):
        def fixed_size_region(area, shape, generator, **options):
            assert options == {"size": 3}
            assert shape == (1, 5, 7)
            return torch.zeros(len(area), 1, 5, 7)

        draw_masks(fixed_size_region, draw_lam(2, 2, 2.0), (1, 5, 7), size=3)
        MixMoCallback(mix=fixed_size_region, mask_options={"size": 3})

    def test_function_with_a_wrong_signature_is_rejected(self):
        with pytest.raises(InputError, match=r"must accept area .* too many positional arguments"):
            draw_masks(lambda area: area, draw_lam(2, 2, 2.0), (1, 4, 4))

    @pytest.mark.parametrize("value", [-0.25, 1.25, 5])
    def test_values_outside_0_and_1_are_rejected(self, value):
        region = torch.full((2, 1, 4, 4), float(value))
        with pytest.raises(InputError, match=rf"in \[0, 1\]; they range from {value} to {value}"):
            draw_masks(lambda *_: region, draw_lam(2, 2, 2.0), (1, 4, 4))

    def test_one_member_is_rejected(self):
        with pytest.raises(InputError, match="'<lambda>' needs at least two members"):
            check_kind(lambda *_: None, 1)
