"""Pairing: which member sees which image.

Shapes: n distinct images, b batch repetitions, M members, B = b·n positions in the batch that the
network sees. The images are copied into M·B *slots*; slot s holds image s mod n. Member i draws
from its own B slots, i·B to (i + 1)·B - 1, so with augmentation per slot, each position has an
augmentation of its own. The exception is input repetition, which shows slots of member 0 to all.

Source: Havasi et al., "MIMO", ICLR 2021, appendix (batch and input repetition); MixMo, section 4.1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixmo_fastai.config.choices import EARLY_SHAPES
from mixmo_fastai.errors import InputError, check_count, check_fraction, unknown_name_error


def num_copies(num_members: int, batch_repetitions: int) -> int:
    """Return the number of copies of each image in one batch.

    Example:
        >>> num_copies(num_members=2, batch_repetitions=4)
        8
    """
    return num_members * batch_repetitions


def draw_pairing(
    num_images: int,
    num_members: int,
    batch_repetitions: int = 4,
    input_repetition: float = 0.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the slots of one batch, (B, M); see `draw_pairings`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> slots = draw_pairing(3, num_members=2, batch_repetitions=2, generator=generator)
        >>> slots.shape
        torch.Size([6, 2])
        >>> (slots % 3).sort(dim=0).values.T.tolist()  # images of each member
        [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]
    """
    counts = (1, num_images, num_members, batch_repetitions, input_repetition)
    return draw_pairings(*counts, generator=generator, device=device)[0]


def draw_pairings(
    num_batches: int,
    num_images: int,
    num_members: int,
    batch_repetitions: int = 4,
    input_repetition: float | Sequence[float] = 0.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the slot that each member sees at each position, for several batches at once.

    Every member sees every image exactly `batch_repetitions` times, in an independent, uniformly
    random order. At round(input_repetition · B) positions, spread evenly over the batch, all
    members see the same slot and thus the same pixels, as at inference.

    Args:
        num_batches: S; batches are drawn independently.
        num_images: n distinct images.
        num_members: M.
        batch_repetitions: b; 4 in the paper, 1 pairs each image once.
        input_repetition: fraction of positions at which all members see the same image, for all
            batches or one per batch; 0 in the paper.
        generator: generator on `device`.
        device: device of the slots.

    Returns:
        slots (S, B, M) int64 in [0, M·B), with B = b·n; slot s shows image s mod n.

    Raises:
        InputError: a count is below one, input_repetition is outside [0, 1], or there is not one
            per batch.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> slots = draw_pairings(5, 4, 2, 2, input_repetition=0.25, generator=generator)
        >>> slots.shape
        torch.Size([5, 8, 2])
        >>> (slots[:, :, 0] == slots[:, :, 1]).sum(dim=1)  # 1/4 of 8 positions in each batch
        tensor([2, 2, 2, 2, 2])
    """
    check_count("num_images", num_images)
    check_count("num_batches", num_batches)
    if isinstance(input_repetition, Sequence):
        fractions = [*input_repetition]
    else:
        fractions = [input_repetition] * num_batches
    if len(fractions) != num_batches:
        raise InputError(f"input_repetition has {len(fractions)} values for {num_batches} batches.")
    for fraction in set(fractions):
        check_pairing(num_members, batch_repetitions, fraction)
    batch_size = batch_repetitions * num_images
    counts = [batch_size - round(fraction * batch_size) for fraction in fractions]
    num_free = max(counts)  # positions at which the members may see different images
    member_0 = _draw_permutations((num_batches, 1, batch_size), generator, device)  # (S, 1, B)
    free_shape = (num_batches, num_members - 1, num_free)
    permuted = None
    if min(counts) < num_free:  # in some batches, the last positions keep the order of member 0
        positions = torch.arange(num_free, device=device)
        # One comparison per batch: copying the counts to a GPU would make the host wait.
        permuted = torch.stack([positions < count for count in counts])[:, None]  # (S, 1, free)
    orders = _draw_permutations(free_shape, generator, device, permuted)
    slot_offsets = batch_size * torch.arange(1, num_members, device=device)[:, None]
    # The same images as member 0, in each member's own slots.
    if permuted is not None:
        slot_offsets = slot_offsets * permuted
    free = member_0[..., :num_free].expand(free_shape).gather(2, orders) + slot_offsets
    repeated = member_0[..., num_free:].expand(-1, num_members - 1, -1)
    slots = torch.cat([member_0, torch.cat([free, repeated], dim=2)], dim=1).transpose(1, 2)
    if all(count in (0, batch_size) for count in counts):
        return slots
    order = torch.stack([_spread_order(count, batch_size, device) for count in counts])  # (S, B)
    return slots.gather(1, order[..., None].expand_as(slots))


def _spread_order(num_first: int, size: int, device: torch.device | str | None) -> Tensor:
    """Order positions such that those from `num_first` on are spread evenly among the others.

    Groups of neighbouring positions, such as those of ghost batches or of a process, then have
    about equal fractions of both kinds.
    """
    positions = torch.arange(size, device=device)
    num_last = size - num_first
    last_before = positions * num_last // size  # how many of the last come before each position
    is_last = (positions + 1) * num_last // size > last_before
    return torch.where(is_last, num_first + last_before, positions - last_before)


def scheduled_repetition(
    progress: float, late: float, early: float | None, span: float, shape: str
) -> float:
    """Return the fraction of positions at which all members see the same image, by schedule.

    Members that see the same images learn almost as a plain network does, apart from the masks and
    the weights of the loss; this takes fewer images than learning from mixed images from the start.

    Args:
        progress: completed fraction of training, in [0, 1].
        late: the fraction from `span` on.
        early: the fraction at the start; None for `late`.
        span: fraction of training in which it changes.
        shape: "step" for a change at `span`; "linear" or "cosine" for a change from the start on.

    Raises:
        InputError: unknown shape.

    Example:
        >>> [scheduled_repetition(p, 0.0, 1.0, 0.5, "linear") for p in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.5, 0.0, 0.0]
        >>> [scheduled_repetition(p, 0.0, 1.0, 0.5, "step") for p in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 1.0, 0.0, 0.0]
    """
    if shape not in EARLY_SHAPES:
        raise unknown_name_error("shape of a schedule", shape, EARLY_SHAPES)
    if early is None or progress >= span:
        return late
    fraction = progress / span
    if shape == "step":
        return early
    if shape == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return early + (late - early) * fraction


def check_pairing(num_members: int, batch_repetitions: int, input_repetition: float) -> None:
    """Check the settings of a pairing.

    Raises:
        InputError: a count is below one, or input_repetition is outside [0, 1].

    Example:
        >>> check_pairing(num_members=2, batch_repetitions=4, input_repetition=0.5)
        >>> check_pairing(num_members=2, batch_repetitions=0, input_repetition=0.5)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: batch_repetitions must be an integer, 1 or more; got 0.
    """
    check_count("num_members", num_members)
    check_count("batch_repetitions", batch_repetitions)
    check_fraction("input_repetition", input_repetition)


def _draw_permutations(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    permuted: Tensor | None = None,
) -> Tensor:
    """Draw independent uniform permutations of the last axis with one sort.

    Args:
        shape: of the result.
        generator: generator on `device`.
        device: device of the result.
        permuted: (S, 1, length) bool, the first positions of the last axis; those after them keep
            their places. None if all are permuted.
    """
    keys = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    if permuted is not None:
        places = 1.0 + torch.arange(shape[-1], device=device)  # above all random keys, ascending
        keys = keys.where(permuted, places)
    return keys.argsort(dim=-1)
