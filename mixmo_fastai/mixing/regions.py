"""Regions: the weight of the member in role 0 at each position.

Shapes: B batch, D feature channels, h w feature size after the encoder.

Each function draws regions in [0, 1] that broadcast to (B, D, h, w). Its arguments are the mixing
ratio `area` (B,) of role 0, the shape (D, h, w) and a generator; options are keyword arguments. All
operations are batched and run on the device of `area`, without synchronisation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixmo_fastai.config.choices import COW_DEFAULTS, MASK_REGIONS
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError

Shape = tuple[int, int, int]
Generator = torch.Generator | None
Region = Callable[..., Tensor]
"""Function of area (B,), shape (D, h, w), generator and keyword options that returns a region."""


def box(area: Tensor, shape: Shape, generator: Generator) -> Tensor:
    """Draw a box with sides of about h·√area and w·√area, clipped to the map (CutMix).

    The centre is uniform over the map; the box extends from it by floor(h·√area) // 2 rows and
    floor(w·√area) // 2 columns in each direction, as published. Its sides are therefore even before
    clipping.

    Returns:
        (B, 1, h, w), binary.

    Example:
        >>> region = box(torch.tensor([0.25]), (16, 4, 4), torch.Generator().manual_seed(4))
        >>> region[0, 0].int().tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    # A product of floats, since broadcasting a logical AND is slow on a CPU.
    rows = _draw_span(area, shape[1], generator)  # (B, h)
    columns = _draw_span(area, shape[2], generator)  # (B, w)
    return rows[:, None, :, None] * columns[:, None, None, :]


def horizontal(area: Tensor, shape: Shape, generator: Generator) -> Tensor:
    """Select the first floor(h·area) rows: (B, 1, h, 1), binary.

    Example:
        >>> region = horizontal(torch.tensor([0.5]), (16, 4, 4), None)
        >>> region.shape, region.flatten()
        (torch.Size([1, 1, 4, 1]), tensor([1., 1., 0., 0.]))
    """
    return _first_positions(area, shape[1])[:, None, :, None]


def vertical(area: Tensor, shape: Shape, generator: Generator) -> Tensor:
    """Select the first floor(w·area) columns: (B, 1, 1, w), binary.

    Example:
        >>> region = vertical(torch.tensor([0.5]), (16, 4, 4), None)
        >>> region.shape, region.flatten()
        (torch.Size([1, 1, 1, 4]), tensor([1., 1., 0., 0.]))
    """
    return _first_positions(area, shape[2])[:, None, None, :]


def blocks(area: Tensor, shape: Shape, generator: Generator, *, block_size: int = 7) -> Tensor:
    """Expand Bernoulli seeds into square blocks (PatchUp).

    As in the published code, any position can be a seed, with probability
    area / block² · h·w / ((h - block + 1)·(w - block + 1)). Because of overlaps and borders, the
    mean differs from `area`: with the default block on 32 x 32, 0.13 for 0.1, and 0.66 for 0.8.
    Source: Faramarzi et al., "PatchUp", AAAI 2022, with DropBlock's seed probability.

    Args:
        area: (B,).
        shape: (D, h, w).
        generator: generator on the device of `area`.
        block_size: side of a block, odd; limited to the size of the map.

    Returns:
        (B, 1, h, w), binary.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> region = blocks(torch.full((64,), 0.4), (16, 8, 8), generator, block_size=3)
        >>> region.shape, region.unique()
        (torch.Size([64, 1, 8, 8]), tensor([0., 1.]))
    """
    if type(block_size) is not int or block_size < 1 or block_size % 2 == 0:
        raise InputError(f"block_size must be an odd integer, 1 or more; got {block_size!r}.")
    height, width = shape[1:]
    side = min(block_size, _odd_at_most(height), _odd_at_most(width))
    num_inner = (height - side + 1) * (width - side + 1)
    probability = area / side**2 * (height * width / num_inner)
    uniform = torch.rand((len(area), 1, height, width), generator=generator, device=area.device)
    seeds = (uniform < probability[:, None, None, None]).to(area.dtype)
    return torch.max_pool2d(seeds, side, stride=1, padding=side // 2)


def soft_blocks(area: Tensor, shape: Shape, generator: Generator, *, block_size: int = 7) -> Tensor:
    """Weight the blocks of `blocks` by `area` instead of 1 (soft PatchUp).

    Returns:
        (B, 1, h, w) with values 0 and area.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> soft_blocks(torch.tensor([0.25]), (16, 8, 8), generator, block_size=3).unique()
        tensor([0.0000, 0.2500])
    """
    return area[:, None, None, None] * blocks(area, shape, generator, block_size=block_size)


def cow(
    area: Tensor,
    shape: Shape,
    generator: Generator,
    *,
    sigma_min: float = COW_DEFAULTS["sigma_min"],
    sigma_max: float = COW_DEFAULTS["sigma_max"],
    area_min: float = COW_DEFAULTS["area_min"],
    area_max: float = COW_DEFAULTS["area_max"],
) -> Tensor:
    """Threshold Gaussian-blurred noise into irregular spots (CowMask).

    The spots' area is drawn from a separate uniform distribution; `area` sets only batch size,
    dtype and device. The threshold assumes that the blurred noise is normal, so the drawn area is
    exact on average.
    Source: French, Oliver, Salimans, "Milking CowMask", 2020.

    Args:
        area: (B,).
        shape: (D, h, w).
        generator: generator on the device of `area`.
        sigma_min: lower end of the log-uniform standard deviation of the blur, in positions.
        sigma_max: upper end.
        area_min: lower end of the uniform area.
        area_max: upper end.

    Returns:
        (B, 1, h, w), binary.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> region = cow(torch.zeros(64), (16, 32, 32), generator, area_min=0.2, area_max=0.4)
        >>> region.shape, region.unique()
        (torch.Size([64, 1, 32, 32]), tensor([0., 1.]))
        >>> round(region.mean().item(), 1)
        0.3
    """
    _check_interval("sigma", sigma_min, sigma_max, is_zero_allowed=False, upper=math.inf)
    _check_interval("area", area_min, area_max, is_zero_allowed=True, upper=1.0)
    uniform = torch.rand((2, len(area)), generator=generator, device=area.device)
    sigma = sigma_min * (sigma_max / sigma_min) ** uniform[0]
    drawn_area = (area_min + (area_max - area_min) * uniform[1])[:, None, None]
    noise = torch.randn((len(area), *shape[1:]), generator=generator, device=area.device)
    # The blur is separable: one matrix for the rows and one for the columns of each sample.
    rows, columns = _blur_matrix(sigma, shape[1]), _blur_matrix(sigma, shape[2])
    smooth = rows @ noise @ columns.transpose(1, 2)  # (B, h, w)
    mean, std = smooth.mean((1, 2), keepdim=True), smooth.std((1, 2), keepdim=True)
    threshold = mean + std * math.sqrt(2) * torch.erfinv(2 * drawn_area - 1)
    return (smooth < threshold)[:, None].to(area.dtype)


def channels(area: Tensor, shape: Shape, generator: Generator) -> Tensor:
    """Select round(D·area) random channels: (B, D, 1, 1), binary.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> region = channels(torch.tensor([0.25, 0.5]), (8, 4, 4), generator)
        >>> region.shape, region.sum(dim=(1, 2, 3))
        (torch.Size([2, 8, 1, 1]), tensor([2., 4.]))
    """
    keys = torch.rand((len(area), shape[0]), generator=generator, device=area.device)
    ranks = keys.argsort(dim=1).argsort(dim=1)
    count = (shape[0] * area).round()[:, None]
    return (ranks < count).to(area.dtype)[:, :, None, None]


def first_channels(area: Tensor, shape: Shape, generator: Generator) -> Tensor:
    """Select the first round(D·area) channels: (B, D, 1, 1), binary.

    Example:
        >>> first_channels(torch.tensor([0.25]), (8, 4, 4), None).flatten().tolist()
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    count = (shape[0] * area).round()[:, None]
    positions = torch.arange(shape[0], device=area.device)
    return (positions < count).to(area.dtype)[:, :, None, None]


def noise(area: Tensor, shape: Shape, generator: Generator) -> Tensor:
    """Draw each position uniformly from the widest interval in [0, 1] whose midpoint is `area`.

    Returns:
        (B, 1, h, w) in [0, 1].

    Example:
        >>> region = noise(torch.tensor([0.25]), (16, 32, 32), torch.Generator().manual_seed(0))
        >>> region.shape, bool(region.max() <= 0.5)
        (torch.Size([1, 1, 32, 32]), True)
    """
    low, high = (2 * area - 1).clamp(min=0), (2 * area).clamp(max=1)
    size = (len(area), 1, *shape[1:])
    uniform = torch.rand(size, generator=generator, device=area.device, dtype=area.dtype)
    return low[:, None, None, None] + (high - low)[:, None, None, None] * uniform


def _draw_span(area: Tensor, length: int, generator: Generator) -> Tensor:
    """Draw the extent of a box along one axis: (B,) -> (B, length), values 0 and 1."""
    half = (length * area.sqrt()).long().div(2, rounding_mode="floor")
    centre = torch.randint(length, area.shape, generator=generator, device=area.device)
    # Row k of the table holds k ones followed by zeros, so a span is row "end" minus row "start",
    # both clipped to the map. Two lookups are faster than two comparisons.
    table = torch.ones((length + 1, length), dtype=area.dtype, device=area.device).tril(-1)
    ends, starts = (centre + half).clamp(max=length), (centre - half).clamp(min=0)
    return table.index_select(0, ends).sub_(table.index_select(0, starts))


def _first_positions(area: Tensor, length: int) -> Tensor:
    """Select the first floor(length·area) positions: (B,) -> (B, length), values 0 and 1."""
    positions = torch.arange(length, device=area.device)
    return (positions < (length * area).floor()[:, None]).to(area.dtype)


def _odd_at_most(length: int) -> int:
    """Return the largest odd number that does not exceed `length`."""
    return length - 1 + length % 2


def _blur_matrix(sigma: Tensor, length: int) -> Tensor:
    """Build the blur along one axis: (B,) -> (B, length, length); rows are Gaussians, sum 1."""
    positions = torch.arange(length, device=sigma.device, dtype=sigma.dtype)
    distance = positions[:, None] - positions
    return torch.softmax(-(distance**2) / (2 * sigma[:, None, None] ** 2), dim=2)


def _check_interval(
    name: str, low: float, high: float, *, is_zero_allowed: bool, upper: float
) -> None:
    are_finite = all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high))
    is_low_allowed = are_finite and (low > 0 or (is_zero_allowed and low == 0))
    if not (is_low_allowed and low <= high <= upper):
        lower_text = "0 or more" if is_zero_allowed else "above 0"
        upper_text = f"at most {upper:g}" if upper < math.inf else "finite"
        raise InputError(
            f"{name}_min={low!r} and {name}_max={high!r} must be numbers in ascending order, "
            f"{lower_text} and {upper_text}."
        )


REGIONS: dict[str, Region] = {
    kind: resolve_registered("mask kind", kind, target)
    for kind, target in MASK_REGIONS.items()
    if target is not None
}
"""Mask kinds that draw a region for role 0, by name. At the end, since most are defined here."""
SOFT_REGIONS = ("patchup-soft", "noise")
"""Kinds of `REGIONS` with values other than 0 and 1."""
