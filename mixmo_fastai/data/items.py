"""The same images, item by item, as fastai's inference and display functions want them."""

from typing import Any

import numpy as np
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.vision.core import PILImage, PILImageBW
from fasttransform import Transform

from mixmo_fastai.data.sources import ImageSet


class OpenImage(Transform):
    """An index into an image set, or anything that fastai can open, becomes an image."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__()
        self.images = images
        self.kind = PILImageBW if images.image_shape[0] == 1 else PILImage

    def encodes(self, item: Any) -> Any:
        if not isinstance(item, int | np.integer):
            return self.kind.create(item)
        pixels = self.images[int(item)].permute(1, 2, 0).numpy()  # (H, W, C)
        return self.kind.create(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


class LabelOf(Transform):
    """An index into an image set becomes the name of its class."""

    def __init__(self, images: ImageSet, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.images, self.classes = images, classes

    def encodes(self, item: int) -> str:
        return self.classes[int(self.images.labels[item])]


def as_items(images: ImageSet, classes: tuple[str, ...]) -> Datasets:
    """View an image set as fastai's `Datasets` of (image, category)."""
    categorize = Categorize(vocab=list(classes), sort=False)
    pipelines = [[OpenImage(images)], [LabelOf(images, classes), categorize]]
    # Setting up asks for a first item; the vocabulary is known without.
    datasets = Datasets(list(range(len(images))), pipelines, do_setup=len(images) > 0)
    # `Learner.predict` skips transforms by the type of its item; OpenImage takes all of them.
    datasets.tls[0].types = [object]
    return datasets
