"""What training sees: pairs, masks and their mixture, as pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmo_fastai.training import Training


@dataclass(frozen=True)
class Preview:
    """Some positions of a training batch.

    Attributes:
        inputs: what each member sees, (n, M, C, H, W) in [0, 1].
        masks: MixMo's, (n, M, H, W) in [0, 1]. Of a mask of whole channels, each column of the
            picture is a channel, and `by_channels` is true.
        mixed: Σ mask · input, (n, C, H, W) in [0, 1]; the network mixes features the same way.
            Pixels have no feature channels: there, members are blended by their share of them.
        labels: class names of each position, one list per position.
    """

    inputs: Tensor
    masks: Tensor
    mixed: Tensor
    labels: list[list[str]]
    by_channels: bool = False


def preview_batch(training: Training, count: int = 6) -> Preview:
    """Draw the first training batch, mixed with the recipe's kind, whatever its probability.

    Args:
        training: from `prepare`.
        count: positions to show.
    """
    learn = training.learn
    callback = learn.mix_mo
    learn.epoch, learn.iter, learn.pct_train = 0, 0, 0.0
    learn.dl, callback.mix_prob = learn.dls.train, 1.0
    callback.before_fit()
    callback.before_train()
    *learn.xb, targets = next(iter(learn.dl))
    learn.yb = (targets,)
    callback.before_batch()
    return preview_of(learn.xb, learn.yb, training, count)


def preview_of(
    xb: Sequence[Tensor], yb: Sequence[Tensor], training: Training, count: int = 6
) -> Preview:
    """Show a batch as `MixMoCallback` has left it.

    Args:
        xb: inputs of the members and masks.
        yb: targets and weights; with mixed pixels, also the targets pasted in and their shares.
        training: that it is of.
        count: positions to show.
    """
    inputs, masks = (part[:count].cpu() for part in xb)
    yb = [part[:count].cpu() for part in yb]
    pixels = _denormalized(inputs, training)
    by_channels = masks.shape[2] > 1
    weights = F.interpolate(masks.mean(dim=2), size=pixels.shape[-2:], mode="nearest")
    shown = _as_columns(masks, pixels.shape[-2:]) if by_channels else weights
    return Preview(
        inputs=pixels,
        masks=shown,
        mixed=(pixels * weights[:, :, None]).sum(dim=1),
        by_channels=by_channels,
        labels=[_names(training, yb, position) for position in range(len(inputs))],
    )


def _as_columns(masks: Tensor, size: torch.Size) -> Tensor:
    """Draw each channel's mask value as a column: (n, M, D, h, w) -> (n, M, H, W)."""
    values = masks.mean(dim=(3, 4))[:, :, None]  # (n, M, 1, D)
    columns = F.interpolate(values, size=(1, max(size[1], values.shape[3])), mode="nearest")
    return columns.expand(-1, -1, size[0], -1)


def _denormalized(inputs: Tensor, training: Training) -> Tensor:
    loader = training.learn.dls.train
    mean, std = (v[:, None, None] for v in (loader.mean, loader.std))
    return (inputs * std + mean).clamp(0, 1)


def _names(training: Training, yb: Sequence[Tensor], position: int) -> list[str]:
    """Name the classes of each member; of two where pixels were mixed."""
    classes, targets = training.source.classes, yb[0]
    names = [classes[int(label)] for label in targets[position]]
    if len(yb) == 2:
        return names
    pasted, shares = yb[2][position], yb[3][position]
    return [
        name if share == 1 else f"{share:.0%} {name}, {1 - share:.0%} {classes[int(other)]}"
        for name, other, share in zip(names, pasted, shares.tolist(), strict=True)
    ]
