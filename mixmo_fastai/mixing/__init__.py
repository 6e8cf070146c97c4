"""Mixing: how much of each member a batch carries, where, and the mixing itself.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, sections 3.2 and 3.3.

Randomness is drawn by `draw_lam` and `draw_masks` from one generator, and used by `mix_features`
and `loss_weights`, which are deterministic.

    ratios.py   lam, and what the loss makes of it
    masks.py    any kind of mask for any number of members
    batches.py  both for several batches at once
    regions.py  where role 0 is seen: boxes, stripes, blocks, cow spots, channels, noise
    features.py the mixing of features
"""

from mixmo_fastai.mixing.batches import QUICK_KINDS, DrawnMixings, Mixing, draw_mixings
from mixmo_fastai.mixing.features import mix_features
from mixmo_fastai.mixing.masks import (
    BINARY_KINDS,
    BLEND_KINDS,
    check_kind,
    check_options,
    draw_masks,
)
from mixmo_fastai.mixing.ratios import draw_lam, loss_weights
from mixmo_fastai.mixing.regions import Region
from mixmo_fastai.names import MASK_KINDS

__all__ = [
    "BINARY_KINDS",
    "BLEND_KINDS",
    "MASK_KINDS",
    "QUICK_KINDS",
    "DrawnMixings",
    "Mixing",
    "Region",
    "check_kind",
    "check_options",
    "draw_lam",
    "draw_masks",
    "draw_mixings",
    "loss_weights",
    "mix_features",
]
