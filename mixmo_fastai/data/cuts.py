"""What each position of a batch shows: image, crop and flip."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mixmo_fastai.data.transforms import Transform
from mixmo_fastai.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images.

    Attributes:
        crop_padding: p, padding of the random crop; 0 for no crop.
        flip: whether images are mirrored with probability 1/2.
        alternating_flip: whether every second copy of an image in a batch is mirrored, instead of
            each copy at random.
        transform: further transform, from `transforms.build_transform`; an `ImageTransform` and an
            `OriginalCrop` need the streaming loader.
    """

    crop_padding: int = 0
    flip: bool = False
    alternating_flip: bool = False
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and not isinstance(self.transform, Transform):
            raise InputError(
                "transform must be a BatchTransform or an ImageTransform, from mixmo_fastai.data."
                f"transforms; got {self.transform!r}.\nCall the function that builds it: "
                "Augmentation(transform=rand_augment())."
            )


Arrangement = Callable[[int, int], Tensor]
"""Maps the first of `STEPS_AT_ONCE` steps and n to the slots of these steps, (steps, P) int64.

Slot s is copy s // n of image s mod n; entry [i, p] is the slot at position p of batch i. In
training with MixMo, the function is `EpochDraws.slots_from`, which draws the pairing.
"""


STEPS_AT_ONCE = 16
"""Number of batches whose random draws are made together, to launch fewer kernels per step."""


class Cuts(NamedTuple):
    """Images, crops and flips of the P positions of several batches.

    Attributes:
        images: (steps, P) int64, index among the n images of the batch.
        corners: (steps, P, 2), corners of the crop windows; see `StoredImages.windows`.
        flips: (steps, P) bool, whether the position is mirrored.
    """

    images: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None

    def since(self, step: int) -> "Cuts":
        """Drop the steps before `step`."""
        return Cuts(*(None if each is None else each[step:] for each in self))

    def part(self, start: int, stop: int) -> dict[str, Tensor | None]:
        """Return corners and flips of some steps, flattened over steps."""
        parts = {"corners": self.corners, "flips": self.flips}
        return {k: None if v is None else v[start:stop].flatten(0, 1) for k, v in parts.items()}
