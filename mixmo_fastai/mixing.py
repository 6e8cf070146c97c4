"""Mixing: how much of each member a batch carries, where, and the mixing itself.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, sections 3.2 and 3.3.

Randomness is drawn by `draw_lam` and `draw_masks` from one generator, and used by `mix_features`
and `loss_weights`, which are deterministic.

A new mask kind is one function of (lam, shape, generator, options) in `_DRAW`, and its name in
`names.MASK_KINDS`.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown
from mixmo_fastai.names import MASK_KINDS

Shape = tuple[int, int, int]
"""(D, h, w) of one encoder's output."""


def draw_lam(
    num_samples: int,
    num_members: int,
    alpha: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw mixing ratios, one set per sample: lam ~ Dirichlet(alpha, …, alpha).

    A Dirichlet draw is a normalised vector of Gamma(alpha) draws. They are made as
    Gamma(alpha + 1) · U^(1/alpha) and normalised as logarithms, so that no alpha underflows.

    Args:
        num_samples: B.
        num_members: M.
        alpha: concentration; 2 as published, 1 is uniform on the simplex, large is near 1/M.
        generator: on `device`.
        device: where lam is drawn and returned.

    Returns:
        lam (B, M) in [0, 1], each row summing to one.

    Raises:
        InputError: a count is below one or alpha is not positive and finite.
    """
    _check_count("num_samples", num_samples)
    _check_count("num_members", num_members)
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha must be positive and finite; got {alpha}.")
    size = (num_samples, num_members)
    gamma = torch._standard_gamma(torch.full(size, alpha + 1.0, device=device), generator=generator)
    uniform = 1.0 - torch.rand(size, generator=generator, device=device)  # (0, 1]: log is finite
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=1)


def draw_masks(
    kind: str,
    lam: Tensor,
    shape: Shape,
    *,
    generator: torch.Generator | None = None,
    shuffle_roles: bool = True,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Draw the mask of each member for each sample.

    Kinds:
        sum: 1/M everywhere, whatever lam is (MIMO).
        linear: lam everywhere (Linear-MixMo).
        cutmix: one member inside a box with sides floor(h·√lam) and floor(w·√lam), the centre
            uniform over the map, clipped to the map (Cut-MixMo). With M > 2 the other members
            share the outside in proportion to their lam.

    Args:
        kind: one of `MASK_KINDS`.
        lam: (B, M) from `draw_lam`; masks are made on its device and in its type.
        shape: (D, h, w) of the features to be mixed.
        generator: on lam's device.
        shuffle_roles: let chance decide, once per batch, which member gets the binary region;
            otherwise it is member 0.
        options: of the kind; none of the kinds above takes any.

    Returns:
        masks (B, M, 1, h, w) in [0, 1], summing to one over the members, and lam (B, M) corrected
        to the mean of each mask.

    Raises:
        InputError: unknown kind or option, wrong shapes, or a kind that needs two members has one.
    """
    if kind not in _DRAW:
        raise unknown("mask kind", kind, MASK_KINDS)
    _check_lam_and_shape(kind, lam, shape)
    draw = _DRAW[kind]
    _check_options(kind, draw, options)
    roles = torch.arange(lam.shape[1], device=lam.device)
    if shuffle_roles and kind in BINARY_KINDS:
        roles = torch.randperm(lam.shape[1], generator=generator, device=lam.device)
    # Role r is played by member roles[r]; members keep their own lam whatever role they play.
    masks = draw(lam[:, roles], shape, generator, **options)
    masks = masks[:, roles.argsort()]
    return masks, masks.mean(dim=(2, 3, 4))


def loss_weights(lam: Tensor, root: float) -> Tensor:
    """Weigh each member's loss: w_i = M · lam_i^(1/root) / Σ_j lam_j^(1/root).

    Args:
        lam: (B, M) mask means, in [0, 1].
        root: r; 1 weighs by lam, 3 as published, infinity weighs all members alike.

    Returns:
        weights (B, M), each row summing to M.

    Raises:
        InputError: `root` is below one.
    """
    if not root >= 1:
        raise InputError(f"weight_root must be 1 or more (infinity is allowed); got {root}.")
    powers = lam.pow(1.0 / root)
    return lam.shape[1] * powers / powers.sum(dim=1, keepdim=True)


def mix_features(features: Tensor, masks: Tensor) -> Tensor:
    """Mix the members' features: F = M · Σ_i masks_i ⊙ features_i (paper, equation 5).

    The plain form of what `MixMoModel` does member by member; the factor M is part of the method.

    Args:
        features: (B, M, D, h, w).
        masks: (B, M, 1 or D, h, w).

    Returns:
        mixed features (B, D, h, w), in the type of `features`.
    """
    return features.shape[1] * (features * masks.to(features.dtype)).sum(dim=1)


# Each function below draws masks (B, M, 1 or D, h, w) by role: role 0 gets the binary region.


def _draw_sum(lam: Tensor, shape: Shape, generator: torch.Generator | None) -> Tensor:
    num_samples, num_members = lam.shape
    return lam.new_full((num_samples, num_members, 1, *shape[1:]), 1.0 / num_members)


def _draw_linear(lam: Tensor, shape: Shape, generator: torch.Generator | None) -> Tensor:
    return lam[:, :, None, None, None].expand(-1, -1, 1, *shape[1:])


def _draw_cutmix(lam: Tensor, shape: Shape, generator: torch.Generator | None) -> Tensor:
    rows = _draw_span(lam[:, 0], shape[1], generator)  # (B, h)
    columns = _draw_span(lam[:, 0], shape[2], generator)  # (B, w)
    box = rows[:, :, None] & columns[:, None, :]
    return _share_complement(box[:, None].to(lam.dtype), lam)


def _draw_span(area: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """Draw one side of a box of the given area share: (B,) -> (B, length) bool."""
    half = (length * area.sqrt()).long().div(2, rounding_mode="floor")
    centre = torch.randint(length, area.shape, generator=generator, device=area.device)
    places = torch.arange(length, device=area.device)
    # Comparing places that exist clips the box to the map.
    return (places >= (centre - half)[:, None]) & (places < (centre + half)[:, None])


def _share_complement(region: Tensor, lam: Tensor) -> Tensor:
    """Give `region` to role 0 and share the rest: (B, 1 or D, h, w) -> (B, M, 1 or D, h, w)."""
    if lam.shape[1] == 2:
        return torch.stack([region, 1 - region], dim=1)
    others = lam[:, 1:]
    total = others.sum(dim=1, keepdim=True)
    equal = torch.full_like(others, 1.0 / others.shape[1])
    shares = torch.where(total > 0, others / total, equal)[:, :, None, None, None]  # (B, M-1, …)
    return torch.cat([region[:, None], shares * (1 - region)[:, None]], dim=1)


_DRAW: dict[str, Callable[..., Tensor]] = {
    "sum": _draw_sum,
    "linear": _draw_linear,
    "cutmix": _draw_cutmix,
}
BINARY_KINDS = tuple(kind for kind in MASK_KINDS if kind not in ("sum", "linear"))
"""Kinds that hand places to members, as opposed to blending all members everywhere."""


def check_kind(kind: str, num_members: int) -> None:
    """Check that a mask kind exists and suits the number of members.

    Raises:
        InputError: the kind is unknown, or it mixes and there is nothing to mix.
    """
    if kind not in MASK_KINDS:
        raise unknown("mask kind", kind, MASK_KINDS)
    if kind != "sum" and num_members < 2:
        raise InputError(
            f"mix={kind!r} needs two members or more; got num_members={num_members}.\n"
            "Use num_members=2, or mix='sum' for a network of one member."
        )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be 1 or more; got {value}.")


def _check_lam_and_shape(kind: str, lam: Tensor, shape: Shape) -> None:
    if lam.ndim != 2:
        raise InputError(f"lam must have shape (B, M); got {tuple(lam.shape)}.")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape must be (D, h, w), each 1 or more; got {tuple(shape)}.")
    check_kind(kind, lam.shape[1])


def _check_options(kind: str, draw: Callable[..., Tensor], options: dict[str, float]) -> None:
    allowed = list(inspect.signature(draw).parameters)[3:]
    for name in options:
        if name not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no options"
            raise InputError(f"Unknown option {name!r} of mask kind {kind!r}: {takes}.")
