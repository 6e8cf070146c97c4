"""Loaders that augment whole batches where they lie: resident and streaming.

Shapes: N images of the set, n distinct images of a batch, C channels, H W image size, p crop
padding.

Both are fastai loaders and differ only in where a batch's pixels come from. Order and augmentation
are functions of (seed, epoch, step), so neither workers nor what ran before change them; they are
drawn, and pixels are cut, for some steps at a time.
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
    """What happens to a training image.

    Attributes:
        crop_padding: p; 0 for no crop.
        flip: whether half of the images are mirrored.
        alternating_flip: whether every second copy of an image within a batch is mirrored, in place
            of each by chance.
        augmix: whether each image goes through AugMix before; only the streaming loader does it.
    """

    crop_padding: int = 0
    flip: bool = False
    alternating_flip: bool = False
    augmix: bool = False


Arrangement = Callable[[int, int], Tensor]
"""From the first of `STEPS_AT_ONCE` steps and n to their slots, (steps, any) int64."""
STEPS_AT_ONCE = 16
"""Batches whose draws are made together, so that a step costs few kernels."""
Reader = Callable[[Tensor, "Cuts"], Iterator[tuple[Tensor, Tensor]]]
_WINDOW_BYTES = 32 * 2**20  # of uint8 windows that are cut at a time


class BatchLoader(TfmdDL):
    """A fastai loader that crops, flips and normalises whole batches.

    Args:
        images: the part of the data set to load.
        classes: names of all classes, by label.
        mean, std: per channel, of pixels in [0, 1].
        bs: images per batch, before any repetition.
        shuffle: whether each epoch has an order of its own; incomplete batches are then dropped.
        augmentation: None for evaluation.
        seed: of order and augmentation.
        device: where batches are made.
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
        # What fastai does item by item in show_batch, predict and test loaders; the same figures.
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
        """Move what batches are made of."""
        super().to(device)
        self.normalizer.to(self.device)

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Detach what fastai's metrics add up; a single number stays where it is.

        fastai asks its loader for this. Fetched per batch, each would make a GPU wait.
        """
        return to_detach(b, cpu=cpu and getattr(b, "ndim", 1) > 0, gather=gather)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is, counted from the start of training."""
        self.epoch = epoch

    def new(self, dataset: Any = None, cls: Any = None, **kwargs: Any) -> TfmdDL:
        """Make fastai's plain loader of this data or of other items, as its inference asks for."""
        return super().new(dataset, TfmdDL if cls is None else cls, **kwargs)

    def expanded(self, copies: int, arrange: Arrangement | None = None) -> "ExpandedLoader":
        """View this loader with every image `copies` times per batch, each augmented afresh."""
        return ExpandedLoader(self, copies, arrange)

    def shard(self, processes: Processes) -> "LoaderShard":
        """View the images of this loader that are one process's to evaluate."""
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
        """Go once through the images. A complete pass moves on to the next epoch.

        Slot s in [0, copies · n) is copy s // n of image s mod n, with an augmentation of its own.

        Args:
            copies: of each image in a batch.
            arrange: says which slot each position of a batch shows; slot s at position s where not
                given. To say it here moves no pixel twice.
            first_step: batches before it are left out; those from it on are as in a whole pass.
            images: which places of the epoch's order are loaded; all where not given.

        Yields:
            images (any, C, H, W) float, channels last in memory, and their labels (any,) int64.
        """
        epoch = self.epoch
        order = self._placed(self.order(epoch)[images])
        num_kept = len(order) - (len(order) % self.bs if self.drop_last else 0)
        # Where nothing is dropped the last batch may be shorter than the others: one by one.
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
        """Give the order of an epoch: (N,) int64."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        generator = make_generator(self.seed, "order", epoch)
        return torch.randperm(len(self.images), generator=generator)

    def _placed(self, order: Tensor) -> Tensor:
        """Bring an epoch's order to where `raw_batches` wants it."""
        return order

    def reader(self, groups: Sequence[Tensor]) -> Reader:
        """Prepare a pass over groups of batches, (steps, n) indices of images each.

        Returns:
            a function to be called with each group in turn, and its cuts, that gives for every
            batch the windows (P, C, H, W) uint8 on the device, and their labels (P,).
        """
        raise NotImplementedError

    def _draw(
        self,
        group: Tensor,
        copies: int,
        arrange: Arrangement | None,
        place: tuple[int, int],
    ) -> "Cuts":
        """Draw what the batches of a group (steps, n) show, at a place (epoch, first step)."""
        (steps, count), device, own = group.shape, self.device, self.augmentation
        slots = torch.arange(copies * count, device=device).expand(steps, -1)
        if arrange is not None:
            slots = arrange(place[1], count)[:steps]
        if not self.augments:
            return Cuts(slots % count)
        # The same in all processes that train together: each takes its slots of the whole batch.
        generator = make_generator(self.seed, "augment", *place, device=device)
        drawn = {"generator": generator, "device": device}
        # For a whole group even where the epoch ends within, so that a place says it all.
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
        """Lay images (any, C, H, W) uint8 on the device out for this loader's windows."""
        own = self.augmentation
        return StoredImages(pixels.to(self.device), own.crop_padding, mirrored=own.flip)


class Cuts(NamedTuple):
    """What the P positions of several batches show.

    Attributes:
        images: (steps, P) int64, which of a batch's n images.
        corners: (steps, P, 2) of the windows, as `StoredImages.windows` takes them.
        flips: (steps, P) bool.
    """

    images: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None

    def since(self, step: int) -> "Cuts":
        """Leave out the steps before one."""
        return Cuts(*(None if each is None else each[step:] for each in self))

    def part(self, start: int, stop: int) -> dict[str, Tensor | None]:
        """Give corners and flips of some steps, without the axis of steps."""
        parts = {"corners": self.corners, "flips": self.flips}
        return {k: None if v is None else v[start:stop].flatten(0, 1) for k, v in parts.items()}


class ResidentLoader(BatchLoader):
    """The decoded data set lies on the device; batches are gathered there in a few kernels."""

    def __init__(self, images: ImageSet, **kwargs: Any) -> None:
        super().__init__(images, **kwargs)
        self.stored = self._store(images.tensor())
        self.labels = images.labels.to(self.device)

    def to(self, device: torch.device | str) -> None:
        """Move the data set."""
        super().to(device)
        self.stored, self.labels = self.stored.to(self.device), self.labels.to(self.device)

    def _placed(self, order: Tensor) -> Tensor:
        return order.to(self.device)  # once per epoch, so that no step waits for a copy

    def reader(self, groups: Sequence[Tensor]) -> Reader:
        """Cut the windows of several batches at once out of the resident data set."""
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
    """Images are read by workers as they are needed; for data that does not fit on the device."""

    def reader(self, groups: Sequence[Tensor]) -> Reader:
        """Start to read batch by batch, in worker processes where there are some."""
        pinned = self.device.type == "cuda"
        augmix = SeededAugMix(self.seed, self.epoch) if self.augmentation.augmix else None
        chunks = [chunk for group in groups for chunk in group]
        loader = DataLoader(
            _ChunkReader(self.images, chunks, augmix),
            num_workers=self.workers,
            pin_memory=pinned,
            wif=leave_signals_to_parent,  # a worker that a signal ends would take the step with it
        )
        # Torch seeds its workers, which draw nothing here; not from the global generator.
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
        """Start the workers, out of reach of the signals that this process handles."""
        batches = iter(loader)
        if not self.workers:
            return batches
        with signals_blocked():
            first = next(batches, None)
        return iter(()) if first is None else chain([first], batches)


class ExpandedLoader:
    """A view of a `BatchLoader` with every image several times per batch."""

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
        """Pass for the loader with callbacks that look at it."""
        if name.startswith("__") or "loader" not in vars(self):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def starting_at(self, step: int) -> "ExpandedLoader":
        """Give the same view without the batches before a step; its length is that of the whole."""
        return ExpandedLoader(self.loader, self.copies, self.arrange, step)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(self.copies, self.arrange, self.first_step)


class LoaderShard:
    """One process's share of a `BatchLoader`'s images: every so many-th, from its own rank on."""

    def __init__(self, loader: BatchLoader, processes: Processes) -> None:
        self.loader, self.processes = loader, processes

    def __len__(self) -> int:
        rank, count = self.processes
        return math.ceil(len(range(rank, len(self.loader.images), count)) / self.loader.bs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(images=slice(self.processes.rank, None, self.processes.count))

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """Leave what metrics add up to this process; who evaluates brings it together."""
        return self.loader.to_detach(b, cpu=cpu, gather=False)


class _ChunkReader:
    """Item i is the whole i-th batch, so that a worker sends one tensor, not n."""

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
            return error  # raised in a worker, it would come back as a traceback in text
        return pixels, self.images.labels[chunk]

    def _image(self, index: int) -> Tensor:
        pixels = self.images[index]
        return pixels if self.augmix is None else self.augmix(pixels, index)


class SeededAugMix:
    """Torchvision's AugMix, whose draws are a function of (seed, epoch, image).

    Torchvision draws from torch's global generator, which is put back as it was.
    Source: Hendrycks et al., "AugMix", ICLR 2020.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        from torchvision.transforms import AugMix  # a second and a half that few runs need

        self.seed, self.epoch, self.transform = seed, epoch, AugMix()

    def __call__(self, pixels: Tensor, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            seed = derive_seed(self.seed, "augmix", self.epoch, index)
            torch.default_generator.manual_seed(seed)  # not that of any GPU
            return self.transform(pixels)
