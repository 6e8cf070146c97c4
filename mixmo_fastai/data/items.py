"""Image sets as fastai data sets of single items, for fastai's inference and display functions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, MultiCategorize, OneHotEncode
from fastai.vision.core import PILImage, PILImageBW
from fasttransform import Transform
from PIL import Image
from torch import Tensor

from mixmo_fastai.data.decoding import decode_image, image_to_tensor
from mixmo_fastai.data.image_sets import ImageSet


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Reference to an image of a set. Only items hold the set, so exported Learners omit it."""

    images: ImageSet
    index: int


class OpenImage(Transform):
    """Convert a stored image, file, array or PIL image to the format of the training images.

    Args:
        image_shape: (C, H, W) of the training images.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.channels, *size = image_shape
        self.size = tuple(size)
        self.kind = PILImageBW if self.channels == 1 else PILImage

    def encodes(self, item: Any) -> Any:
        pixels = self._pixels(item).permute(1, 2, 0).numpy()  # (H, W, C)
        return self.kind.create(pixels[:, :, 0] if self.channels == 1 else pixels)

    def _pixels(self, item: Any) -> Tensor:
        if isinstance(item, StoredImage):
            return item.images[item.index]
        if isinstance(item, str | Path):
            return decode_image(Path(item), self.size, channels=self.channels)
        if isinstance(item, Tensor):
            item = item.cpu().numpy()
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else item
        return image_to_tensor(image, self.size, channels=self.channels)


class LabelOf(Transform):
    """Convert a stored image to the name of its class, or to those of its labels."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.classes = classes

    def encodes(self, item: StoredImage) -> Any:
        label = item.images.labels[item.index]
        if label.ndim:
            return [self.classes[index] for index in label.nonzero()[:, 0].tolist()]
        return self.classes[int(label)]


def as_items(images: ImageSet, classes: tuple[str, ...]) -> Datasets:
    """Wrap an image set as fastai's `Datasets` of (image, category) or (image, multi-category)."""
    if images.labels.ndim == 2:
        encode: list[Any] = [MultiCategorize(vocab=list(classes)), OneHotEncode(c=len(classes))]
    else:
        encode = [Categorize(vocab=list(classes), sort=False)]
    pipelines = [[OpenImage(images.image_shape)], [LabelOf(classes), *encode]]
    items = [StoredImage(images, index) for index in range(len(images))]
    # Setup needs a first item; the vocabulary is already known.
    datasets = Datasets(items, pipelines, do_setup=bool(items))
    # `Learner.predict` skips transforms by item type; OpenImage accepts every type.
    datasets.tls[0].types = [object]
    return datasets
