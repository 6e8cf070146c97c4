"""Mixed-sample data augmentation (MSDA) of pixels, for each member separately.

Each member's image is mixed with another image of the same member, by CutMix or mixup. The label of
the pasted image is weighted by the fraction of its pixels that the MixMo mask shows.

Shapes: B batch, M members, C image channels, H W image size, D feature channels, h w feature size.
Source: Ramé, Sun, Cord, "MixMo", ICCV 2021, section 4.2; Yun et al., "CutMix", ICCV 2019; Zhang et
al., "mixup", ICLR 2018.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmo_fastai.config.choices import MSDA_KINDS
from mixmo_fastai.errors import InputError, check_fraction, unknown_name_error
from mixmo_fastai.mixing.ratios import draw_lam
from mixmo_fastai.mixing.regions import box


class MsdaDraw(NamedTuple):
    """Random draws of MSDA for one batch.

    Attributes:
        masks: (B, M, 1, H, W) in [0, 1], weight of the member's own image at each pixel.
        partners: (B, M) int64, position in the batch of the pasted image.
    """

    masks: Tensor
    partners: Tensor


def draw_msda(
    kind: str,
    num_samples: int,
    num_members: int,
    size: tuple[int, int],
    *,
    alpha: float = 1.0,
    prob: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> MsdaDraw:
    """Draw the masks and partners of MSDA.

    Args:
        kind: "cutmix" or "mixup".
        num_samples: B.
        num_members: M.
        size: (H, W).
        alpha: the ratio of the member's own image is Beta(alpha, alpha), per sample and member.
        prob: probability of mixing, per sample and member.
        generator: generator on `device`.
        device: device of the results.

    Raises:
        InputError: unknown kind, or a value out of range.
    """
    check_msda(kind, alpha, prob)
    num_inputs = num_samples * num_members
    # A two-dimensional Dirichlet draw is a Beta draw.
    pasted_ratio = draw_lam(num_inputs, 2, alpha, generator=generator, device=device)[:, 1]
    is_mixed = torch.rand(num_inputs, generator=generator, device=device) < prob
    pasted_ratio = torch.where(is_mixed, pasted_ratio, 0.0)
    if kind == "cutmix":
        region = box(pasted_ratio, (1, *size), generator)  # (B·M, 1, H, W)
    else:
        region = pasted_ratio[:, None, None, None].expand(-1, 1, *size)
    keys = torch.rand((num_samples, num_members), generator=generator, device=device)
    masks = (1 - region).reshape(num_samples, num_members, 1, *size)
    return MsdaDraw(masks, keys.argsort(dim=0))


def own_label_weights(msda_masks: Tensor, masks: Tensor) -> Tensor:
    """Compute the weight of each member's own label: mean(msda_mask · mask_i) / mean(mask_i).

    Args:
        msda_masks: (B, M, 1, H, W); reduced to h x w by average pooling.
        masks: MixMo masks (B, M, 1 or D, h, w).

    Returns:
        own_weights (B, M) in [0, 1]; 1 if the mask of the member is zero.
    """
    height, width = masks.shape[-2:]
    pooled = F.adaptive_avg_pool2d(msda_masks.flatten(0, 1), (height, width))
    pooled = pooled.reshape(*masks.shape[:2], 1, height, width)
    mask_means = masks.mean(dim=(2, 3, 4))
    own_weights = (pooled * masks).mean(dim=(2, 3, 4)) / mask_means
    return torch.where(mask_means > 0, own_weights, 1.0).clamp(0, 1)


def make_own_image_dominant(draw: MsdaDraw, own_weights: Tensor) -> tuple[MsdaDraw, Tensor]:
    """Swap the two images of a member if its own image has the smaller weight.

    The published implementation does the same if there are several members.

    Args:
        draw: from `draw_msda`.
        own_weights: (B, M) from `own_label_weights`.

    Returns:
        the draw, with masks inverted if the weight is below 0.5, and the new weights.
    """
    swap = own_weights < 0.5
    masks = torch.where(swap[:, :, None, None, None], 1 - draw.masks, draw.masks)
    return MsdaDraw(masks, draw.partners), torch.where(swap, 1 - own_weights, own_weights)


def mix_images(inputs: Tensor, draw: MsdaDraw) -> Tensor:
    """Mix each member's images: (B, M, C, H, W) -> (B, M, C, H, W)."""
    masks = draw.masks.to(inputs.dtype)
    return masks * inputs + (1 - masks) * gather_partners(inputs, draw.partners)


def gather_partners(values: Tensor, partners: Tensor) -> Tensor:
    """Gather the values at the partners' positions, for the same member.

    Args:
        values: (B, M, …), such as images or labels.
        partners: (B, M) int64.
    """
    members = torch.arange(partners.shape[1], device=partners.device)
    return values[partners, members]


def check_msda(kind: str, alpha: float, prob: float) -> None:
    """Check the settings of MSDA.

    Raises:
        InputError: unknown kind, or a value out of range.
    """
    if kind not in MSDA_KINDS:
        raise unknown_name_error("MSDA kind", kind, MSDA_KINDS)
    if not 0 < alpha < float("inf"):
        raise InputError(f"msda_alpha must be positive and finite; got {alpha}.")
    check_fraction("msda_prob", prob)
