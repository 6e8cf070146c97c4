"""Loaders that augment whole batches where they lie: resident and streaming.

Shapes: N images of the set, n images of a batch, C channels, H W image size, p crop padding.

Both are fastai loaders and differ only in where a batch's pixels come from. Order and augmentation
are functions of (seed, epoch, step), so neither workers nor what ran before change them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, rank_distrib
from torch import Tensor
from torchvision.transforms import AugMix

from mixmo_fastai.augment import crop, draw_crops, draw_flips, flip, normalize, pad
from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.data.items import as_items
from mixmo_fastai.errors import InputError
from mixmo_fastai.randomness import derive_seed, make_generator


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    Attributes:
        crop_padding: p; 0 for no crop.
        flip: whether half of the images are mirrored.
        augmix: whether each image goes through AugMix before; only the streaming loader does it.
    """

    crop_padding: int = 0
    flip: bool = False
    augmix: bool = False


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
        self.mean, self.std = (torch.tensor(v, device=device) for v in (mean, std))
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
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is, counted from the start of training."""
        self.epoch = epoch

    def new(self, dataset: Any = None, cls: Any = None, **kwargs: Any) -> TfmdDL:
        """Make fastai's plain loader of this data or of other items, as its inference asks for."""
        return super().new(dataset, TfmdDL if cls is None else cls, **kwargs)

    def expanded(self, copies: int) -> "ExpandedLoader":
        """View this loader with every image `copies` times per batch, each augmented afresh."""
        return ExpandedLoader(self, copies)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches()

    def batches(self, copies: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through the images: batches of (copies·n, C, H, W) float and (copies·n,) int64.

        Position s of a batch shows image s mod n. A complete pass moves on to the next epoch.
        """
        epoch = self.epoch
        order = self._placed(self.order(epoch))
        num_kept = len(order) - (len(order) % self.bs if self.drop_last else 0)
        chunks = order[:num_kept].split(self.bs) if num_kept else ()
        for step, batch in enumerate(self.raw_batches(chunks)):
            generator = make_generator(
                self.seed, "augment", epoch, step, rank_distrib(), device=self.device
            )
            yield self._finish(*batch, copies=copies, generator=generator)
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

    def raw_batches(self, chunks: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give each chunk of indices its pixels.

        Yields:
            padded images (any, C, H + 2p, W + 2p) uint8 on the device, the places in them of the
            chunk's images (n,), and their labels (n,).
        """
        raise NotImplementedError

    def _finish(
        self,
        padded: Tensor,
        places: Tensor,
        labels: Tensor,
        *,
        copies: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        places, labels = places.repeat(copies), labels.repeat(copies)
        pixels = self._augment(padded, places, generator) if self.augments else padded[places]
        x = normalize(pixels, self.mean, self.std)
        return x.as_subclass(TensorImage), labels.as_subclass(TensorCategory)

    def _augment(self, padded: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        count, device, padding = len(places), padded.device, self.augmentation.crop_padding
        corners = draw_crops(count, padding, generator=generator, device=device)
        windows = crop(padded, places, corners, padding)
        if not self.augmentation.flip:
            return windows
        return flip(windows, draw_flips(count, generator=generator, device=device))


class ResidentLoader(BatchLoader):
    """The decoded data set lies on the device; batches are gathered there in a few kernels."""

    def __init__(self, images: ImageSet, **kwargs: Any) -> None:
        super().__init__(images, **kwargs)
        self.padded = pad(images.tensor().to(self.device), self.augmentation.crop_padding)
        self.labels = images.labels.to(self.device)

    def to(self, device: torch.device | str) -> None:
        """Move the data set."""
        super().to(device)
        self.padded, self.labels = self.padded.to(self.device), self.labels.to(self.device)

    def _placed(self, order: Tensor) -> Tensor:
        return order.to(self.device)  # once per epoch, so that no step waits for a copy

    def raw_batches(self, chunks: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Point at the chunk's images in the resident data set."""
        for chunk in chunks:
            yield self.padded, chunk, self.labels[chunk]


class StreamingLoader(BatchLoader):
    """Images are read by workers as they are needed; for data that does not fit on the device."""

    def raw_batches(self, chunks: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read the chunk's images, in worker processes where there are some."""
        pinned = self.device.type == "cuda"
        augmix = SeededAugMix(self.seed, self.epoch) if self.augmentation.augmix else None
        reader = DataLoader(
            _ChunkReader(self.images, chunks, augmix), num_workers=self.workers, pin_memory=pinned
        )
        # Torch seeds its workers, which draw nothing here; not from the global generator.
        reader.fake_l.generator = torch.Generator()
        for batch in reader:
            if isinstance(batch, InputError):
                raise batch
            pixels, labels = batch
            padded = pad(
                pixels.to(self.device, non_blocking=pinned), self.augmentation.crop_padding
            )
            places = torch.arange(len(pixels), device=self.device)
            yield padded, places, labels.to(self.device, non_blocking=pinned)


class ExpandedLoader:
    """A view of a `BatchLoader` with every image several times per batch."""

    def __init__(self, loader: BatchLoader, copies: int) -> None:
        self.loader, self.copies = loader, copies

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.batches(self.copies)


class _ChunkReader:
    """Item i is the whole i-th batch, so that a worker sends one tensor, not n."""

    def __init__(
        self, images: ImageSet, chunks: tuple[Tensor, ...], augmix: "SeededAugMix | None"
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
        self.seed, self.epoch, self.transform = seed, epoch, AugMix()

    def __call__(self, pixels: Tensor, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "augmix", self.epoch, index))
            return self.transform(pixels)
