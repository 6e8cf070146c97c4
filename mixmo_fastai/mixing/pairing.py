"""Pairing: which member sees which image.

Shapes: n distinct images, b batch repetitions, M members, B = b·n positions in the batch that the
network sees. The images are copied into M·B *slots*; slot s holds image s mod n. Member i draws
from its own B slots, i·B to (i + 1)·B - 1, so with augmentation per slot, each position has an
augmentation of its own. The exception is input repetition, which shows slots of member 0 to all.

Source: Havasi et al., "MIMO", ICLR 2021, appendix (batch and input repetition); MixMo, section 4.1.
"""

import torch
from torch import Tensor

from mixmo_fastai.errors import check_count, check_fraction


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
    input_repetition: float = 0.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the slot that each member sees at each position, for several batches at once.

    Every member sees every image exactly `batch_repetitions` times, in an independent, uniformly
    random order. At round(input_repetition · B) positions, all members see the same slot and thus
    the same pixels, as at inference.

    Args:
        num_batches: S; batches are drawn independently.
        num_images: n distinct images.
        num_members: M.
        batch_repetitions: b; 4 in the paper, 1 pairs each image once.
        input_repetition: fraction of positions at which all members see the same image; 0 in the
            paper.
        generator: generator on `device`.
        device: device of the slots.

    Returns:
        slots (S, B, M) int64 in [0, M·B), with B = b·n; slot s shows image s mod n.

    Raises:
        InputError: a count is below one, or input_repetition is outside [0, 1].

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> slots = draw_pairings(5, 4, 2, 2, input_repetition=0.25, generator=generator)
        >>> slots.shape
        torch.Size([5, 8, 2])
        >>> (slots[:, :, 0] == slots[:, :, 1]).sum(dim=1)  # 1/4 of 8 positions in each batch
        tensor([2, 2, 2, 2, 2])
    """
    check_pairing(num_members, batch_repetitions, input_repetition)
    check_count("num_images", num_images)
    check_count("num_batches", num_batches)
    batch_size = batch_repetitions * num_images
    num_free = batch_size - round(input_repetition * batch_size)
    member_0 = _draw_permutations((num_batches, 1, batch_size), generator, device)  # (S, 1, B)
    free_shape = (num_batches, num_members - 1, num_free)
    orders = _draw_permutations(free_shape, generator, device)
    slot_offsets = batch_size * torch.arange(1, num_members, device=device)[:, None]
    # The same images as member 0, in each member's own slots.
    free = member_0[..., :num_free].expand(free_shape).gather(2, orders) + slot_offsets
    repeated = member_0[..., num_free:].expand(-1, num_members - 1, -1)
    return torch.cat([member_0, torch.cat([free, repeated], dim=2)], dim=1).transpose(1, 2)


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
) -> Tensor:
    """Draw independent uniform permutations of the last axis with one sort."""
    keys = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    return keys.argsort(dim=-1)
