"""Every random draw comes from a generator made for its purpose and its place in training.

A generator is a function of (seed, stream, epoch, step, rank) and of nothing else. So no draw
depends on what ran before it: a run resumes at any step without saved random states, `lr_find` or
an evaluation in between changes nothing, and ranks draw alike or differently as the caller says.
"""

import hashlib
from typing import Literal, get_args

import torch

Stream = Literal[
    "network",  # the seed of each network of a deep ensemble
    "init",  # initial weights
    "split",  # which training images validate
    "test split",  # which images of a folder without a test set test
    "limit",  # which training images a trial keeps
    "order",  # order of the images of an epoch
    "augment",  # crops and flips of a batch
    "augmix",  # chains of operations of AugMix, per image
    "pairing",  # which member sees which image
    "schedule",  # whether a batch is mixed with the binary kind or linearly
    "lam",  # mixing ratios
    "msda",  # which images are mixed with which, and where
    "bootstrap",  # resamples of test images
    "halves",  # which half of the test set a temperature is fitted on
    "corruption",  # noise on test images
    "masks",  # boxes, seeds, noise and roles of the members
]
"""A named purpose of random draws. Two streams never share numbers by design."""

STREAMS: tuple[Stream, ...] = get_args(Stream)


def derive_seed(seed: int, stream: Stream, epoch: int = 0, step: int = 0, rank: int = 0) -> int:
    """Hash a place in training to a 63-bit seed.

    Torch's CPU generator keeps the low 32 bits of it and its CUDA generator all of them.

    Raises:
        ValueError: `stream` is not one of `STREAMS`.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}; got {stream!r}.")
    key = f"{seed}/{stream}/{epoch}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def fresh_seed() -> int:
    """Draw one seed, for all draws of a run, from torch's global generator (`set_seed` sets it)."""
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
    """Make the generator of one stream at one place in training.

    Args:
        seed: the run's seed.
        stream: what the draws are for.
        epoch: epochs begun since training started.
        step: batches since the epoch began.
        rank: the process in distributed training; 0 where all ranks must draw alike.
        device: where the draws are made; the generator only serves tensors there.
    """
    generator = torch.Generator(device=device if device is not None else "cpu")
    return generator.manual_seed(derive_seed(seed, stream, epoch, step, rank))
