"""Each region equals the oracle, which uses the same random numbers."""

import inspect
import json
import math

import golden
import numpy as np
import oracle
import pytest
import torch
from scipy.special import erfinv

from mixmo_fastai.config.choices import MASK_OPTIONS
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing import draw_lam, draw_masks
from mixmo_fastai.mixing.regions import REGIONS, SOFT_REGIONS

SHAPE = (16, 12, 15)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def area():
    return draw_lam(40, 2, 2.0, generator=generator(9))[:, 0]


@pytest.mark.parametrize("name", REGIONS)
def test_regions_broadcast_to_the_features_and_are_in_range(name, area):
    region = REGIONS[name](area, SHAPE, generator())
    assert torch.broadcast_shapes(region.shape, (40, *SHAPE)) == (40, *SHAPE)
    assert bool(((region >= 0) & (region <= 1)).all())
    assert bool(((region == 0) | (region == 1)).all()) == (name not in SOFT_REGIONS)


@pytest.mark.parametrize("name", REGIONS)
def test_areas_zero_and_one(name):
    """Area 0 yields an empty region, area 1 a large region, and neither yields nan."""
    region = REGIONS[name](torch.tensor([0.0, 1.0]), SHAPE, generator())
    assert bool(region.isfinite().all())
    if name != "cow":  # which draws its own area
        assert region[0].sum() == 0
        assert region[1].mean() > 0.2


@pytest.mark.parametrize("name", REGIONS)
def test_regions_do_not_depend_on_the_number_of_channels(name, area):
    if name.startswith("channel"):
        pytest.skip("its region depends on the channels")
    few_channels = REGIONS[name](area, (1, *SHAPE[1:]), generator(3))
    many_channels = REGIONS[name](area, (64, *SHAPE[1:]), generator(3))
    assert torch.equal(few_channels, many_channels)


def check_blocks(region, area, side):
    """Compare regions (N, 1, h, w) with blocks around centres of the published probability."""
    height, width = region.shape[2:]
    draws = torch.rand(region.shape, generator=generator())[:, 0].numpy()
    num_centres = (height - side + 1) * (width - side + 1)
    for sample in range(len(region)):
        probability = area[sample].item() / side**2 * height * width / num_centres
        expected = oracle.grown_blocks(draws[sample] < probability, side)
        assert np.array_equal(region[sample, 0].numpy(), expected)


@pytest.mark.parametrize("block_size", [1, 3, 7])
def test_blocks_have_the_published_probability(area, block_size):
    region = REGIONS["patchup"](area, SHAPE, generator(), block_size=block_size)
    check_blocks(region[:40], area, block_size)


def test_blocks_are_smaller_on_small_maps():
    region = REGIONS["patchup"](torch.full((200,), 0.5), (1, 4, 4), generator())
    assert 0.1 < region.mean() < 0.9


@pytest.mark.parametrize(("height", "width", "side"), [(5, 9, 5), (9, 6, 5), (8, 8, 7)])
def test_blocks_are_limited_to_the_largest_odd_size_of_the_map(height, width, side):
    area = torch.tensor([0.05, 0.1, 0.3])
    region = REGIONS["patchup"](area, (1, height, width), generator())
    check_blocks(region, area, side)


def test_soft_blocks_have_the_value_of_the_area(area):
    hard = REGIONS["patchup"](area, SHAPE, generator())
    soft = REGIONS["patchup-soft"](area, SHAPE, generator())
    assert torch.equal(soft, hard * area[:, None, None, None])


def test_cow_regions_are_thresholded_blurred_noise():
    region = REGIONS["cow"](torch.zeros(6), SHAPE, generator())
    random = generator()
    uniform = torch.rand((2, 6), generator=random).double().numpy()
    noise = torch.randn((6, *SHAPE[1:]), generator=random).double().numpy()
    num_different = 0
    for sample in range(6):
        sigma, fraction = 4 * 4 ** uniform[0, sample], 0.2 + 0.6 * uniform[1, sample]
        smooth = oracle.blur(noise[sample], sigma)
        threshold = smooth.mean() + smooth.std(ddof=1) * math.sqrt(2) * erfinv(2 * fraction - 1)
        num_different += (region[sample, 0].numpy() != (smooth < threshold)).sum()
    assert num_different <= 2  # positions at the threshold, up to rounding


def test_cow_areas_may_reach_from_zero_to_one():
    region = REGIONS["cow"](torch.zeros(500), (1, 16, 16), generator(), area_min=0.0, area_max=1.0)
    assert region.mean().item() == pytest.approx(0.5, abs=0.04)
    assert region.mean((1, 2, 3)).std().item() == pytest.approx(1 / math.sqrt(12), abs=0.03)


def test_options_of_cow_may_be_equal():
    options = {"sigma_min": 2.0, "sigma_max": 2.0, "area_min": 0.5, "area_max": 0.5}
    region = REGIONS["cow"](torch.zeros(300), (1, 16, 16), generator(), **options)
    assert region.mean().item() == pytest.approx(0.5, abs=0.02)
    assert region.mean((1, 2, 3)).std().item() < 0.1


def test_no_block_begins_at_probability_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))
    region = REGIONS["patchup"](torch.tensor([0.0, 0.1]), (1, 8, 8), None)
    assert region.mean((1, 2, 3)).tolist() == [0.0, 1.0]


def test_cow_areas_are_uniform_on_average():
    region = REGIONS["cow"](torch.zeros(4000), (1, 32, 32), generator())
    areas = region.mean((1, 2, 3))
    assert areas.mean().item() == pytest.approx(0.5, abs=0.02)
    assert areas.std().item() == pytest.approx(0.6 / math.sqrt(12), abs=0.03)


def test_channel_regions_cover_the_expected_number_of_channels(area):
    for name in ("channel", "channel-stack"):
        region = REGIONS[name](area, SHAPE, generator())
        assert region.shape == (40, 16, 1, 1)
        assert torch.equal(region.sum((1, 2, 3)), (16 * area).round())
    first = REGIONS["channel-stack"](area, SHAPE, generator())
    assert bool((first.diff(dim=1) <= 0).all())
    many = REGIONS["channel"](torch.full((4000,), 0.25), SHAPE, generator())
    assert bool(((many.mean((0, 2, 3)) - 0.25).abs() < 0.03).all())


def test_horizontal_and_vertical_cover_the_first_rows_or_columns(area):
    rows = REGIONS["horizontal"](area, SHAPE, generator())
    columns = REGIONS["vertical"](area, SHAPE, generator())
    assert torch.equal(rows.sum((1, 2, 3)), (12 * area).floor())
    assert torch.equal(columns.sum((1, 2, 3)), (15 * area).floor())
    assert bool((rows.diff(dim=2) <= 0).all())
    assert bool((columns.diff(dim=3) <= 0).all())


def test_noise_is_uniform_around_the_area():
    for fraction, low, high in ((0.2, 0.0, 0.4), (0.5, 0.0, 1.0), (0.9, 0.8, 1.0)):
        region = REGIONS["noise"](torch.full((50,), fraction), (1, 32, 32), generator())
        assert region.mean().item() == pytest.approx(fraction, abs=0.005)
        assert region.min().item() == pytest.approx(low, abs=0.001)
        assert region.max().item() == pytest.approx(high, abs=0.001)
        assert region.var().item() == pytest.approx((high - low) ** 2 / 12, rel=0.05)


@golden.needs_golden
@pytest.mark.parametrize(
    ("kind", "published", "num_draws", "same_correlation"),
    [
        ("patchup", "patchuphard2d", 30_000, True),
        # The published split is drawn independently of lam; here it equals lam, as in other kinds.
        ("horizontal", "stackhorizontal", 100_000, False),
        ("vertical", "stackvertical", 100_000, False),
    ],
)
def test_areas_match_the_published_implementation(kind, published, num_draws, same_correlation):
    statistics = json.loads((golden.GOLDEN / "mask_statistics_alpha2_32x32.json").read_text())
    expected = statistics[published]
    lam = draw_lam(num_draws, 2, 2.0, generator=generator())
    draws = generator(1)
    areas = torch.cat(
        [
            draw_masks(kind, part, (1, 32, 32), generator=draws, shuffle_roles=False)[1][:, 0]
            for part in lam.split(10_000)
        ]
    )
    standard_error = expected["std_area"] * math.sqrt(1 / expected["draws"] + 1 / num_draws)
    mean = pytest.approx(expected["mean_area"], abs=3 * standard_error)
    assert areas.mean().item() == mean
    assert areas.std().item() == pytest.approx(expected["std_area"], rel=0.02)
    quantiles = areas.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert quantiles == pytest.approx(expected["quantiles_10_50_90"], abs=0.016)
    if same_correlation:
        correlation = torch.corrcoef(torch.stack([areas, lam[:, 0]]))[0, 1].item()
        assert correlation == pytest.approx(expected["corr_with_lambda"], abs=0.01)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("patchup", {"block_size": 4}, "block_size must be an odd integer"),
        ("patchup", {"block_size": -1}, "block_size must be an odd integer"),
        ("patchup", {"block_size": 5.0}, r"odd integer, 1 or more; got 5\.0"),
        ("patchup", {"block_size": True}, "odd integer, 1 or more; got True"),
        ("patchup-soft", {"block_size": "5"}, "odd integer, 1 or more; got '5'"),
        ("cow", {"sigma_max": math.inf}, "must be numbers in ascending order, above 0 and finite"),
        ("cow", {"sigma_min": "a"}, "sigma_min='a'.*must be numbers in ascending order"),
        ("cow", {"sigma_min": 0}, "sigma_min=0 and .* in ascending order, above 0 and finite"),
        ("cow", {"area_min": -0.1}, "area_min=-0.1 and .*, 0 or more and at most 1"),
        ("cow", {"sigma_min": 20.0}, "sigma_min=20.0 and sigma_max=16.0"),
        ("cow", {"area_max": 1.2}, "area_min=0.2 and area_max=1.2"),
        ("cow", {"block_size": 3}, "Its options: sigma_min, sigma_max, area_min, area_max"),
        ("horizontal", {"block_size": 3}, "It has no options"),
    ],
)
def test_invalid_options_are_rejected(kind, options, message):
    with pytest.raises(InputError, match=message):
        draw_masks(kind, torch.full((4, 2), 0.5), (1, 8, 8), **options)


def test_option_names_equal_the_parameters_of_the_functions():
    for kind, draw in REGIONS.items():
        assert MASK_OPTIONS.get(kind, ()) == tuple(inspect.signature(draw).parameters)[3:]
    assert MASK_OPTIONS.keys() <= REGIONS.keys()
