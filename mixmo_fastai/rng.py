"""Random generators, each determined only by (seed, stream, epoch, step, rank).

No draw depends on earlier draws. A run therefore resumes at any step without saved random states,
`lr_find` or an evaluation in between does not change it, and the caller decides whether ranks draw
the same or different numbers.
"""

import hashlib
from typing import Literal, get_args

import torch

Stream = Literal[
    "network",  # seed of each network of a deep ensemble
    "init",  # initial weights
    "split",  # validation split of the training images
    "calibration split",  # calibration images of the validation split
    "test split",  # test split of an image folder without a test set
    "limit",  # subset of training images for --limit
    "order",  # image order of an epoch
    "augment",  # crops and flips of a batch
    "augmix",  # AugMix operations, per image
    "transform",  # other transforms of whole images, per image or per batch
    "pairing",  # which member sees which image
    "schedule",  # whether a batch is mixed by regions or linearly
    "lam",  # mixing ratios
    "msda",  # partners, ratios and boxes of MSDA
    "bootstrap",  # resamples of test images
    "bootstrap seeds",  # resamples of the seeds of a study
    "halves",  # halves of the test set for cross-fitted temperatures
    "folds",  # parts of the calibration images for cross-validation
    "corruption",  # noise on test images
    "masks",  # boxes, seeds, noise and roles of the members
]
"""Named purpose of random draws; each has its own generators."""

STREAMS: tuple[Stream, ...] = get_args(Stream)


def derive_seed(seed: int, stream: Stream, epoch: int = 0, step: int = 0, rank: int = 0) -> int:
    """Hash the arguments into a 63-bit seed.

    torch's CPU generator uses its low 32 bits, its CUDA generator all bits.

    Raises:
        ValueError: `stream` is not one of `STREAMS`.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}; got {stream!r}.")
    key = f"{seed}/{stream}/{epoch}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def fresh_seed() -> int:
    """Draw the seed of a run from torch's global generator, which `set_seed` seeds."""
    return int(torch.randint(2**63 - 1, ()))


def make_generator(
    seed: int,
    stream: Stream,
    epoch: int = 0,
    step: int = 0,
    rank: int = 0,
    *,
    device: torch.device | str | None = None,
) -> torch.Generator:
    """Create the generator of a stream for an epoch, step and rank.

    Args:
        seed: seed of the run.
        stream: purpose of the draws.
        epoch: index of the epoch, counted from the start of training.
        step: index of the batch in the epoch; of the first, if several batches are drawn together.
        rank: rank in distributed training; 0 if all ranks must draw the same numbers.
        device: device of the generator and of the tensors drawn with it.
    """
    generator = torch.Generator(device=device if device is not None else "cpu")
    return generator.manual_seed(derive_seed(seed, stream, epoch, step, rank))
