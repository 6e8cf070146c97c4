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

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = draw_msda("mixup", 4, 2, (32, 32), generator=generator)
        >>> draw.masks.shape, draw.partners.shape
        (torch.Size([4, 2, 1, 32, 32]), torch.Size([4, 2]))
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

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = draw_msda("cutmix", 4, 2, size=(32, 32), generator=generator)
        >>> draw.masks.unique()
        tensor([0., 1.])
        >>> draw.partners.sort(dim=0).values.T.tolist()  # each image is pasted once per member
        [[0, 1, 2, 3], [0, 1, 2, 3]]
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

    Example:
        >>> masks, msda_masks = torch.full((1, 2, 1, 4, 4), 0.5), torch.ones(1, 2, 1, 8, 8)
        >>> msda_masks[:, 1, :, :2] = 0  # member 1: a quarter of the rows is pasted
        >>> own_label_weights(msda_masks, masks)
        tensor([[1.0000, 0.7500]])
    """
    height, width = masks.shape[-2:]
    pooled = F.adaptive_avg_pool2d(msda_masks.flatten(0, 1), (height, width))
    pooled = pooled.reshape(*masks.shape[:2], 1, height, width)
    mask_means = masks.mean(dim=(2, 3, 4))
    own_weights = (pooled * masks).mean(dim=(2, 3, 4)) / mask_means
    # Sums over an expanded mask, as of linear mixing, are rounded otherwise than over the product.
    return torch.where(mask_means > 0, own_weights.clamp(max=1), 1.0)


def make_own_image_dominant(draw: MsdaDraw, own_weights: Tensor) -> tuple[MsdaDraw, Tensor]:
    """Swap the two images of a member if its own image has the smaller weight.

    The published implementation does the same if there are several members.

    Args:
        draw: from `draw_msda`.
        own_weights: (B, M) from `own_label_weights`.

    Returns:
        the draw, with masks inverted if the weight is below 0.5, and the new weights.

    Example:
        >>> draw = MsdaDraw(torch.full((1, 2, 1, 4, 4), 0.25), torch.zeros(1, 2, dtype=torch.int64))
        >>> draw, own_weights = make_own_image_dominant(draw, torch.tensor([[0.25, 0.75]]))
        >>> draw.masks[0, :, 0, 0, 0], own_weights
        (tensor([0.7500, 0.2500]), tensor([[0.7500, 0.7500]]))
    """
    swap = own_weights < 0.5
    masks = torch.where(swap[:, :, None, None, None], 1 - draw.masks, draw.masks)
    return MsdaDraw(masks, draw.partners), torch.where(swap, 1 - own_weights, own_weights)


def mix_images(inputs: Tensor, draw: MsdaDraw) -> Tensor:
    """Mix each member's images: (B, M, C, H, W) -> (B, M, C, H, W).

    Example:
        >>> images = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, 3, 4, 4)  # black, white
        >>> draw = MsdaDraw(torch.full((2, 1, 1, 4, 4), 0.75), partners=torch.tensor([[1], [0]]))
        >>> mix_images(images, draw)[:, 0, 0, 0, 0]  # 3/4 · 0 + 1/4 · 1, 3/4 · 1 + 1/4 · 0
        tensor([0.2500, 0.7500])
    """
    masks = draw.masks.to(inputs.dtype)
    return masks * inputs + (1 - masks) * gather_partners(inputs, draw.partners)


def gather_partners(values: Tensor, partners: Tensor) -> Tensor:
    """Gather the values at the partners' positions, for the same member.

    Args:
        values: (B, M, …), such as images or labels.
        partners: (B, M) int64.

    Example:
        >>> labels = torch.tensor([[5, 6], [7, 8]])
        >>> gather_partners(labels, partners=torch.tensor([[1, 0], [0, 1]])).tolist()
        [[7, 6], [5, 8]]
    """
    members = torch.arange(partners.shape[1], device=partners.device)
    return values[partners, members]


def check_msda(kind: str, alpha: float, prob: float) -> None:
    """Check the settings of MSDA.

    Raises:
        InputError: unknown kind, or a value out of range.

    Example:
        >>> check_msda("cutmix", alpha=1.0, prob=0.5)
        >>> check_msda("cutmix", alpha=1.0, prob=50)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: msda_prob must be from 0 to 1; got 50.
    """
    if kind not in MSDA_KINDS:
        raise unknown_name_error("MSDA kind", kind, MSDA_KINDS)
    if not 0 < alpha < float("inf"):
        raise InputError(f"msda_alpha must be positive and finite; got {alpha}.")
    check_fraction("msda_prob", prob)
