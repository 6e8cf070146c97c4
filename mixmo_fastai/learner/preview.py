"""Preview of a training batch: images, masks and mixtures as pixels.

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

from mixmo_fastai.callbacks.mixmo import MixMoCallback
from mixmo_fastai.data.first_batch import first_batch, preserved_random_states
from mixmo_fastai.errors import InputError
from mixmo_fastai.mixing.base_losses import is_multi_label
from mixmo_fastai.models.mixmo_model import unwrap
from mixmo_fastai.rng import fresh_seed


@dataclass(frozen=True)
class Preview:
    """Some samples of a training batch.

    Attributes:
        inputs: the input of each member, (n, M, C, H, W) in [0, 1].
        masks: the masks of MixMo, (n, M, H, W) in [0, 1]. If masks select whole channels,
            `by_channels` is true and each column of the image shows one channel.
        mixed: Σ mask · input, (n, C, H, W) in [0, 1]; the network mixes features in the same way.
            With `by_channels`, members are blended by their fraction of the channels, since pixels
            have no feature channels.
        labels: class names of each member, one list per sample.
        by_channels: masks select whole channels.
    """

    inputs: Tensor
    masks: Tensor
    mixed: Tensor
    labels: list[list[str]]
    by_channels: bool = False


def preview_batch(learn: Learner, count: int = 6) -> Preview:
    """Draw the first training batch, mixed with the callback's kind regardless of `mix_prob`.

    Members see different images, also if a fit begins with equal ones. The Learner is restored
    afterwards, including random states; only its loss stays wrapped in `MixMoLoss`.

    Args:
        learn: a Learner with a `MixMoCallback`.
        count: number of samples to show.

    Raises:
        InputError: the Learner has no `MixMoCallback`, or cannot be trained.
    """
    callback = next((cb for cb in learn.cbs if isinstance(cb, MixMoCallback)), None)
    if callback is None:
        raise InputError(
            "The Learner has no MixMoCallback.\n"
            "Build it with mixmo_learner(dls, arch), or add the callback."
        )
    with _simulated_first_step(learn, callback):
        learn.xb, learn.yb = _split(learn, first_batch(learn.dl))
        callback.before_batch()
        return preview_current_batch(learn, count)


def preview_current_batch(learn: Learner, count: int = 6) -> Preview:
    """Preview the current batch of a Learner, as mixed by its `MixMoCallback`.

    Args:
        learn: a Learner within a training step.
        count: number of samples to show.
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
        labels=[_class_names(learn, position) for position in range(len(inputs))],
    )


_CHANGED = ("mix_prob", "early_repetition", "fit_seed")


@contextmanager
def _simulated_first_step(learn: Learner, callback: MixMoCallback) -> Iterator[None]:
    """Put Learner and callback in the state of the first step of a fit; restore them afterwards."""
    names = ("epoch", "n_epoch", "iter", "pct_train", "dl", "xb", "yb")
    original = {name: vars(learn)[name] for name in names if name in vars(learn)}
    changed = {name: getattr(callback, name) for name in _CHANGED}
    network = unwrap(learn.model)
    readout = getattr(network, "readout", None)
    try:
        with preserved_random_states(learn.dls.train):
            callback.mix_prob, callback.early_repetition = 1.0, None
            if callback.fit_seed is None:  # otherwise before_fit would wait for the other ranks
                callback.fit_seed = fresh_seed()
            learn.epoch, learn.n_epoch, learn.iter, learn.pct_train = 0, 1, 0, 0.0
            learn.dl = learn.dls.train
            callback.before_fit()
            callback.before_train()
            if readout is not None:
                network.readout = None  # so that it is not told the progress of this step
            yield
    finally:
        if readout is not None:
            network.readout = readout
        vars(callback).update(changed)
        callback.draws = None
        for name in names:
            vars(learn).pop(name, None)
        vars(learn).update(original)


def _split(learn: Learner, batch: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    num_inputs = getattr(learn.dls, "n_inp", 1 if len(batch) == 1 else len(batch) - 1)
    return tuple(batch[:num_inputs]), tuple(batch[num_inputs:])


def _as_columns(masks: Tensor, size: torch.Size) -> Tensor:
    """Show the mask value of each channel as a column: (n, M, D, h, w) -> (n, M, H, W)."""
    values = masks.mean(dim=(3, 4))[:, :, None]  # (n, M, 1, D)
    columns = F.interpolate(values, size=(1, max(size[1], values.shape[3])), mode="nearest")
    return columns.expand(-1, -1, size[0], -1)


def _as_pixels(inputs: Tensor, learn: Learner) -> Tensor:
    """Undo the loader's reversible batch transforms, such as `Normalize`."""
    after_batch = getattr(learn.dls.train, "after_batch", None)
    shape, pixels = inputs.shape, TensorImage(inputs.flatten(0, 1))
    for transform in reversed(after_batch.fs if isinstance(after_batch, Pipeline) else []):
        if not isinstance(transform, IntToFloatTensor):  # its decode would round
            pixels = transform.decode(pixels)
    pixels = pixels.as_subclass(Tensor).cpu().reshape(shape)
    return _rescale(pixels).clamp(0, 1)


def _rescale(pixels: Tensor) -> Tensor:
    """Rescale pixels to [0, 1] if they are in [0, 255] or standardised by unknown statistics."""
    lowest, highest = pixels.aminmax()
    if lowest >= 0 and highest > 16:
        return pixels / 255
    if lowest < -0.5 or highest > 1.5:
        return (pixels - lowest) / (highest - lowest)
    return pixels


def _class_names(learn: Learner, position: int) -> list[str]:
    """Return the class name of each member's image; both class names if its pixels were mixed."""
    vocab = getattr(learn.dls, "vocab", None)
    is_label = not learn.yb[0].is_floating_point() or is_multi_label(learn.loss_func.base)
    if vocab is None and not is_label:
        vocab = ()  # numbers, as for regression
    names = [_target_name(target, vocab) for target in learn.yb[0][position]]
    if len(learn.yb) == 2:
        return names
    pasted, fractions = learn.yb[2][position], learn.yb[3][position]
    return [
        _mixed_name(name, _target_name(other, vocab), fraction)
        for name, other, fraction in zip(names, pasted, fractions.tolist(), strict=True)
    ]


def _mixed_name(name: str, other: str, fraction: float) -> str:
    """Join two class names with their percentages; omit one that rounds to 0 %."""
    if not 0.005 < fraction < 0.995:
        return name if fraction > 0.5 else other
    return f"{fraction:.0%} {name}, {1 - fraction:.0%} {other}"


def _target_name(target: Tensor, vocab: Sequence[Any] | None) -> str:
    """Return the name of a class, or the joined names of the labels of a multi-label (K,).

    Numbers are printed if the vocabulary is empty.
    """
    if vocab is not None and len(vocab) == 0:
        return ", ".join(f"{value:g}" for value in target.flatten().tolist())
    if target.numel() == 1:
        has_name = vocab is not None and not target.is_floating_point()
        return str(vocab[int(target)]) if has_name else f"{target.item():g}"
    indices = (target > 0.5).nonzero().flatten().tolist()
    return ", ".join(str(label if vocab is None else vocab[label]) for label in indices) or "none"
