"""Copies of each image within a batch, with fresh augmentation per copy.

MixMo needs every image M·b times in a batch. Copying after the loader's batch transforms would
give all copies the same crop and flip, so the copies are made *before* them. Nothing of a user's
loader is changed for longer than the fetching of one batch, hence nothing stays changed after an
interruption.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastai.data.load import DataLoader
from fasttransform import Pipeline, Transform
from torch import Tensor

from mixmo_fastai.data.loaders import Arrangement, BatchLoader


class Expansion(NamedTuple):
    """A view of a loader, how often each image is in its batches, and in which order.

    In a batch of n distinct images, slot s is copy s // n of image s mod n. Position s shows slot
    s, unless the batch is `arranged`: its positions then show the slots that were asked for.
    """

    loader: Any
    copies: int
    arranged: bool = False


def expand(loader: Any, copies: int, arrange: Arrangement | None = None) -> Expansion:
    """View a loader so that each batch holds every image `copies` times, each augmented afresh.

    Args:
        loader: one of this package's loaders, or another fastai loader, whose batch transforms then
            run on the copies. What it does item by item is done once per image. A loader of another
            kind, such as torch's, cannot augment copies; it is given back as it is, with one copy.
        copies: how often each image is to be there.
        arrange: says which slots the positions of a batch show, from step and n; only this
            package's loaders ask it.
    """
    if isinstance(loader, BatchLoader) and (copies > 1 or arrange is not None):
        return Expansion(loader.expanded(copies, arrange), copies, arrange is not None)
    if copies == 1:
        return Expansion(loader, 1)
    transforming = _transforming(loader)
    if isinstance(transforming, DataLoader) and isinstance(transforming.after_batch, Pipeline):
        return Expansion(TransformedCopies(loader, copies), copies)
    return Expansion(loader, 1)


def _transforming(loader: Any) -> Any:
    """Give the loader that runs the batch transforms: within fastai's distributed one, its own."""
    # Importing fastai's module needs accelerate; where nobody has, nobody has such a loader.
    module = sys.modules.get("fastai.distributed")
    distributed = module is not None and isinstance(loader, module.DistributedDL)
    return loader.dl if distributed else loader


class RepeatBatch(Transform):
    """Repeat every tensor of a batch along its first axis, before all other batch transforms."""

    order = -1000

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def __call__(self, batch: Any, **kwargs: Any) -> Any:
        return repeat_batch(batch, self.copies)


class TransformedCopies:
    """A fastai loader whose batches are repeated before its batch transforms.

    It passes for the loader itself with callbacks that look at it, and with fastai, which would
    wrap a distributed one once more.
    """

    def __init__(self, loader: DataLoader, copies: int) -> None:
        self.loader, self.copies, self.transforming = loader, copies, _transforming(loader)

    @property
    def __class__(self) -> Any:
        return type(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "loader" not in vars(self):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __reduce__(self) -> Any:
        return TransformedCopies, (self.loader, self.copies)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        # One pipeline for the whole pass: fastai tells it at the start that it is of training.
        own = self.transforming.after_batch
        repeating = Pipeline([RepeatBatch(self.copies), *own.fs], split_idx=own.split_idx)
        while True:
            with self._transforming_with(repeating):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextmanager
    def _transforming_with(self, pipeline: Pipeline) -> Iterator[None]:
        own, self.transforming.after_batch = self.transforming.after_batch, pipeline
        try:
            yield
        finally:
            self.transforming.after_batch = own


def repeat_batch(batch: Any, copies: int) -> Any:
    """Repeat every tensor of a batch along its first axis, keeping its type."""
    if isinstance(batch, Tensor):
        return batch.repeat(copies, *(1 for _ in batch.shape[1:]))
    if isinstance(batch, list | tuple):
        return type(batch)(repeat_batch(part, copies) for part in batch)
    if isinstance(batch, dict):
        return {key: repeat_batch(part, copies) for key, part in batch.items()}
    return batch
