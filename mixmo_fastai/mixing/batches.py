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

    Example:
        >>> masks, means = draw_masks("linear", torch.tensor([[0.25, 0.75]]), (16, 4, 4))
        >>> mixing = Mixing(masks, loss_weights(means, root=1))
        >>> mixing.masks.shape, mixing.weights
        (torch.Size([1, 2, 1, 4, 4]), tensor([[0.5000, 1.5000]]))
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

    Example:
        >>> mixing = Mixing(masks=torch.full((8, 2, 1, 4, 4), 0.5), weights=torch.ones(8, 2))
        >>> drawn = DrawnMixings(uniforms=[0.2, 0.9], blended=[mixing] * 2, regional=[mixing, None])
        >>> drawn.select(1, mix_prob=0.5).masks.shape
        torch.Size([8, 2, 1, 4, 4])
    """

    uniforms: Sequence[float]
    blended: Sequence[Mixing]
    regional: Sequence[Mixing | None]

    def select(self, batch: int, mix_prob: float) -> Mixing:
        """Select the mixing of one batch; `mix_prob` must not exceed that of the draw.

        Example:
            >>> masks, weights = torch.full((8, 2, 1, 4, 4), 0.5), torch.ones(8, 2)
            >>> blended, regional = Mixing(masks, weights), Mixing(masks, weights)
            >>> drawn = DrawnMixings(uniforms=[0.4], blended=[blended], regional=[regional])
            >>> drawn.select(0, mix_prob=0.5) is regional, drawn.select(0, mix_prob=0.3) is blended
            (True, True)
        """
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

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> settings = {"mix_prob": 0.5, "alpha": 2.0, "weight_root": 3.0, "options": {}}
        >>> settings |= {"lam_generator": generator, "mask_generator": generator}
        >>> drawn = draw_mixings("cutmix", [0.2, 0.9], (8, 2), (16, 4, 4), **settings)
        >>> drawn.blended[0].masks.shape, drawn.blended[0].weights.shape
        (torch.Size([8, 2, 1, 4, 4]), torch.Size([8, 2]))
        >>> [mixing is not None for mixing in drawn.regional]
        [True, False]
    """
    batch_size, num_members = lam_shape
    lam = draw_lam(
        len(uniforms) * batch_size, num_members, alpha, generator=lam_generator, device=device
    )
    blend_kind = kind if isinstance(kind, str) and kind in BLEND_KINDS else "linear"
    # Also batches with regions are blended here: `select` may still choose it for a lower mix_prob.
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
