"""Loaders that augment whole batches on the device: resident and streaming.

Shapes: N images of the data set, n distinct images per batch, C channels, H W image size, p crop
padding.

Both are fastai loaders and differ only in the source of the pixels. Order and augmentation are
functions of (seed, epoch, step), so they depend neither on the number of workers nor on earlier
draws. Drawing and cropping are done for several steps at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, TensorMultiCategory, to_detach
from torch import Tensor

from mixmo_fastai.data.augment import (
    Normalizer,
    StoredImages,
    draw_alternating_flips,
    draw_crops,
    draw_flips,
)
from mixmo_fastai.data.cuts import STEPS_AT_ONCE, Arrangement, Augmentation, Cuts
from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.data.items import as_items
from mixmo_fastai.data.pixel_reader import PixelReader, pixel_reader
from mixmo_fastai.data.transforms import BatchTransform, OriginalCrop
from mixmo_fastai.errors import InputError
from mixmo_fastai.rng import make_generator
from mixmo_fastai.runtime.processes import Processes, process_group
from mixmo_fastai.runtime.signals import leave_signals_to_parent, signals_blocked

Reader = Callable[[Tensor, "Cuts"], Iterator[tuple[Tensor, Tensor]]]
_WINDOW_BYTES = 32 * 2**20  # maximum size of the uint8 windows that are cropped at once


class BatchLoader(TfmdDL):
    """A fastai loader that crops, flips and normalises whole batches.

    Args:
        images: the images to load.
        classes: class names, in the order of the labels.
        mean, std: per channel, of pixels in [0, 1].
        bs: images per batch, before any repetition.
        shuffle: whether to shuffle every epoch; the last batch is then dropped if incomplete.
        augmentation: augmentation of the images; None for evaluation.
        seed: seed of order and augmentation.
        device: device of the batches.
        num_workers: number of worker processes of the streaming loader.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        classes: tuple[str, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        bs: int = 64,
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> None:
        self.images, self.classes, self.seed, self.epoch = images, classes, seed, 0
        self.augmentation = augmentation or Augmentation()
        self.augments = augmentation is not None
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.normalizer = Normalizer(self.mean, self.std, images.image_shape[2]).to(device)
        self.workers = num_workers
        # Item and batch transforms for fastai's show_batch, predict and test loaders; they give the
        # same values as the batches of this loader.
        super().__init__(
            as_items(images, classes),
            bs=bs,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=0,
            device=torch.device(device),
            after_item=[ToTensor()],
            after_batch=[IntToFloatTensor(), Normalize.from_stats(mean, std, cuda=False)],
        )
        self.is_multi_label = images.labels.ndim == 2
        self.target_type = TensorMultiCategory if self.is_multi_label else TensorCategory
        self._n_inp, self._types = 1, {tuple: [TensorImage, self.target_type]}

    def to(self, device: torch.device | str) -> None:
        """Move the loader to a device."""
        super().to(device)
        self.normalizer.to(self.device)

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Detach a batch for fastai's metrics; scalars stay on their device.

        Called by fastai. Copying a scalar to the host for every batch would stall a GPU.
        """
        return to_detach(b, cpu=cpu and getattr(b, "ndim", 1) > 0, gather=gather)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, counted from the start of training."""
        self.epoch = epoch

    def new(self, dataset: Any = None, cls: Any = None, **kwargs: Any) -> TfmdDL:
        """Return a plain fastai loader for this data or other items; used for inference."""
        return super().new(dataset, TfmdDL if cls is None else cls, **kwargs)

    def expanded(self, copies: int, arrange: Arrangement | None = None) -> "ExpandedLoader":
        """Return a view with `copies` independently augmented copies of every image per batch."""
        return ExpandedLoader(self, copies, arrange)

    def shard(self, processes: Processes) -> "LoaderShard":
        """Return a view of the images that this process evaluates."""
        return LoaderShard(self, processes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches()

    def batches(
        self,
        copies: int = 1,
        arrange: Arrangement | None = None,
        first_step: int = 0,
        images: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the images once. A complete pass increments the epoch.

        Slot s in [0, copies · n) is copy s // n of image s mod n, with its own crop and flip. A
        `BatchTransform` also treats each copy separately, an `ImageTransform` all copies alike.

        Args:
            copies: number of copies of each image in a batch.
            arrange: returns the slot at each position of the next batches; see `Arrangement`. None
                for slot s at position s. Arranging here avoids copying pixels again later.
            first_step: skip the batches before this step; the others equal those of a complete
                pass.
            images: the part of the epoch's order to load; all of it by default.

        Yields:
            images (any, C, H, W) float, channels last in memory, and their labels (any,) int64, or
            (any, K) float for several labels per image.
        """
        epoch = self.epoch
        order = self._on_device(self.order(epoch)[images])
        num_kept = len(order) - (len(order) % self.bs if self.drop_last else 0)
        # If nothing is dropped, the last batch may be shorter: process batches one by one.
        steps = STEPS_AT_ONCE if self.drop_last else 1
        rows = order[:num_kept].split(steps * self.bs) if num_kept else ()
        groups = [row.view(-1, min(self.bs, len(row))) for row in rows]  # (steps, n) each
        # Number of groups to skip, and of batches to skip in the next group.
        first, num_skipped = divmod(first_step, steps)
        kept = [
            group[num_skipped if number == first else 0 :] for number, group in enumerate(groups)
        ]
        read = self.reader(kept[first:], copies)
        for number, group in enumerate(groups[first:], first):
            cuts = self._draw(group, copies, arrange, (epoch, steps * number))
            if number == first:
                cuts = cuts.since(num_skipped)
            first_in_group = steps * number + (num_skipped if number == first else 0)
            for step, (windows, labels) in enumerate(read(kept[number], cuts), first_in_group):
                x = self.normalizer(self._transformed(windows, epoch, step))
                targets = labels.float() if self.is_multi_label else labels
                yield x.as_subclass(TensorImage), targets.as_subclass(self.target_type)
        self.epoch = epoch + 1

    def order(self, epoch: int) -> Tensor:
        """Return the order of the images in an epoch: (N,) int64."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        generator = make_generator(self.seed, "order", epoch)
        return torch.randperm(len(self.images), generator=generator)

    def _on_device(self, order: Tensor) -> Tensor:
        """Move the order of an epoch to the device on which `reader` needs it."""
        return order

    def windows_per_image(self, copies: int) -> int:
        """Return how many of the `copies` of an image `reader` reads separately; 1 or all."""
        return 1

    def reader(self, groups: Sequence[Tensor], copies: int = 1) -> Reader:
        """Prepare a pass over groups of batches, each (steps, n) image indices.

        Returns:
            a function to call with each group, in order, and its cuts. It yields for every batch
            the windows (P, C, H, W) uint8 on the device, and their labels (P,).
        """
        raise NotImplementedError

    def _draw(
        self,
        group: Tensor,
        copies: int,
        arrange: Arrangement | None,
        start: tuple[int, int],
    ) -> "Cuts":
        """Draw the cuts for a group of batches (steps, n) that starts at (epoch, first step)."""
        (steps, count), device, augmentation = group.shape, self.device, self.augmentation
        slots = torch.arange(copies * count, device=device).expand(steps, -1)
        if arrange is not None:
            slots = arrange(start[1], count)[:steps]
        if not self.augments:
            return Cuts(slots % count)
        images = slots % (count * self.windows_per_image(copies))
        # All processes draw the same numbers for the whole batch; each uses its own slots.
        generator = make_generator(self.seed, "augment", *start, device=device)
        drawn = {"generator": generator, "device": device}
        # Draw for a complete group even if the epoch ends within it, so that the draws depend
        # on its start only.
        shape = (STEPS_AT_ONCE, copies * count)
        corners = draw_crops(math.prod(shape), augmentation.crop_padding, **drawn).view(*shape, 2)
        corners = corners[:steps].gather(1, slots[..., None].expand(-1, -1, 2))
        if not augmentation.flip:
            return Cuts(images, corners)
        if augmentation.alternating_flip:
            flips = draw_alternating_flips(STEPS_AT_ONCE * count, copies, **drawn)
            flips = flips.view(copies, STEPS_AT_ONCE, count).transpose(0, 1).reshape(shape)
        else:
            flips = draw_flips(math.prod(shape), **drawn).view(shape)
        return Cuts(images, corners, flips[:steps].gather(1, slots))

    def _transformed(self, windows: Tensor, epoch: int, step: int) -> Tensor:
        """Apply the batch transform of the augmentation, if any, to windows (P, C, H, W) uint8."""
        transform = self.augmentation.transform if self.augments else None
        if not isinstance(transform, BatchTransform):
            return windows
        position, rank, device = (epoch, step), process_group().rank, windows.device
        generator = make_generator(self.seed, "transform", *position, rank, device=device)
        return transform(windows, generator)

    def _store(self, pixels: Tensor) -> StoredImages:
        """Store images (any, C, H, W) uint8 on the device in the layout needed for cropping."""
        augmentation = self.augmentation
        return StoredImages(
            pixels.to(self.device), augmentation.crop_padding, mirrored=augmentation.flip
        )


class ResidentLoader(BatchLoader):
    """Keeps the decoded data set on the device and gathers batches there with few kernels."""

    def __init__(self, images: ImageSet, **kwargs: Any) -> None:
        super().__init__(images, **kwargs)
        self.stored = self._store(images.tensor())
        self.labels = images.labels.to(self.device)

    def to(self, device: torch.device | str) -> None:
        """Move the data set."""
        super().to(device)
        self.stored, self.labels = self.stored.to(self.device), self.labels.to(self.device)

    def _on_device(self, order: Tensor) -> Tensor:
        return order.to(self.device)  # one copy per epoch, so that no step waits for one

    def reader(self, groups: Sequence[Tensor], copies: int = 1) -> Reader:
        """Crop the windows of several batches at once from the resident data set."""
        return self._cut

    def _cut(self, group: Tensor, cuts: Cuts) -> Iterator[tuple[Tensor, Tensor]]:
        image_indices = group.gather(1, cuts.images)
        labels = self.labels[image_indices]
        steps, positions = image_indices.shape
        batch_bytes = positions * math.prod(self.stored.image_shape)
        at_once = max(1, _WINDOW_BYTES // batch_bytes)
        for start in range(0, steps, at_once):
            stop = start + at_once
            indices = image_indices[start:stop].flatten()
            windows = self.stored.windows(indices, **cuts.part(start, stop))
            yield from zip(windows.split(positions), labels[start:stop], strict=True)


class StreamingLoader(BatchLoader):
    """Reads images in worker processes when needed, for data that does not fit on the device."""

    def windows_per_image(self, copies: int) -> int:
        """Return `copies` for boxes of image files, which differ between copies; otherwise 1."""
        is_cropped = self.augments and isinstance(self.augmentation.transform, OriginalCrop)
        return copies if is_cropped else 1

    def reader(self, groups: Sequence[Tensor], copies: int = 1) -> Reader:
        """Start reading batch by batch, in worker processes if there are any."""
        pinned = self.device.type == "cuda"
        transform = self.augmentation.transform if self.augments else None
        read = pixel_reader(self.images, transform, copies, self.seed, self.epoch)
        chunks = [chunk for group in groups for chunk in group]
        loader = DataLoader(
            _ChunkReader(read, self.images.labels, chunks),
            num_workers=self.workers,
            pin_memory=pinned,
            wif=leave_signals_to_parent,  # a signal that kills a worker would abort the step
        )
        # torch draws the seeds of the workers from this generator, not from the global one.
        loader.fake_l.generator = torch.Generator()
        batches = self._started(loader)

        def cut(group: Tensor, cuts: Cuts) -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch in enumerate(islice(batches, len(group))):
                if isinstance(batch, InputError):
                    raise batch
                pixels, labels = (part.to(self.device, non_blocking=pinned) for part in batch)
                indices = cuts.images[step]
                stored = self._store(pixels)
                yield stored.windows(indices, **cuts.part(step, step + 1)), labels[indices]

        return cut

    def _started(self, loader: DataLoader) -> Iterator[Any]:
        """Start the workers with signals blocked, since only this process may handle signals."""
        batches = iter(loader)
        if not self.workers:
            return batches
        with signals_blocked():
            first = next(batches, None)
        return iter(()) if first is None else chain([first], batches)


class ExpandedLoader:
    """A view of a `BatchLoader` with several copies of every image per batch."""

    def __init__(
        self,
        loader: BatchLoader,
        copies: int,
        arrange: Arrangement | None = None,
        first_step: int = 0,
    ) -> None:
        self.loader, self.copies, self.arrange = loader, copies, arrange
        self.first_step = first_step

    def __getattr__(self, name: str) -> Any:
        """Delegate to the loader, for callbacks that read its attributes."""
        if name.startswith("__") or "loader" not in vars(self):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def starting_at(self, step: int) -> "ExpandedLoader":
        """Return a view that skips the batches before a step; its length does not change."""
        return ExpandedLoader(self.loader, self.copies, self.arrange, step)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(self.copies, self.arrange, self.first_step)


class LoaderShard:
    """The images of a `BatchLoader` that belong to one process: rank, rank + count, and so on."""

    def __init__(self, loader: BatchLoader, processes: Processes) -> None:
        self.loader, self.processes = loader, processes

    def __len__(self) -> int:
        rank, count = self.processes
        return math.ceil(len(range(rank, len(self.loader.images), count)) / self.loader.bs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(images=slice(self.processes.rank, None, self.processes.count))

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Detach without gathering over processes; the evaluation code gathers the results."""
        return self.loader.to_detach(b, cpu=cpu, gather=False)


class _ChunkReader:
    """A data set whose item i is the complete i-th batch, so that a worker sends one tensor."""

    def __init__(self, read: PixelReader, labels: Tensor, chunks: Sequence[Tensor]) -> None:
        self.read, self.labels, self.chunks = read, labels, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | InputError:
        chunk = self.chunks[index]
        try:
            pixels = self.read(chunk.tolist())
        except InputError as error:
            return error  # an error raised in a worker would arrive as the text of a traceback
        labels, copies = self.labels[chunk], len(pixels) // len(chunk)
        return pixels, labels.repeat(copies, *(1 for _ in labels.shape[1:]))
