"""Mixing ratios and the loss weights computed from them.

Shapes: B batch, M members.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from mixmo_fastai.errors import InputError, check_count


def draw_lam(
    num_samples: int,
    num_members: int,
    alpha: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw mixing ratios, one set per sample: lam ~ Dirichlet(alpha, …, alpha).

    A Dirichlet draw is a normalised vector of Gamma(alpha) draws. These are computed as
    Gamma(alpha + 1) · U^(1/alpha) and normalised in log space, to avoid underflow for small alpha.

    Args:
        num_samples: B.
        num_members: M.
        alpha: concentration; 2 in the paper; 1 is uniform on the simplex; lam approaches 1/M as
            alpha grows.
        generator: generator on `device`.
        device: device of lam.

    Returns:
        lam (B, M) in [0, 1], each row summing to one.

    Raises:
        InputError: a count is below one or alpha is not positive and finite.

    Example:
        >>> lam = draw_lam(4, num_members=2, alpha=2.0, generator=torch.Generator().manual_seed(0))
        >>> lam.shape
        torch.Size([4, 2])
        >>> torch.allclose(lam.sum(dim=1), torch.ones(4))
        True
    """
    check_count("num_samples", num_samples)
    check_count("num_members", num_members)
    if not isinstance(alpha, Real) or not 0 < alpha < math.inf:
        raise InputError(f"alpha must be positive and finite; got {alpha!r}.")
    size = (num_samples, num_members)
    gamma = torch._standard_gamma(torch.full(size, alpha + 1.0, device=device), generator=generator)
    uniform = 1.0 - torch.rand(size, generator=generator, device=device)  # (0, 1]: log is finite
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=1)


def loss_weights(lam: Tensor, root: float) -> Tensor:
    """Compute the loss weights of the members: w_i = M · lam_i^(1/root) / Σ_j lam_j^(1/root).

    Args:
        lam: (B, M) ratios in [0, 1]: in training the means of the masks from `draw_masks`, since
            boxes are clipped at the border and have whole, even sides, so that they cover less than
            the ratio drawn by `draw_lam`.
        root: r; 3 in the paper; 1 weights members by these ratios, infinity weights them equally.

    Returns:
        weights (B, M), each row summing to M.

    Raises:
        InputError: `root` is below one.

    Example:
        >>> lam = torch.tensor([[0.25, 0.75]])
        >>> loss_weights(lam, root=1), loss_weights(lam, root=float("inf"))
        (tensor([[0.5000, 1.5000]]), tensor([[1., 1.]]))
    """
    if not root >= 1:
        raise InputError(f"weight_root must be 1 or more (infinity is allowed); got {root}.")
    powers = lam.pow(1.0 / root)
    return lam.shape[1] * powers / powers.sum(dim=1, keepdim=True)
