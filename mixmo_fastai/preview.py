"""What training sees: pairs, masks and their mixture, as pixels.

Shapes: n positions of a batch, M members, C channels, H W image size, D feature channels, h w
feature size after the encoder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastai.data.transforms import IntToFloatTensor
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from fasttransform import Pipeline
from torch import Tensor

from mixmo_fastai.callback import MixMoCallback
from mixmo_fastai.data.glance import first_batch, preserved_random_states
from mixmo_fastai.errors import InputError
from mixmo_fastai.randomness import fresh_seed


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


def preview_batch(learn: Learner, count: int = 6) -> Preview:
    """Draw a first training batch, mixed with the callback's kind, whatever its probability.

    The Learner is as before afterwards, random states included, but for a loss that is wrapped in
    `MixMoLoss`.

    Args:
        learn: with a `MixMoCallback`.
        count: positions to show.

    Raises:
        InputError: the Learner has no `MixMoCallback`, or what a fit would refuse.
    """
    callback = next((cb for cb in learn.cbs if isinstance(cb, MixMoCallback)), None)
    if callback is None:
        raise InputError(
            "The Learner has no MixMoCallback, so that nothing is mixed.\n"
            "Build it with mixmo_learner(dls, arch), or add the callback."
        )
    with _as_in_the_first_step(learn, callback):
        learn.xb, learn.yb = _split(learn, first_batch(learn.dl))
        callback.before_batch()
        return preview_of(learn, count)


def preview_of(learn: Learner, count: int = 6) -> Preview:
    """Show the batch of a Learner as its `MixMoCallback` has left it.

    Args:
        learn: within a training step.
        count: positions to show.
    """
    inputs, masks = (part[:count].detach().float().cpu() for part in learn.xb)
    pixels = _as_pixels(inputs, learn)
    by_channels = masks.shape[2] > 1
    weights = F.interpolate(masks.mean(dim=2), size=pixels.shape[-2:], mode="nearest")
    return Preview(
        inputs=pixels,
        masks=_as_columns(masks, pixels.shape[-2:]) if by_channels else weights,
        mixed=(pixels * weights[:, :, None]).sum(dim=1),
        by_channels=by_channels,
        labels=[_names(learn, position) for position in range(len(inputs))],
    )


@contextmanager
def _as_in_the_first_step(learn: Learner, callback: MixMoCallback) -> Iterator[None]:
    """Let the callback believe that a fit has just begun, and put everything back."""
    state = ("epoch", "iter", "pct_train", "dl", "xb", "yb")
    before = {name: vars(learn)[name] for name in state if name in vars(learn)}
    mix_prob, fit_seed = callback.mix_prob, callback.fit_seed
    try:
        with preserved_random_states(learn.dls.train):
            callback.mix_prob = 1.0
            if callback.fit_seed is None:  # other processes, if any, need not look as well
                callback.fit_seed = fresh_seed()
            learn.epoch, learn.iter, learn.pct_train, learn.dl = 0, 0, 0.0, learn.dls.train
            callback.before_fit()
            callback.before_train()
            yield
    finally:
        callback.mix_prob, callback.fit_seed = mix_prob, fit_seed
        callback.drawn_slots = callback.drawn_mixings = None
        for name in state:
            vars(learn).pop(name, None)
        vars(learn).update(before)


def _split(learn: Learner, batch: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    num_inputs = getattr(learn.dls, "n_inp", 1 if len(batch) == 1 else len(batch) - 1)
    return tuple(batch[:num_inputs]), tuple(batch[num_inputs:])


def _as_columns(masks: Tensor, size: torch.Size) -> Tensor:
    """Draw each channel's mask value as a column: (n, M, D, h, w) -> (n, M, H, W)."""
    values = masks.mean(dim=(3, 4))[:, :, None]  # (n, M, 1, D)
    columns = F.interpolate(values, size=(1, max(size[1], values.shape[3])), mode="nearest")
    return columns.expand(-1, -1, size[0], -1)


def _as_pixels(inputs: Tensor, learn: Learner) -> Tensor:
    """Undo what the loader's batch transforms can undo, such as `Normalize`."""
    after_batch = getattr(learn.dls.train, "after_batch", None)
    shape, pixels = inputs.shape, TensorImage(inputs.flatten(0, 1))
    for transform in reversed(after_batch.fs if isinstance(after_batch, Pipeline) else []):
        if not isinstance(transform, IntToFloatTensor):  # which would round
            pixels = transform.decode(pixels)
    pixels = pixels.as_subclass(Tensor).cpu().reshape(shape)
    return _in_range(pixels).clamp(0, 1)


def _in_range(pixels: Tensor) -> Tensor:
    """Bring pixels into [0, 1]: of 0 to 255, or standardised in a way that nobody can undo."""
    lowest, highest = pixels.aminmax()
    if lowest >= 0 and highest > 16:
        return pixels / 255
    if lowest < -0.5 or highest > 1.5:
        return (pixels - lowest) / (highest - lowest)
    return pixels


def _names(learn: Learner, position: int) -> list[str]:
    """Name the classes of each member; of two where pixels were mixed."""
    vocab = getattr(learn.dls, "vocab", None)
    names = [_name(target, vocab) for target in learn.yb[0][position]]
    if len(learn.yb) == 2:
        return names
    pasted, shares = learn.yb[2][position], learn.yb[3][position]
    return [
        _both(name, _name(other, vocab), share)
        for name, other, share in zip(names, pasted, shares.tolist(), strict=True)
    ]


def _both(own: str, other: str, share: float) -> str:
    """Name two classes by their shares, and one whose share rounds to none not at all."""
    if not 0.005 < share < 0.995:
        return own if share > 0.5 else other
    return f"{share:.0%} {own}, {1 - share:.0%} {other}"


def _name(target: Tensor, vocab: Sequence[Any] | None) -> str:
    """Name a class, or those that several labels (K,) mark."""
    if target.numel() == 1:
        known = vocab is not None and not target.is_floating_point()
        return str(vocab[int(target)]) if known else f"{target.item():g}"
    marked = (target > 0.5).nonzero().flatten().tolist()
    return ", ".join(str(label if vocab is None else vocab[label]) for label in marked) or "none"
