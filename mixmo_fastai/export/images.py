"""Standardised images of a data set, on which exported networks are checked and calibrated.

Shapes: n images of C channels and H × W pixels.
"""

import torch
from torch import Tensor

from mixmo_fastai.data.augment import normalize
from mixmo_fastai.data.image_sets import ImageSet
from mixmo_fastai.runs.data_facts import DataFacts


def evenly_spaced(images: ImageSet, count: int) -> Tensor:
    """Return the indices of at most `count` evenly spaced images: (n,) int64."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()


def standardized(images: ImageSet, indices: Tensor, facts: DataFacts) -> Tensor:
    """Return images of a data set as networks expect them: (n, C, H, W) float."""
    return normalize(images.tensor(indices), torch.tensor(facts.mean), torch.tensor(facts.std))
