"""What can end a training from outside, in words: no memory left, a lost worker process."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mixmo_fastai.errors import InputError, RunFailedError, remove_fastai_prefix
from mixmo_fastai.recipe import Recipe

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|STATUS_ALLOC_FAILED"
)
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: (\w+))?"
)


@contextmanager
def explained(recipe: Recipe, precision: str) -> Iterator[None]:
    """Turn what ends a training within into an error that a person can act on.

    Args:
        recipe: of the training.
        precision: what it computes in, in words.

    Raises:
        RunFailedError: memory ran out, or a process that reads images was lost.
    """
    try:
        yield
    except (InputError, RunFailedError) as error:
        raise remove_fastai_prefix(error) from error.__cause__
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY.search(text):
            raise RunFailedError(_out_of_memory(recipe, precision)) from error
        if lost := _WORKER.search(text):
            raise RunFailedError(_lost_worker(*lost.groups())) from error
        raise


def _out_of_memory(recipe: Recipe, precision: str) -> str:
    train, copies = recipe.train, recipe.mix.batch_repetitions
    remedies = []
    if smaller := train.batch_size // 2 // copies * copies:
        remedies.append(f"--batch-size {smaller}")
    if "bfloat16" not in precision:
        remedies.append("--precision bfloat16, which takes about half")
    if not remedies:
        remedies.append("a smaller --arch")
    return (
        f"Out of memory with {train.batch_size} images per step in {precision}.\n"
        f"Start a new run with {' or '.join(remedies)}."
    )


def _lost_worker(pid: str, signal: str | None) -> str:
    how = f"was ended by a signal ({signal})" if signal else "ended"
    return (
        f"Process {pid}, which read images, {how}. Where memory is short, the system ends some.\n"
        "What was saved before is as it was; continue with --resume."
    )
