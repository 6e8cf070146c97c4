"""Mixing of several batches at once: their ratios, masks and loss weights in few kernels.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmo_fastai.mixing.masks import BLEND_KINDS, draw_masks
from mixmo_fastai.mixing.ratios import draw_lam, loss_weights
from mixmo_fastai.mixing.regions import Region, Shape

QUICK_KINDS = (*BLEND_KINDS, "cutmix", "horizontal", "vertical")
"""Kinds whose masks cost little more than the calls that draw them."""


class Mixing(NamedTuple):
    """How one batch is mixed.

    Attributes:
        masks: (B, M, 1 or D, h, w), summing to one over the members.
        weights: (B, M) of the losses.
    """

    masks: Tensor
    weights: Tensor


@dataclass(frozen=True)
class DrawnMixings:
    """What several batches may be mixed with: by regions where chance has it, linearly otherwise.

    Attributes:
        chances: a uniform number per batch.
        blended: each batch, mixed alike at all places.
        regional: each batch, mixed by regions; None where chance rules it out.
    """

    chances: Sequence[float]
    blended: Sequence[Mixing]
    regional: Sequence[Mixing | None]

    def of(self, batch: int, mix_prob: float) -> Mixing:
        """Choose for one batch: regions with this probability, at most that of the draw."""
        regional = self.regional[batch]
        if regional is None or self.chances[batch] >= mix_prob:
            return self.blended[batch]
        return regional


def draw_mixings(
    kind: str | Region,
    chances: Sequence[float],
    lam_shape: tuple[int, int],
    shape: Shape,
    *,
    mix_prob: float,
    alpha: float,
    weight_root: float,
    options: Mapping[str, Any],
    lam_generator: torch.Generator | None = None,
    mask_generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> DrawnMixings:
    """Draw the mixing of as many batches as there are chances.

    Args:
        kind: one of `MASK_KINDS`, or a function that draws regions.
        chances: uniform in [0, 1), one per batch; regions are drawn where it is below mix_prob.
        lam_shape: (B, M).
        shape: (D, h, w) of the features to be mixed.
        mix_prob: the largest that `DrawnMixings.of` will be asked with.
        alpha: see `draw_lam`.
        weight_root: see `loss_weights`.
        options: of the kind; see `draw_masks`.
        lam_generator: of the ratios, on `device`.
        mask_generator: of everything else, on `device`.
        device: where everything is drawn and returned.
    """
    size, members = lam_shape
    lam = draw_lam(len(chances) * size, members, alpha, generator=lam_generator, device=device)
    blend = kind if isinstance(kind, str) and kind in BLEND_KINDS else "linear"
    masks, means = draw_masks(blend, lam, shape)
    blended = _per_batch(masks, loss_weights(means, weight_root), size)
    regional: list[Mixing | None] = [None] * len(chances)
    chosen = [] if kind == blend else [i for i, c in enumerate(chances) if c < mix_prob]
    if chosen:
        parts = torch.split(lam, size)
        masks, means = draw_masks(
            kind,
            torch.cat([parts[i] for i in chosen]),
            shape,
            generator=mask_generator,
            num_batches=len(chosen),
            **options,
        )
        drawn = _per_batch(masks, loss_weights(means, weight_root), size)
        for i, mixing in zip(chosen, drawn, strict=True):
            regional[i] = mixing
    return DrawnMixings(chances, blended, regional)


def _per_batch(masks: Tensor, weights: Tensor, size: int) -> list[Mixing]:
    parts = (torch.split(part, size) for part in (masks, weights))
    return [Mixing(*each) for each in zip(*parts, strict=True)]
