"""Mixing of features with masks.

Shapes: B batch, M members, D feature channels, h w feature size after the encoder.
"""

from torch import Tensor


def mix_features(features: Tensor, masks: Tensor) -> Tensor:
    """Mix the members' features: F = M · Σ_i masks_i ⊙ features_i (paper, equation 5).

    `MixMoModel` computes the same sum one member at a time. The factor M is part of the method.

    Args:
        features: (B, M, D, h, w).
        masks: (B, M, 1 or D, h, w).

    Returns:
        mixed features (B, D, h, w), in the dtype of `features`.

    Example:
        >>> features = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
        >>> masks = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 4, 4)
        >>> mixed = mix_features(features, masks)
        >>> mixed.shape, mixed.unique()  # 2 · (1/4 · 1 + 3/4 · 5)
        (torch.Size([1, 3, 4, 4]), tensor([8.]))
    """
    return features.shape[1] * (features * masks.to(features.dtype)).sum(dim=1)
