"""Loaders that augment whole batches on the device: resident and streaming.

Shapes: N images of the set, n distinct images of a batch, C channels, H W image size, p crop
padding.

Both are fastai loaders and differ only in the source of the pixels. Order and augmentation are
functions of (seed, epoch, step), so they depend neither on the number of workers nor on earlier
draws. They are drawn, and windows are cut, for several steps at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, to_detach
from torch import Tensor

from mixmo_fastai.augment import (
    Normalizer,
    StoredImages,
    draw_alternating_flips,
    draw_crops,
    draw_flips,
)
from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.data.items import as_items
from mixmo_fastai.errors import InputError
from mixmo_fastai.interruption import leave_signals_to_parent, signals_blocked
from mixmo_fastai.processes import Processes
from mixmo_fastai.randomness import derive_seed, make_generator


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images.

    Attributes:
        crop_padding: p; 0 for no crop.
        flip: whether images are mirrored with probability 0.5.
        alternating_flip: whether every second copy of an image in a batch is mirrored, instead of
            each copy at random.
        augmix: whether AugMix is applied first; supported by the streaming loader only.
    """

    crop_padding: int = 0
    flip: bool = False
    alternating_flip: bool = False
    augmix: bool = False


Arrangement = Callable[[int, int], Tensor]
"""Function of the first of `STEPS_AT_ONCE` steps and n that returns slots (steps, any) int64."""
STEPS_AT_ONCE = 16
"""Number of batches that are drawn together, so that each step launches few kernels."""
Reader = Callable[[Tensor, "Cuts"], Iterator[tuple[Tensor, Tensor]]]
_WINDOW_BYTES = 32 * 2**20  # maximum size of the uint8 windows that are cut at once


class BatchLoader(TfmdDL):
    """A fastai loader that crops, flips and normalises whole batches.

    Args:
        images: images to load.
        classes: names of all classes, indexed by label.
        mean, std: statistics per channel, of pixels in [0, 1].
        bs: images per batch, before repetition.
        shuffle: whether to shuffle in each epoch; incomplete batches are then dropped.
        augmentation: augmentation in training; None for evaluation.
        seed: seed of order and augmentation.
        device: device of the batches.
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
        # fastai uses these per-item transforms in show_batch, predict and test loaders; they give
        # the same values as the batch path.
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
        self._n_inp, self._types = 1, {tuple: [TensorImage, TensorCategory]}

    def to(self, device: torch.device | str) -> None:
        """Move the tensors used to build batches."""
        super().to(device)
        self.normalizer.to(self.device)

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Detach tensors that fastai's metrics accumulate; scalars stay on their device.

        fastai calls this method of the loader. Fetching a scalar per batch would synchronize a GPU.
        """
        return to_detach(b, cpu=cpu and getattr(b, "ndim", 1) > 0, gather=gather)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, counted from the start of training."""
        self.epoch = epoch

    def new(self, dataset: Any = None, cls: Any = None, **kwargs: Any) -> TfmdDL:
        """Create a plain fastai loader of this data or of other items, for inference."""
        return super().new(dataset, TfmdDL if cls is None else cls, **kwargs)

    def expanded(self, copies: int, arrange: Arrangement | None = None) -> "ExpandedLoader":
        """Return a view with each image `copies` times per batch, augmented separately."""
        return ExpandedLoader(self, copies, arrange)

    def shard(self, processes: Processes) -> "LoaderShard":
        """Return a view of the images that one process evaluates."""
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
        """Iterate once over the images. A complete pass advances to the next epoch.

        Slot s in [0, copies · n) is copy s // n of image s mod n, augmented separately.

        Args:
            copies: number of copies of each image in a batch.
            arrange: returns the slot at each position of a batch; by default slot s at position s.
                Arranging here avoids a second copy of the pixels.
            first_step: first batch to yield; it and the following ones equal those of a full pass.
            images: positions of the epoch's order to load; all by default.

        Yields:
            images (any, C, H, W) float, channels last in memory, and their labels (any,) int64.
        """
        epoch = self.epoch
        order = self._placed(self.order(epoch)[images])
        num_kept = len(order) - (len(order) % self.bs if self.drop_last else 0)
        # If incomplete batches are kept, the last one is shorter, so batches are drawn one by one.
        steps = STEPS_AT_ONCE if self.drop_last else 1
        rows = order[:num_kept].split(steps * self.bs) if num_kept else ()
        groups = [row.view(-1, min(self.bs, len(row))) for row in rows]  # (steps, n) each
        first, left_out = divmod(first_step, steps)  # whole groups, and batches of the next
        kept = [group[left_out if number == first else 0 :] for number, group in enumerate(groups)]
        read = self.reader(kept[first:])
        for number, group in enumerate(groups[first:], first):
            cuts = self._draw(group, copies, arrange, (epoch, steps * number))
            if number == first:
                cuts = cuts.since(left_out)
            for windows, labels in read(kept[number], cuts):
                x = self.normalizer(windows)
                yield x.as_subclass(TensorImage), labels.as_subclass(TensorCategory)
        self.epoch = epoch + 1

    def order(self, epoch: int) -> Tensor:
        """Return the order of the images in an epoch: (N,) int64."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        generator = make_generator(self.seed, "order", epoch)
        return torch.randperm(len(self.images), generator=generator)

    def _placed(self, order: Tensor) -> Tensor:
        """Move the order of an epoch to the device on which it is used."""
        return order

    def reader(self, groups: Sequence[Tensor]) -> Reader:
        """Prepare a pass over groups of batches, (steps, n) indices of images each.

        Returns:
            a function of a group and its cuts, called for the groups in order, that yields for each
            batch the windows (P, C, H, W) uint8 on the device and their labels (P,).
        """
        raise NotImplementedError

    def _draw(
        self,
        group: Tensor,
        copies: int,
        arrange: Arrangement | None,
        place: tuple[int, int],
    ) -> "Cuts":
        """Draw images, crops and flips of a group of batches (steps, n); place is (epoch, step)."""
        (steps, count), device, own = group.shape, self.device, self.augmentation
        slots = torch.arange(copies * count, device=device).expand(steps, -1)
        if arrange is not None:
            slots = arrange(place[1], count)[:steps]
        if not self.augments:
            return Cuts(slots % count)
        # All processes draw the same numbers, and each uses its slots of the whole batch.
        generator = make_generator(self.seed, "augment", *place, device=device)
        drawn = {"generator": generator, "device": device}
        # Always for a full group, also at the end of an epoch, so draws depend on the place only.
        shape = (STEPS_AT_ONCE, copies * count)
        corners = draw_crops(math.prod(shape), own.crop_padding, **drawn).view(*shape, 2)[:steps]
        corners = corners.gather(1, slots[..., None].expand(-1, -1, 2))
        if not own.flip:
            return Cuts(slots % count, corners)
        if own.alternating_flip:
            flips = draw_alternating_flips(STEPS_AT_ONCE * count, copies, **drawn)
            flips = flips.view(copies, STEPS_AT_ONCE, count).transpose(0, 1).reshape(shape)
        else:
            flips = draw_flips(math.prod(shape), **drawn).view(shape)
        return Cuts(slots % count, corners, flips[:steps].gather(1, slots))

    def _store(self, pixels: Tensor) -> StoredImages:
        """Store images (any, C, H, W) uint8 on the device in the layout for cutting windows."""
        own = self.augmentation
        return StoredImages(pixels.to(self.device), own.crop_padding, mirrored=own.flip)


class Cuts(NamedTuple):
    """Image, crop and flip at each of the P positions of several batches.

    Attributes:
        images: (steps, P) int64, indices into the n images of a batch.
        corners: (steps, P, 2), corners of the windows for `StoredImages.windows`.
        flips: (steps, P) bool.
    """

    images: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None

    def since(self, step: int) -> "Cuts":
        """Drop all steps before the given one."""
        return Cuts(*(None if each is None else each[step:] for each in self))

    def part(self, start: int, stop: int) -> dict[str, Tensor | None]:
        """Return corners and flips of some steps, with the step axis flattened."""
        parts = {"corners": self.corners, "flips": self.flips}
        return {k: None if v is None else v[start:stop].flatten(0, 1) for k, v in parts.items()}


class ResidentLoader(BatchLoader):
    """Keep the decoded data set on the device and gather batches there with few kernels."""

    def __init__(self, images: ImageSet, **kwargs: Any) -> None:
        super().__init__(images, **kwargs)
        self.stored = self._store(images.tensor())
        self.labels = images.labels.to(self.device)

    def to(self, device: torch.device | str) -> None:
        """Move the data set."""
        super().to(device)
        self.stored, self.labels = self.stored.to(self.device), self.labels.to(self.device)

    def _placed(self, order: Tensor) -> Tensor:
        return order.to(self.device)  # once per epoch, which avoids a copy per step

    def reader(self, groups: Sequence[Tensor]) -> Reader:
        """Cut the windows of several batches at once from the resident data set."""
        return self._cut

    def _cut(self, group: Tensor, cuts: Cuts) -> Iterator[tuple[Tensor, Tensor]]:
        places = group.gather(1, cuts.images)
        labels = self.labels[places]
        steps, positions = places.shape
        batch_bytes = positions * math.prod(self.stored.image_shape)
        at_once = max(1, _WINDOW_BYTES // batch_bytes)
        for start in range(0, steps, at_once):
            stop = start + at_once
            indices = places[start:stop].flatten()
            windows = self.stored.windows(indices, **cuts.part(start, stop))
            yield from zip(windows.split(positions), labels[start:stop], strict=True)


class StreamingLoader(BatchLoader):
    """Read images on demand in worker processes, for data that does not fit on the device."""

    def reader(self, groups: Sequence[Tensor]) -> Reader:
        """Start reading batch by batch, in worker processes if there are any."""
        pinned = self.device.type == "cuda"
        augmix = SeededAugMix(self.seed, self.epoch) if self.augmentation.augmix else None
        chunks = [chunk for group in groups for chunk in group]
        loader = DataLoader(
            _ChunkReader(self.images, chunks, augmix),
            num_workers=self.workers,
            pin_memory=pinned,
            wif=leave_signals_to_parent,  # a signal must not end a worker in the middle of a step
        )
        # torch draws the workers' seeds from this generator instead of the global one.
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
        """Start the workers while the signals that this process handles are blocked."""
        batches = iter(loader)
        if not self.workers:
            return batches
        with signals_blocked():
            first = next(batches, None)
        return iter(()) if first is None else chain([first], batches)


class ExpandedLoader:
    """View of a `BatchLoader` with each image several times per batch."""

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
        """Return the same view without the batches before a step, with the full length."""
        return ExpandedLoader(self.loader, self.copies, self.arrange, step)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(self.copies, self.arrange, self.first_step)


class LoaderShard:
    """Images of a `BatchLoader` for one process: every count-th one, starting at its rank."""

    def __init__(self, loader: BatchLoader, processes: Processes) -> None:
        self.loader, self.processes = loader, processes

    def __len__(self) -> int:
        rank, count = self.processes
        return math.ceil(len(range(rank, len(self.loader.images), count)) / self.loader.bs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(images=slice(self.processes.rank, None, self.processes.count))

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Detach without gathering; the caller reduces metrics over all processes."""
        return self.loader.to_detach(b, cpu=cpu, gather=False)


class _ChunkReader:
    """Data set whose item i is the whole i-th batch, so that a worker sends one tensor, not n."""

    def __init__(
        self, images: ImageSet, chunks: Sequence[Tensor], augmix: "SeededAugMix | None"
    ) -> None:
        self.images, self.chunks, self.augmix = images, chunks, augmix

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | InputError:
        chunk = self.chunks[index]
        try:
            pixels = torch.stack([self._image(i) for i in chunk.tolist()])
        except InputError as error:
            return error  # if raised in a worker, it would arrive as the text of a traceback
        return pixels, self.images.labels[chunk]

    def _image(self, index: int) -> Tensor:
        pixels = self.images[index]
        return pixels if self.augmix is None else self.augmix(pixels, index)


class SeededAugMix:
    """Torchvision's AugMix with draws that are a function of (seed, epoch, image).

    Torchvision draws from torch's global generator, whose state is restored afterwards.
    Source: Hendrycks et al., "AugMix", ICLR 2020.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        from torchvision.transforms import AugMix  # the import takes 1.5 s, and few runs use it

        self.seed, self.epoch, self.transform = seed, epoch, AugMix()

    def __call__(self, pixels: Tensor, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            seed = derive_seed(self.seed, "augmix", self.epoch, index)
            torch.default_generator.manual_seed(seed)  # of the CPU only
            return self.transform(pixels)
