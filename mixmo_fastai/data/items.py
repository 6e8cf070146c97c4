"""The same images, item by item, as fastai's inference and display functions want them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.vision.core import PILImage, PILImageBW
from fasttransform import Transform
from PIL import Image
from torch import Tensor

from mixmo_fastai.data.decoding import decode_image, image_to_tensor
from mixmo_fastai.data.image_sets import ImageSet


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of a set. The set hangs on the items alone, so an exported Learner leaves it."""

    images: ImageSet
    index: int


class OpenImage(Transform):
    """A stored image, a file, an array or a PIL image becomes an image like those of training.

    Args:
        image_shape: (C, H, W) of training.
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
    """A stored image becomes the name of its class."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.classes = classes

    def encodes(self, item: StoredImage) -> str:
        return self.classes[int(item.images.labels[item.index])]


def as_items(images: ImageSet, classes: tuple[str, ...]) -> Datasets:
    """View an image set as fastai's `Datasets` of (image, category)."""
    categorize = Categorize(vocab=list(classes), sort=False)
    pipelines = [[OpenImage(images.image_shape)], [LabelOf(classes), categorize]]
    items = [StoredImage(images, index) for index in range(len(images))]
    # Setting up asks for a first item; the vocabulary is known without.
    datasets = Datasets(items, pipelines, do_setup=bool(items))
    # `Learner.predict` skips transforms by the type of its item; OpenImage takes all of them.
    datasets.tls[0].types = [object]
    return datasets
