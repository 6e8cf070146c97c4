"""Read the first batch of a loader without changing random states."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from fastai.data.load import DataLoader

from mixmo_fastai.errors import InputError


def first_batch(loader: Any) -> Any:
    """Return the first batch of a loader, without starting worker processes.

    Raises:
        InputError: the loader has no batch.
    """
    with ExitStack() as stack:
        inner = vars(loader).get("loader", loader)  # unwrap a view
        if isinstance(inner, DataLoader):
            stack.enter_context(inner.fake_l.no_multiproc())
        for batch in loader:
            return batch
    raise InputError(
        "The loader has no batch: it has no images, or drop_last is set and it has fewer images "
        "than the batch size.\nAdd images, or lower the batch size."
    )


@contextmanager
def preserved_random_states(loader: Any) -> Iterator[None]:
    """Restore the RNG states of Python, NumPy, torch and a loader after a with block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    loader_rng = getattr(loader, "rng", None)
    loader_state = None if loader_rng is None else loader_rng.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            if loader_rng is not None:
                loader.rng = loader_rng  # fastai creates a new one for each pass
                loader_rng.setstate(loader_state)
