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
    """
    return features.shape[1] * (features * masks.to(features.dtype)).sum(dim=1)
