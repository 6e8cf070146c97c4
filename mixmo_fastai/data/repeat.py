"""Batches with several copies of each image, each copy augmented independently.

MixMo needs every image M·b times in a batch. Copies made after the loader's batch transforms would
all have the same crop and flip, so they are made *before*. A user's loader is modified only while
one batch is fetched, so that it is unchanged after an interruption.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastai.data.load import DataLoader
from fasttransform import Pipeline, Transform
from torch import Tensor

from mixmo_fastai.data.cuts import Arrangement
from mixmo_fastai.data.loaders import BatchLoader


class Expansion(NamedTuple):
    """A view of a loader, with the number of copies of each image per batch and their order.

    In a batch of n distinct images, slot s is copy s // n of image s mod n. Position s holds slot
    s, unless the batch is `arranged`: its positions then hold the slots returned by `arrange`.
    """

    loader: Any
    copies: int
    arranged: bool = False


def expand(loader: Any, copies: int, arrange: Arrangement | None = None) -> Expansion:
    """Return a view with `copies` independently augmented copies of each image per batch.

    Args:
        loader: one of this package's loaders, or another fastai loader, whose batch transforms then
            run on the copies. Its item transforms run once per image. Other loaders, such as
            torch's, cannot augment copies and are returned unchanged, with one copy.
        copies: number of copies of each image.
        arrange: maps step and n to the slots of the batch positions; only used by this package's
            loaders.
    """
    if isinstance(loader, BatchLoader) and (copies > 1 or arrange is not None):
        return Expansion(loader.expanded(copies, arrange), copies, arrange is not None)
    if copies == 1:
        return Expansion(loader, 1)
    inner = _inner_loader(loader)
    if isinstance(inner, DataLoader) and isinstance(inner.after_batch, Pipeline):
        return Expansion(TransformedCopies(loader, copies), copies)
    return Expansion(loader, 1)


def _inner_loader(loader: Any) -> Any:
    """Return the loader that runs the batch transforms; unwrap fastai's distributed loader."""
    # Importing fastai's module needs accelerate; without it, such a loader cannot exist.
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

    It imitates the loader for callbacks that inspect it, and for fastai, which would otherwise wrap
    a distributed loader again.
    """

    def __init__(self, loader: DataLoader, copies: int) -> None:
        self.loader, self.copies, self.inner = loader, copies, _inner_loader(loader)

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
        # One pipeline for the whole pass: fastai sets its split index at the start.
        original = self.inner.after_batch
        repeating = Pipeline([RepeatBatch(self.copies), *original.fs], split_idx=original.split_idx)
        while True:
            with self._replaced_transforms(repeating):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextmanager
    def _replaced_transforms(self, pipeline: Pipeline) -> Iterator[None]:
        original, self.inner.after_batch = self.inner.after_batch, pipeline
        try:
            yield
        finally:
            self.inner.after_batch = original


def repeat_batch(batch: Any, copies: int) -> Any:
    """Repeat every tensor of a batch along its first axis, keeping container types."""
    if isinstance(batch, Tensor):
        return batch.repeat(copies, *(1 for _ in batch.shape[1:]))
    if isinstance(batch, list | tuple):
        return type(batch)(repeat_batch(part, copies) for part in batch)
    if isinstance(batch, dict):
        return {key: repeat_batch(part, copies) for key, part in batch.items()}
    return batch
