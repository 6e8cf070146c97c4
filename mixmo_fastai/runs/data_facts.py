"""Facts about the training data, stored in data.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training data that prediction needs.

    Attributes:
        classes: class names, in the order of the logits.
        mean, std: per channel, of pixels in [0, 1].
        image_shape: (C, H, W).
        is_multi_label: whether an image may have several labels.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, ...]
    is_multi_label: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "DataFacts":
        """Build from the output of `dataclasses.asdict`, as read from JSON.

        Raises:
            ValueError: a value is missing, has the wrong type or is impossible.
        """
        try:
            parts = [values[name] for name in ("classes", "mean", "std", "image_shape")]
            if not all(isinstance(part, list | tuple) for part in parts):
                raise ValueError("classes, mean, std and image_shape must be lists")
            names, *numbers = parts
            mean, std = (tuple(float(v) for v in values) for values in numbers[:2])
            shape, is_multi_label = tuple(int(v) for v in numbers[2]), values.get("is_multi_label")
            facts = cls(tuple(map(str, names)), mean, std, shape, is_multi_label is True)
        except (LookupError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        facts._check()
        return facts

    def _check(self) -> None:
        """Raise ValueError if no data set can have these facts."""
        if len(self.classes) < 2:
            raise ValueError(f"classes must name at least 2; got {len(self.classes)}")
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W); got {self.image_shape}")
        if not len(self.mean) == len(self.std) == self.image_shape[0]:
            raise ValueError("mean and std must have one value per channel")
        if not all(map(math.isfinite, self.mean)) or not all(0 < v < math.inf for v in self.std):
            raise ValueError("mean must be finite and std positive")
