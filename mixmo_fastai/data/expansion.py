"""Copies of each image within a batch, with fresh augmentation per copy.

MixMo needs every image M·b times in a batch. Copying after the loader's batch transforms would
give all copies the same crop and flip, so the copies are made *before* them. Nothing of a user's
loader is changed for longer than the fetching of one batch, hence nothing stays changed after an
interruption.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastai.data.load import DataLoader
from torch import Tensor


def expand(loader: Any, copies: int) -> Any:
    """View a loader so that each batch holds every image `copies` times.

    A batch of n images becomes one of copies·n, in which position s shows image s mod n. The
    number of batches stays.

    Args:
        loader: one of this package's loaders, which augment each copy afresh; any other fastai
            loader, whose batch transforms then run on the copies; or any iterable of batches, which
            are copied as they come.
        copies: how often each image is to be there; with 1 the loader itself is returned.
    """
    if copies == 1:
        return loader
    if hasattr(loader, "expanded"):
        return loader.expanded(copies)
    kind = TransformedCopies if isinstance(loader, DataLoader) else PlainCopies
    return kind(loader, copies)


class PlainCopies:
    """A loader whose batches are repeated as they come: all copies of an image are alike."""

    def __init__(self, loader: Any, copies: int) -> None:
        self.loader, self.copies = loader, copies

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield repeat_batch(batch, self.copies)


class TransformedCopies(PlainCopies):
    """A fastai loader whose batches are repeated before its batch transforms."""

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            with self._repeating():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Put the repetition in front of `after_batch`, for as long as one batch is fetched."""
        own = vars(self.loader)
        transform, had_own = self.loader.after_batch, "after_batch" in own
        own["after_batch"] = lambda batch: transform(repeat_batch(batch, self.copies))
        try:
            yield
        finally:
            if had_own:
                own["after_batch"] = transform
            else:
                del own["after_batch"]


def repeat_batch(batch: Any, copies: int) -> Any:
    """Repeat every tensor of a batch along its first axis, keeping its type."""
    if isinstance(batch, Tensor):
        return batch.repeat(copies, *(1 for _ in batch.shape[1:]))
    if isinstance(batch, list | tuple):
        return type(batch)(repeat_batch(part, copies) for part in batch)
    if isinstance(batch, dict):
        return {key: repeat_batch(part, copies) for key, part in batch.items()}
    return batch
