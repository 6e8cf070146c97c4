"""Parts of the training set: the validation split and the balanced trial.

Both are the same for every run, whatever its seed, so that runs are compared on the same images
and members of a deep ensemble share a validation split.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixmo_fastai.data.sources import ImageSet
from mixmo_fastai.errors import InputError
from mixmo_fastai.randomness import make_generator
from mixmo_fastai.recipe import default_valid_split

SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of an image set; an image set itself.

    Attributes:
        images: all of them.
        indices: which are in, (n,) int64.
    """

    images: ImageSet
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        """Class indices, (n,) int64."""
        return self.images.labels[self.indices]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.images.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[int(self.indices[index])]

    def tensor(self, indices: Tensor | None = None) -> Tensor:
        """Give all images of the subset, or those chosen: (n, C, H, W) uint8."""
        return self.images.tensor(self.indices if indices is None else self.indices[indices])

    def name(self, index: int) -> str:
        """Name an image as the whole set does."""
        return self.images.name(int(self.indices[index]))


def split_validation(images: ImageSet, share: float | None) -> tuple[ImageSet, Subset]:
    """Set aside a share of every class for validation.

    Args:
        images: the training set.
        share: in [0, 1); 0 sets nothing aside, None takes `default_valid_split`. At least one image
            of a class stays for training.

    Returns:
        the images that train and those that validate.

    Raises:
        InputError: the share is out of range, or so small that it takes no image at all.
    """
    if share is None:
        share = default_valid_split(len(images))
    if not 0 <= share < 1:
        raise InputError(f"valid_split must be at least 0 and below 1; got {share}.")
    if share == 0:
        return images, Subset(images, torch.empty(0, dtype=torch.int64))
    ranks, sizes = _ranks_within_class(images.labels, "split")
    num_valid = torch.minimum((sizes * share).round().clamp(min=1), sizes - 1)
    valid = ranks < num_valid
    if not valid.any():
        raise InputError(f"valid_split={share} of {len(images)} images takes no image. Raise it.")
    return Subset(images, (~valid).nonzero()[:, 0]), Subset(images, valid.nonzero()[:, 0])


def limit_images(images: ImageSet, limit: int) -> ImageSet:
    """Keep at most `limit` images, as many of each class as of any other where there are enough.

    Args:
        images: the images that train.
        limit: 0 keeps all.
    """
    if limit == 0 or limit >= len(images):
        return images
    ranks, _ = _ranks_within_class(images.labels, "limit")
    chosen = ranks.argsort(stable=True)[:limit]  # first one image of each class, then the next
    return Subset(images, chosen.sort().values)


def _ranks_within_class(labels: Tensor, stream: str) -> tuple[Tensor, Tensor]:
    """Shuffle, and number the images of each class from 0; also give the size of each's class."""
    generator = make_generator(SPLIT_SEED, stream)  # type: ignore[arg-type]
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return ranks, counts[labels]
