"""A look at a loader's first batch, of which the loader and its random states know nothing."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from fastai.data.load import DataLoader

from mixmo_fastai.errors import InputError


def first_batch(loader: Any) -> Any:
    """Take a loader's first batch, without the worker processes of a whole pass."""
    with ExitStack() as alone:
        own = vars(loader).get("loader", loader)  # behind a view
        if isinstance(own, DataLoader):
            alone.enter_context(own.fake_l.no_multiproc())
        for batch in loader:
            return batch
    raise InputError(
        "The loader gives no batch: it has no images, or fewer than its batch size and drop_last."
    )


@contextmanager
def preserved_random_states(loader: Any) -> Iterator[None]:
    """Draw what a loader and its transforms draw, and let nobody find out."""
    python, numpy = random.getstate(), np.random.get_state()
    own = getattr(loader, "rng", None)
    order = None if own is None else own.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if own is not None:
                loader.rng = own  # fastai makes another for each pass
                own.setstate(order)
