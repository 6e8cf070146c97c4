"""Check that a converted network computes what the original network computes.

Shapes: B batch, M members, C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError, summarize_error
from mixmo_fastai.models.backbone_core import (
    BackboneCore,
)
from mixmo_fastai.models.forward_record import (
    ForwardRecord,
    LayerCall,
)

RELATIVE_TOLERANCE = 1e-4
"""Largest difference attributed to rounding, as a fraction of the largest value."""


def check_core(
    core: BackboneCore, record: ForwardRecord, first: LayerCall, last: LayerCall
) -> None:
    """Check that the core reproduces the input of the last layer from the features alone.

    The core is run on an image of NaN, which propagates to the output if a layer reads the image.

    Example:
        >>> from mixmo_fastai.models.forward_record import record_forward
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> record = record_forward(network, [(4, 4)])
        >>> core = BackboneCore(network, first="0", last="2")
        >>> check_core(core, record, record.first, record.last_candidates[0])
    """
    nan_image = torch.full_like(record.image[:1, :1, :1, :1], float("nan")).expand_as(record.image)
    expected = last.input.flatten(1)
    actual = _run_core(core, first.output, nan_image, record.name)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        raise InputError(
            f"{record.name} cannot be converted: without its last layer, it does not return that "
            "layer's input."
        )
    is_finite = bool(expected.isfinite().all())
    if is_finite and not actual.isfinite().all():
        raise _image_reused_error(record.name, first.name)
    if is_finite and _relative_difference(actual, expected) > RELATIVE_TOLERANCE:
        raise InputError(
            f"{record.name} cannot be converted: it uses more than the output of {first.name!r}, "
            "for example that\nconvolution's weights or attributes."
        )
    in_training = _run_core(
        copy.deepcopy(core).train(), first.output, nan_image, record.name, " in training"
    )
    if not isinstance(in_training, Tensor) or in_training.shape != expected.shape:
        raise InputError(
            f"{record.name} returns {type(in_training).__name__} in training; expected logits "
            "only.\nBuild it without auxiliary outputs, for example with aux_logits=False."
        )
    if is_finite and not in_training.isfinite().all():
        raise _image_reused_error(record.name, first.name, " in training")


def _run_core(
    core: BackboneCore, features: Tensor, image: Tensor, model: str, when: str = ""
) -> object:
    try:
        with torch.no_grad():
            return core.run(features.clone(), image)
    except Exception as error:  # user code may raise anything
        raise InputError(
            f"{model} cannot be run{when} without its first convolution and last layer: "
            f"{summarize_error(error)}."
        ) from error


def _image_reused_error(model: str, convolution: str, when: str = "") -> InputError:
    return InputError(
        f"{model} passes the image{when} to more layers than its first convolution, "
        f"{convolution!r}.\nThe first convolution must be the only layer that receives the image."
    )


@torch.no_grad()
def check_combined_output(
    layers: list[nn.Module], call: LayerCall, model: str, reduce: Callable[..., Tensor]
) -> None:
    """Check that the members' layers, summed or averaged, reproduce the original layer's output.

    Example:
        >>> linear, x = nn.Linear(8, 10), torch.ones(2, 8)
        >>> call = LayerCall("fc", x, linear(x))
        >>> check_combined_output([linear, linear], call, "MyNetwork", torch.mean)
        >>> check_combined_output([linear, linear], call, "MyNetwork", torch.sum)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: MyNetwork cannot be converted: its layer 'fc' ...
    """
    input = call.input if isinstance(layers[0], nn.Conv2d) else call.input.flatten(1)
    actual = reduce(torch.stack([layer(input) for layer in layers]), dim=0)
    expected = call.output.reshape(actual.shape)
    if expected.isfinite().all() and _relative_difference(actual, expected) > RELATIVE_TOLERANCE:
        raise InputError(
            f"{model} cannot be converted: its layer {call.name!r} ({type(layers[0]).__name__}) is "
            "not linear in its weights,\nfor example because it normalises them."
        )


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference divided by the largest expected absolute value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
