"""Slow NumPy reference of the mathematics, written from the paper in its notation."""

import numpy as np


def box_mask(height, width, lam, centre_row, centre_column):
    """Box mask, position by position: centre ± side // 2, clipped to the map."""
    half_height = int(np.floor(height * np.sqrt(lam))) // 2
    half_width = int(np.floor(width * np.sqrt(lam))) // 2
    mask = np.zeros((height, width))
    for row in range(max(0, centre_row - half_height), min(height, centre_row + half_height)):
        for column in range(
            max(0, centre_column - half_width), min(width, centre_column + half_width)
        ):
            mask[row, column] = 1
    return mask


def complement_masks(region, lam):
    """CutMix(A, Mixup(B, C, …)): lam (M,) by role, region (h, w) of role 0."""
    rest = sum(lam[1:])
    return np.stack([region] + [(1 - region) * ratio / rest for ratio in lam[1:]])


def mix(features, masks):
    """F = M · Σ_i m_i ⊙ c_i, sample by sample: (B, M, D, h, w) -> (B, D, h, w)."""
    batch, members = features.shape[:2]
    mixed = np.zeros((batch, *features.shape[2:]))
    for b in range(batch):
        for i in range(members):
            mixed[b] += members * masks[b, i] * features[b, i]
    return mixed


def weights(lam, root):
    """w_i = M · λ_i^{1/r} / Σ_j λ_j^{1/r} for one sample, lam (M,)."""
    powers = [value ** (1 / root) for value in lam]
    return np.array([len(lam) * power / sum(powers) for power in powers])


def cross_entropy(logits, target):
    """-Σ_k t_k log softmax(l)_k for one prediction; the target is a class or a distribution."""
    log_p = logits - logits.max()
    log_p = log_p - np.log(np.exp(log_p).sum())
    return -log_p[target] if np.ndim(target) == 0 else -(target * log_p).sum()


def loss(logits, targets, member_weights):
    """Mean over the batch of Σ_i w_i · CE(l_i, y_i)."""
    batch, members = logits.shape[:2]
    total = 0.0
    for b in range(batch):
        for i in range(members):
            total += member_weights[b, i] * cross_entropy(logits[b, i], targets[b, i])
    return total / batch


def crop(image, row, column, padding):
    """Window at (row, column) of an image (C, H, W) with black padding."""
    _, height, width = image.shape
    window = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + row - padding, x + column - padding
            if 0 <= source_y < height and 0 <= source_x < width:
                window[:, y, x] = image[:, source_y, source_x]
    return window


def grown_blocks(seeds, block_size):
    """Replace every seed by a square around it, clipped at the border: (h, w) bool -> (h, w)."""
    height, width = seeds.shape
    reach = block_size // 2
    region = np.zeros((height, width))
    for row, column in zip(*np.nonzero(seeds), strict=True):
        rows = slice(max(0, row - reach), row + reach + 1)
        region[rows, max(0, column - reach) : column + reach + 1] = 1
    return region


def blur(noise, sigma):
    """Gaussian blur, position by position, with weights that sum to one inside the map."""
    height, width = noise.shape
    blurred = np.zeros_like(noise)
    for row in range(height):
        for column in range(width):
            vertical = np.exp(-((np.arange(height) - row) ** 2) / (2 * sigma**2))
            horizontal = np.exp(-((np.arange(width) - column) ** 2) / (2 * sigma**2))
            kernel = np.outer(vertical / vertical.sum(), horizontal / horizontal.sum())
            blurred[row, column] = (kernel * noise).sum()
    return blurred


def label_weight(msda_mask, mask):
    """mean(msda_mask · m) / mean(m) for one member; (H, W) is averaged to m's (D, h, w)."""
    _, height, width = mask.shape
    rows, columns = msda_mask.shape[0] // height, msda_mask.shape[1] // width
    total = 0.0
    for row in range(height):
        for column in range(width):
            patch = msda_mask[
                row * rows : (row + 1) * rows, column * columns : (column + 1) * columns
            ]
            total += patch.mean() * mask[:, row, column].mean()
    return total / (height * width) / mask.mean()


def exponential_average(start, steps, decay):
    """Moving average of weights over steps, with a smaller decay at the start."""
    average = start
    for t, weights in enumerate(steps):
        d = min(decay, (1 + t) / (10 + t))
        average = d * average + (1 - d) * weights
    return average
