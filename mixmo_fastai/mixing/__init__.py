"""Mixing of the members' features: ratios, masks and the mixing operation.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, sections 3.2 and 3.3.

Functions named `draw_…` take a generator for all their random numbers; the others are
deterministic.

    ratios.py   mixing ratios lam and loss weights
    masks.py    masks of every kind, for any number of members
    batches.py  ratios, masks and loss weights of several batches at once
    regions.py  regions of the member in role 0: boxes, stripes, blocks, cow spots, channels, noise
    features.py the mixing operation
    pairing.py  which member sees which image
    msda.py     CutMix and Mixup of pixels, inside each member
    loss.py     MixMoLoss; base_losses.py, per_sample.py: any loss, per sample
"""

from mixmo_fastai.config.choices import MASK_KINDS
from mixmo_fastai.mixing.batches import CHEAP_KINDS, DrawnMixings, Mixing, draw_mixings
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

__all__ = [
    "BINARY_KINDS",
    "BLEND_KINDS",
    "CHEAP_KINDS",
    "MASK_KINDS",
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
