"""Draw ratios, masks and loss weights of several batches at once, with few kernel launches.

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

CHEAP_KINDS = (*BLEND_KINDS, "cutmix", "horizontal", "vertical")
"""Kinds whose masks take less time to compute than their kernels take to launch."""


class Mixing(NamedTuple):
    """Masks and loss weights of one batch.

    Attributes:
        masks: (B, M, 1 or D, h, w), summing to one over the members.
        weights: (B, M), the loss weights.
    """

    masks: Tensor
    weights: Tensor


@dataclass(frozen=True)
class DrawnMixings:
    """Mixings of several batches, each by regions or blended, depending on `mix_prob`.

    Attributes:
        uniforms: one uniform number per batch, compared with `mix_prob`.
        blended: mixing of each batch with the same ratio at all positions.
        regional: mixing of each batch by regions; None if its uniform number is not below the
            `mix_prob` of the draw.
    """

    uniforms: Sequence[float]
    blended: Sequence[Mixing]
    regional: Sequence[Mixing | None]

    def select(self, batch: int, mix_prob: float) -> Mixing:
        """Select the mixing of one batch; `mix_prob` must not exceed that of the draw."""
        regional = self.regional[batch]
        if regional is None or self.uniforms[batch] >= mix_prob:
            return self.blended[batch]
        return regional


def draw_mixings(
    kind: str | Region,
    uniforms: Sequence[float],
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
    """Draw the mixings of several batches.

    Args:
        kind: one of `MASK_KINDS`, or a function that draws regions.
        uniforms: one number in [0, 1) per batch; regions are drawn if it is below mix_prob.
        lam_shape: (B, M).
        shape: shape (D, h, w) of the features to be mixed.
        mix_prob: upper bound of the probabilities passed to `DrawnMixings.select`.
        alpha: see `draw_lam`.
        weight_root: see `loss_weights`.
        options: options of the kind; see `draw_masks`.
        lam_generator: generator of the ratios, on `device`.
        mask_generator: generator of masks and roles, on `device`.
        device: device of all results.
    """
    batch_size, num_members = lam_shape
    lam = draw_lam(
        len(uniforms) * batch_size, num_members, alpha, generator=lam_generator, device=device
    )
    blend_kind = kind if isinstance(kind, str) and kind in BLEND_KINDS else "linear"
    masks, means = draw_masks(blend_kind, lam, shape)
    blended = _split_batches(masks, loss_weights(means, weight_root), batch_size)
    regional: list[Mixing | None] = [None] * len(uniforms)
    selected = [] if kind == blend_kind else [i for i, u in enumerate(uniforms) if u < mix_prob]
    if selected:
        batches = torch.split(lam, batch_size)
        masks, means = draw_masks(
            kind,
            torch.cat([batches[i] for i in selected]),
            shape,
            generator=mask_generator,
            num_batches=len(selected),
            **options,
        )
        mixings = _split_batches(masks, loss_weights(means, weight_root), batch_size)
        for i, mixing in zip(selected, mixings, strict=True):
            regional[i] = mixing
    return DrawnMixings(uniforms, blended, regional)


def _split_batches(masks: Tensor, weights: Tensor, batch_size: int) -> list[Mixing]:
    batches = zip(torch.split(masks, batch_size), torch.split(weights, batch_size), strict=True)
    return [Mixing(*batch) for batch in batches]
