"""Readable errors for failures outside the training code: out of memory, lost worker processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError, RunFailedError, remove_fastai_prefix

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|STATUS_ALLOC_FAILED"
)
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: (\w+))?"
)


@contextmanager
def readable_errors(recipe: Recipe, precision: str) -> Iterator[None]:
    """Convert out-of-memory and lost-worker errors in a with block into a RunFailedError.

    Args:
        recipe: the recipe of the run.
        precision: description of the precision, as in `Acceleration.describe`.

    Raises:
        RunFailedError: memory ran out, or a data loader worker was lost.
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
        remedies.append("--precision bfloat16, which needs about half the memory")
    if not remedies:
        remedies.append("a smaller --arch")
    return (
        f"Out of memory with {train.batch_size} images per step in {precision}.\n"
        f"Start a new run with {' or '.join(remedies)}."
    )


def _lost_worker(pid: str, signal: str | None) -> str:
    reason = f"was killed by a signal ({signal})" if signal else "exited"
    return (
        f"Data loader worker {pid} {reason}. The system may kill workers if memory is low.\n"
        "Existing checkpoints are unchanged. Continue with --resume."
    )
