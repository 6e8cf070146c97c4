"""Batches with several copies of each image, each copy augmented independently.

MixMo needs every image M·b times in a batch. Copies made after the loader's batch transforms would
all have the same crop and flip, so they are made *before*. A user's loader is modified only while
one batch is fetched, so that it is unchanged after an interruption.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from fastai.data.load import DataLoader
from fasttransform import Pipeline, Transform
from torch import Tensor

from mixmo_fastai.data.cuts import Arrangement
from mixmo_fastai.data.loaders import BatchLoader


class Expansion(NamedTuple):
    """A view of a loader, with the number of copies of each image per batch and their order.

    In a batch of n distinct images, slot s is copy s // n of image s mod n. Position s holds slot
    s, unless the batch is `arranged`: its positions then hold the slots returned by `arrange`, and
    the loader has thus paired the images.
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
        arrange: see `cuts.Arrangement`; only used by this package's loaders.
    """
    if isinstance(loader, BatchLoader) and (copies > 1 or arrange is not None):
        return Expansion(loader.expanded(copies, arrange), copies, arrange is not None)
    if copies == 1:
        return Expansion(loader, 1)
    inner = _inner_loader(loader)
    if isinstance(inner, DataLoader) and isinstance(inner.after_batch, Pipeline):
        return Expansion(with_copies(loader, copies), copies)
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


class _WithCopies:
    """The iteration of a fastai loader whose batches are repeated before its batch transforms."""

    # Not in the dictionary of attributes, which the user's loader shares.
    __slots__ = ("copies", "loader")

    def __iter__(self) -> Iterator[Any]:
        inner = _inner_loader(self)
        batches = super().__iter__()  # type: ignore[misc]
        # One pipeline for the whole pass: fastai sets its split index at the start.
        original = inner.after_batch
        repeating = Pipeline([RepeatBatch(self.copies), *original.fs], split_idx=original.split_idx)
        while True:
            with _replaced_transforms(inner, repeating):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def __reduce__(self) -> Any:
        return with_copies, (self.loader, self.copies)


def with_copies(loader: DataLoader, copies: int) -> Any:
    """Return a view of a fastai loader whose batches are repeated before its batch transforms.

    The view is an instance of a subclass of the loader's class, and has the same attributes, also
    those that are set later: the loader's random order, for example, advances with each pass.
    """
    view = object.__new__(_class_with_copies(type(loader)))
    view.loader, view.copies, view.__dict__ = loader, copies, vars(loader)
    return view


@cache
def _class_with_copies(kind: type) -> Any:
    return type(kind.__name__, (_WithCopies, kind), {"__module__": __name__})


@contextmanager
def _replaced_transforms(loader: Any, pipeline: Pipeline) -> Iterator[None]:
    original, loader.after_batch = loader.after_batch, pipeline
    try:
        yield
    finally:
        loader.after_batch = original


def repeat_batch(batch: Any, copies: int) -> Any:
    """Repeat every tensor of a batch along its first axis, keeping the types of containers."""
    if isinstance(batch, Tensor):
        return batch.repeat(copies, *(1 for _ in batch.shape[1:]))
    if isinstance(batch, list | tuple):
        parts = [repeat_batch(part, copies) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, dict):
        return {key: repeat_batch(part, copies) for key, part in batch.items()}
    return batch
