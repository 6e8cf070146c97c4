"""Masks of every kind, for any number of members.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.

A new kind is a function in `regions.py` with its line in `REGIONS`, and its name in
`names.MASK_KINDS`, with its options, if any, in `names.MASK_OPTIONS`.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, unknown
from mixmo_fastai.mixing.regions import REGIONS, SOFT_REGIONS, Region, Shape
from mixmo_fastai.names import MASK_KINDS, MASK_OPTIONS

BLEND_KINDS = ("sum", "linear")
"""Kinds that blend the members alike at all places."""
BINARY_KINDS = tuple(kind for kind in REGIONS if kind not in SOFT_REGIONS)
"""Kinds that give each place to role 0 or to the others."""


def draw_masks(
    kind: str | Region,
    lam: Tensor,
    shape: Shape,
    *,
    generator: torch.Generator | None = None,
    shuffle_roles: bool = True,
    num_batches: int = 1,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Draw the mask of each member for each sample.

    Kinds:
        sum: 1/M everywhere, whatever lam is (MIMO).
        linear: lam everywhere (Linear-MixMo).
        cutmix: one member inside a box (Cut-MixMo).
        horizontal, vertical: one member in the first rows or columns.
        patchup, patchup-soft: one member in 7x7 blocks, alone or blended by lam.
        cow: one member in irregular spots.
        channel, channel-stack: one member in random or the first channels, at all places.
        noise: blended at each place by uniform noise with mean lam.

    All but the first two are regions of one member, in role 0; with M > 2 the others share the rest
    in proportion to their lam, which is CutMix(A, Mixup(B, C, …)) for `cutmix`. The functions in
    `regions.py` say what each does and which options it takes.

    Args:
        kind: one of `MASK_KINDS`, or a function as in `regions.py` that draws a region of your own.
        lam: (B, M) from `draw_lam`; masks are made on its device and in its type.
        shape: (D, h, w) of the features to be mixed.
        generator: on lam's device.
        shuffle_roles: let chance decide, once per batch, which member is in role 0; otherwise it is
            member 0.
        num_batches: into which the samples fall, one after the other and of equal size; each has
            roles of its own.
        options: of the kind, such as block_size=5 for patchup.

    Returns:
        masks (B, M, 1 or D, h, w) in [0, 1], summing to one over the members, and lam (B, M)
        corrected to the mean of each mask.

    Raises:
        InputError: unknown kind or option, wrong shapes, batches that are not of equal size, a kind
            that needs two members has one, or a function draws no region.
    """
    _check_lam_and_shape(lam, shape, num_batches)
    check_kind(kind, lam.shape[1])
    check_options(kind, options)
    if kind in BLEND_KINDS:
        means = lam if kind == "linear" else torch.full_like(lam, 1.0 / lam.shape[1])
        masks = means[:, :, None, None, None]
    else:
        first = torch.zeros(num_batches, dtype=torch.int64, device=lam.device)
        if shuffle_roles:
            first = torch.randint(
                lam.shape[1], (num_batches,), generator=generator, device=lam.device
            )
        inside, outside = _shares(lam, first)
        area = (lam * inside).sum(dim=1)
        if isinstance(kind, str):
            region = REGIONS[kind](area, shape, generator, **options)
        else:
            _check_arguments(kind, (area, shape, generator), options)
            region = kind(area, shape, generator, **options)
            _check_region(region, lam, shape, name_of(kind))
        # Means are taken before the members share the region, and before alike places are repeated.
        means = torch.lerp(outside, inside, region.mean(dim=(1, 2, 3))[:, None])
        inside, outside = (share[:, :, None, None, None] for share in (inside, outside))
        # A product and a sum in place: of these shapes, addcmul takes twice the time on a CPU.
        masks = (region[:, None] * (inside - outside)).add_(outside)
    return masks.expand(-1, -1, -1, *shape[1:]), means


def name_of(kind: str | Region) -> str:
    """Give the name of a mask kind, or of the function that draws it."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


def check_kind(kind: str | Region, num_members: int) -> None:
    """Check that a mask kind exists and suits the number of members.

    Raises:
        InputError: the kind is unknown, or it mixes and there is nothing to mix.
    """
    if kind not in MASK_KINDS and not callable(kind):
        raise unknown("mask kind", str(kind), MASK_KINDS)
    if kind != "sum" and num_members < 2:
        raise InputError(
            f"mix={name_of(kind)!r} needs two members or more; got num_members={num_members}.\n"
            "Use num_members=2, or mix='sum' for a network of one member."
        )


def check_options(kind: str | Region, options: Mapping[str, float]) -> None:
    """Check that a mask kind takes the options.

    Raises:
        InputError: naming the option and those that the kind takes.
    """
    allowed = MASK_OPTIONS.get(kind, ()) if isinstance(kind, str) else _keywords_of(kind)
    for name in options:
        if name not in allowed and not _takes_any(kind):
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no options"
            raise InputError(f"Unknown option {name!r} of mask kind {name_of(kind)!r}: {takes}.")


def _takes_any(kind: str | Region) -> bool:
    known = None if isinstance(kind, str) else _signature_of(kind)
    kinds = [] if known is None else [p.kind for p in known.parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _keywords_of(region: Region) -> tuple[str, ...]:
    """List what a function takes beyond area, shape and generator."""
    known = _signature_of(region)
    return () if known is None else tuple(known.parameters)[3:]


def _signature_of(region: Region) -> inspect.Signature | None:
    try:
        return inspect.signature(region)
    except (TypeError, ValueError):  # of some builtins
        return None


def _check_arguments(
    region: Region, arguments: tuple[object, ...], options: Mapping[str, float]
) -> None:
    known = _signature_of(region)
    try:
        if known is not None:
            known.bind(*arguments, **options)
    except TypeError as error:
        raise InputError(
            f"The mask kind {name_of(region)!r} must take area (B,), shape (D, h, w) and a "
            f"generator, and options by keyword: {error}."
        ) from error


def _check_region(region: Tensor, lam: Tensor, shape: Shape, name: str) -> None:
    limits = ((len(lam),), *((1, size) for size in shape))
    fits = isinstance(region, Tensor) and region.ndim == 4 and region.dtype == lam.dtype
    if not fits or any(n not in allowed for n, allowed in zip(region.shape, limits, strict=True)):
        wanted = ", ".join(f"1 or {size}" for size in shape)
        got = (
            f"{region.dtype} of {tuple(region.shape)}"
            if isinstance(region, Tensor)
            else type(region).__name__
        )
        raise InputError(
            f"The mask kind {name!r} must give {lam.dtype} of ({len(lam)}, {wanted}) in [0, 1]; it "
            f"gave {got}."
        )
    # Looked at where that makes no device wait.
    if region.device.type == "cpu" and not bool(((region >= 0) & (region <= 1)).all()):
        raise InputError(
            f"The mask kind {name!r} must give values in [0, 1]; they are from "
            f"{float(region.min()):g} to {float(region.max()):g}."
        )


def _shares(lam: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Share the inside and the outside of regions among the members.

    Args:
        lam: (B, M), of one or several batches one after the other.
        first: (batches,), which member is in role 0 of each.

    Returns:
        two of (B, M): all of the inside is role 0's; the others share the outside in proportion to
        their lam, whatever role they play.
    """
    size, members = lam.shape
    plays_first = torch.arange(members, device=lam.device) == first[:, None]
    plays_first = plays_first[:, None].expand(-1, size // len(first), -1).reshape(size, members)
    inside = plays_first.to(lam.dtype)
    others = lam * (1 - inside)
    total = others.sum(dim=1, keepdim=True)
    outside = torch.where(total > 0, others / total, (1 - inside) / (members - 1))
    return inside, outside


def _check_lam_and_shape(lam: Tensor, shape: Shape, num_batches: int) -> None:
    if lam.ndim != 2:
        raise InputError(f"lam must have shape (B, M); got {tuple(lam.shape)}.")
    if num_batches < 1 or len(lam) % num_batches:
        raise InputError(f"{len(lam)} samples cannot be {num_batches} batches of equal size.")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape must be (D, h, w), each 1 or more; got {tuple(shape)}.")
