"""Masks of every kind, for any number of members.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.

To add a kind, write a function like those in `regions.py`, and register it in
`choices.MASK_REGIONS`, and its options, if any, in `choices.MASK_OPTIONS`.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from mixmo_fastai.config.choices import MASK_OPTIONS, MASK_REGIONS
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, unknown_name_error
from mixmo_fastai.mixing.regions import REGIONS, SOFT_REGIONS, Region, Shape

BLEND_KINDS = ("sum", "linear")
"""Kinds that blend the members with the same ratio at all positions."""
BINARY_KINDS = tuple(kind for kind in REGIONS if kind not in SOFT_REGIONS)
"""Kinds whose region is 0 or 1 at each position."""
_SHIPPED = tuple(
    REGIONS[kind]
    for kind, target in MASK_REGIONS.items()
    if target is not None and target.startswith(f"{__package__}.regions:")
)
"""Functions whose regions need no checks."""


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
    """Draw one mask per sample and member.

    Kinds:
        sum: 1/M everywhere, independent of lam (MIMO).
        linear: lam everywhere (Linear-MixMo).
        cutmix: one member inside a box (Cut-MixMo).
        horizontal, vertical: one member in the first rows or columns.
        patchup, patchup-soft: one member in 7x7 blocks, binary or blended by lam.
        cow: one member in irregular spots.
        channel, channel-stack: one member in random or the first channels, at all positions.
        noise: blended at each position by uniform noise with mean lam.

    All but the first two draw a region for the member in role 0. With M > 2, the other members fill
    the rest in proportion to their lam; for `cutmix` this is CutMix(A, Mixup(B, C, …)). The
    functions in `regions.py` document each kind and its options.

    Args:
        kind: one of `choices.MASK_REGIONS`, or a function with the signature of those in
            `regions.py`.
        lam: (B, M) from `draw_lam`; the masks have its device and dtype.
        shape: shape (D, h, w) of the features to be mixed.
        generator: generator on the device of lam.
        shuffle_roles: whether to draw the member in role 0 once per batch; otherwise it is
            member 0.
        num_batches: number of batches of equal size that lam concatenates; roles are drawn for
            each batch.
        options: options of the kind, such as block_size=5 for patchup.

    Returns:
        masks (B, M, 1 or D, h, w) in [0, 1], summing to one over the members, and the mean (B, M)
        of each mask: the ratios as they are, for `loss_weights`.

    Raises:
        InputError: unknown kind or option, wrong shapes, batches of unequal size, one member with a
            kind that needs two, or a function that returns an invalid region.

    Example:
        >>> lam = torch.tensor([[0.3, 0.7]])
        >>> masks, means = draw_masks("horizontal", lam, (16, 4, 4), shuffle_roles=False)
        >>> masks.shape, means  # one row of four
        (torch.Size([1, 2, 1, 4, 4]), tensor([[0.2500, 0.7500]]))
        >>> masks[0, :, 0, :, 0].tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    """
    _check_lam_and_shape(lam, shape, num_batches)
    check_kind(kind, lam.shape[1])
    check_options(kind, options)
    if kind in BLEND_KINDS:
        means = lam if kind == "linear" else torch.full_like(lam, 1.0 / lam.shape[1])
        masks = means[:, :, None, None, None]
    else:
        members_in_role_0 = torch.zeros(num_batches, dtype=torch.int64, device=lam.device)
        if shuffle_roles:
            members_in_role_0 = torch.randint(
                lam.shape[1], (num_batches,), generator=generator, device=lam.device
            )
        inside, outside = _member_fractions(lam, members_in_role_0)
        area = (lam * inside).sum(dim=1)
        draw = _region_of(kind) if isinstance(kind, str) else kind
        if is_own := draw not in _SHIPPED:
            _check_arguments(draw, (area, shape, generator), options)
        region = draw(area, shape, generator, **options)
        if is_own:
            _check_region(region, lam, shape, kind_name(kind))
        # The mean is computed before broadcasting, on the smallest tensor.
        means = torch.lerp(outside, inside, region.mean(dim=(1, 2, 3))[:, None])
        inside, outside = (share[:, :, None, None, None] for share in (inside, outside))
        # On a CPU, addcmul takes twice as long for these shapes as a product and an in-place sum.
        masks = (region[:, None] * (inside - outside)).add_(outside)
    return masks.expand(-1, -1, -1, *shape[1:]), means


def _region_of(kind: str) -> Region:
    """Return the function of a mask kind, also of one that a program registered later."""
    region: Region = REGIONS.get(kind) or resolve_registered(
        "mask kind", kind, str(MASK_REGIONS[kind])
    )
    return region


def kind_name(kind: str | Region) -> str:
    """Return the name of a mask kind or of the function that draws it.

    Example:
        >>> kind_name("cutmix"), kind_name(REGIONS["cutmix"])
        ('cutmix', 'box')
    """
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


def check_kind(kind: str | Region, num_members: int) -> None:
    """Check that a mask kind exists and supports the number of members.

    Raises:
        InputError: unknown kind, or one member with a kind that mixes.

    Example:
        >>> check_kind("cutmix", num_members=2)
        >>> check_kind("cutmix", num_members=1)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: mix='cutmix' needs at least two members; got ...
    """
    if kind not in MASK_REGIONS and not callable(kind):
        raise unknown_name_error("mask kind", str(kind), MASK_REGIONS)
    if kind != "sum" and num_members < 2:
        raise InputError(
            f"mix={kind_name(kind)!r} needs at least two members; got num_members={num_members}.\n"
            "Use num_members=2, or mix='sum' for a network with one member."
        )


def check_options(kind: str | Region, options: Mapping[str, float]) -> None:
    """Check that a mask kind has the given options.

    Raises:
        InputError: unknown option; the message lists the options of the kind.

    Example:
        >>> check_options("patchup", {"block_size": 5})
        >>> check_options("cutmix", {"block_size": 5})
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: Unknown option 'block_size' of mask kind 'cutmix'...
    """
    allowed = MASK_OPTIONS.get(kind, ()) if isinstance(kind, str) else _option_names(kind)
    for name in options:
        if name not in allowed and not _accepts_any_option(kind):
            options_text = (
                f"Its options: {', '.join(allowed)}." if allowed else "It has no options."
            )
            raise InputError(
                f"Unknown option {name!r} of mask kind {kind_name(kind)!r}.\n{options_text}"
            )


def _accepts_any_option(kind: str | Region) -> bool:
    signature = None if isinstance(kind, str) else _signature(kind)
    parameters = [] if signature is None else signature.parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _option_names(region: Region) -> tuple[str, ...]:
    """Return the parameters of a function after area, shape and generator."""
    signature = _signature(region)
    return () if signature is None else tuple(signature.parameters)[3:]


def _signature(region: Region) -> inspect.Signature | None:
    """Return the signature of a function, or None if it cannot be read."""
    try:
        return inspect.signature(region)
    except (TypeError, ValueError):  # some builtins have no signature
        return None


def _check_arguments(
    region: Region, arguments: tuple[object, ...], options: Mapping[str, float]
) -> None:
    signature = _signature(region)
    try:
        if signature is not None:
            signature.bind(*arguments, **options)
    except TypeError as error:
        raise InputError(
            f"The mask function {kind_name(region)!r} must accept area (B,), shape (D, h, w), a "
            f"generator and keyword options: {error}."
        ) from error


def _check_region(region: Tensor, lam: Tensor, shape: Shape, name: str) -> None:
    allowed_sizes = ((len(lam),), *((1, size) for size in shape))
    is_4d = isinstance(region, Tensor) and region.ndim == 4 and region.dtype == lam.dtype
    if not is_4d or any(
        size not in allowed for size, allowed in zip(region.shape, allowed_sizes, strict=True)
    ):
        expected = ", ".join(f"1 or {size}" for size in shape)
        got = (
            f"{region.dtype} of shape {tuple(region.shape)}"
            if isinstance(region, Tensor)
            else type(region).__name__
        )
        raise InputError(
            f"The mask function {name!r} must return {lam.dtype} of shape ({len(lam)}, {expected}) "
            f"in [0, 1]; it returned {got}."
        )
    # Values are checked on a CPU only, since reading them would synchronise a GPU.
    if region.device.type == "cpu" and not bool(((region >= 0) & (region <= 1)).all()):
        raise InputError(
            f"The mask function {name!r} must return values in [0, 1]; they range from "
            f"{float(region.min()):g} to {float(region.max()):g}."
        )


def _member_fractions(lam: Tensor, members_in_role_0: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the fraction of each member inside and outside the regions.

    Args:
        lam: (B, M), of one batch or several concatenated batches.
        members_in_role_0: (batches,), the member in role 0 of each batch.

    Returns:
        inside (B, M), which is 1 for the member in role 0; outside (B, M), the other members in
        proportion to their lam.
    """
    num_samples, num_members = lam.shape
    is_role_0 = torch.arange(num_members, device=lam.device) == members_in_role_0[:, None]
    batch_size = num_samples // len(members_in_role_0)
    is_role_0 = is_role_0[:, None].expand(-1, batch_size, -1).reshape(num_samples, num_members)
    inside = is_role_0.to(lam.dtype)
    others = lam * (1 - inside)
    total = others.sum(dim=1, keepdim=True)
    outside = torch.where(total > 0, others / total, (1 - inside) / (num_members - 1))
    return inside, outside


def _check_lam_and_shape(lam: Tensor, shape: Shape, num_batches: int) -> None:
    if lam.ndim != 2:
        raise InputError(f"lam must have shape (B, M); got {tuple(lam.shape)}.")
    if num_batches < 1 or len(lam) % num_batches:
        raise InputError(f"{len(lam)} samples cannot be split into {num_batches} equal batches.")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape must be (D, h, w), each 1 or more; got {tuple(shape)}.")
