"""Find a network's first convolution and last linear layer by running it.

Shapes: C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mixmo_fastai.errors import InputError, summarize_error
from mixmo_fastai.models.forward_record import (
    ForwardRecord,
    LayerCall,
    _first_argument,
    _FirstConvolutionCalled,
    _random_image,
    find_layers,
)

OTHER_SIZES = ((97, 97), (40, 56), (224, 224))
"""Further sizes; at those that the network accepts, it must not change the image."""


def find_first_convolution(model: nn.Module, record: ForwardRecord, name: str | None) -> LayerCall:
    """Find and check the first convolution, whose input must be the image itself.

    Args:
        model: the model that was recorded.
        record: from `record_forward`.
        name: name of the convolution; None to use the first that was called.

    Raises:
        InputError: the convolution was not called, or more than once, its weights are shared or
            computed, or its input is not the unchanged image.

    Example:
        >>> from mixmo_fastai.models.forward_record import record_forward
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> record = record_forward(network, [(4, 4)])
        >>> find_first_convolution(network, record, name=None).name
        '0'
    """
    _check_layer_name(model, name, nn.Conv2d, "encoder", "convolution")
    if record.first is None:
        which = f"convolution {name!r}" if name is not None else "any of its convolutions"
        raise InputError(f"{record.name} did not call {which}.")
    name = record.first.name
    if (count := record.convolutions.count(name)) > 1:
        raise InputError(
            f"{record.name} calls its convolution {name!r} {count} times per image; an encoder "
            "must be called once."
        )
    _check_own_weights(model, name, record.name)
    if not _equal_with_nan(record.first.input, record.image):
        raise _image_changed_error(record.name, name)
    return record.first


def check_image_unchanged(
    model: nn.Module, record: ForwardRecord, name: str, sizes: Sequence[tuple[int, int]]
) -> None:
    """Check that the first convolution receives the unchanged image, in training too.

    Args:
        model: the model that was recorded.
        record: from `record_forward`.
        name: name of the convolution.
        sizes: further image sizes; sizes that the model rejects or resizes are skipped.

    Raises:
        InputError: the model changes the image before the convolution.

    Example:
        >>> from mixmo_fastai.models.forward_record import record_forward
        >>> layers = nn.Dropout(), nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10)
        >>> network = nn.Sequential(*layers).eval()
        >>> record = record_forward(network, [(4, 4)])
        >>> check_image_unchanged(network, record, "1", sizes=())
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: Sequential changes the image in training before its ...
    """
    received: list[Any] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        received.append(_first_argument(args, kwargs))
        raise _FirstConvolutionCalled

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    _, channels, height, width = record.image.shape
    recorded_size = (height, width)
    try:
        for training, when in ((True, " in training"), (False, "")):
            model.train(training)
            for size in dict.fromkeys((recorded_size, *sizes)):
                image = _random_image(channels, size).to(record.image)
                try:
                    with torch.no_grad():
                        model(image)
                except _FirstConvolutionCalled:
                    is_resized = getattr(received[-1], "shape", None) != image.shape
                    if size != recorded_size and is_resized:
                        continue  # the converted network raises an error for such images
                    if not _equal_with_nan(received[-1], image):
                        at_size = "" if size == recorded_size else f" of {size[0]}x{size[1]}"
                        raise _image_changed_error(record.name, name, at_size + when) from None
                except Exception as error:  # the model may not accept this size
                    if size == recorded_size:
                        raise InputError(
                            f"{record.name} could not be run{when}: {summarize_error(error)}."
                        ) from error
    finally:
        hook.remove()
        model.eval()


def find_output_layer(model: nn.Module, record: ForwardRecord) -> str | None:
    """Find an elementwise layer after the last linear layer that turns logits into predictions.

    Examples are the `SigmoidRange` of fastai's `y_range` and `nn.Sigmoid`. The layer has no
    parameters, and each output depends only on the input at the same position, in training and in
    evaluation.

    Args:
        model: the model that was recorded; it is run again.
        record: from `record_forward`.

    Returns:
        The layer's name; None if the model does not end with such a layer.

    Example:
        >>> from mixmo_fastai.models.forward_record import record_forward
        >>> layers = nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 1), nn.Sigmoid()
        >>> network = nn.Sequential(*layers).eval()
        >>> find_output_layer(network, record_forward(network, [(4, 4)]))
        '3'
    """
    for call in reversed(record.parameter_free):
        layer = copy.deepcopy(model.get_submodule(call.name))
        probe = _probe_values(call.output)
        if _equal_with_nan(_try_layer(layer, probe), probe):
            continue  # an identity in evaluation, such as Dropout
        is_called_once = [other.name for other in record.parameter_free].count(call.name) == 1
        keeps_shape = call.input.shape == call.output.shape
        if is_called_once and keeps_shape and _is_elementwise(layer, probe):
            models = (model, copy.deepcopy(model).train())
            is_last = all(_is_model_output(network, record, call) for network in models)
            return call.name if is_last else None
        return None
    return None


def _is_elementwise(layer: nn.Module, values: Tensor) -> bool:
    """Check that changing half of the inputs does not change the other half of the outputs."""
    unchanged = (torch.arange(values.numel()) % 2 == 0).view(values.shape)
    changed_values = values.where(unchanged, values * 0.5 + 1)
    outputs = [_try_layer(layer, values)]
    outputs += [_try_layer(layer.train(mode), changed_values) for mode in (True, False)]
    valid = [out[unchanged] for out in outputs if out is not None and out.shape == values.shape]
    return len(valid) == 3 and all(_equal_with_nan(out, valid[0]) for out in valid)


def _try_layer(layer: nn.Module, values: Tensor) -> Tensor | None:
    """Run a layer on a copy of the values; return None if it fails or returns no tensor."""
    try:
        with torch.no_grad():
            output = layer(values.clone())
    except Exception:  # user code may raise anything
        return None
    return output if isinstance(output, Tensor) else None


def _probe_values(like: Tensor) -> Tensor:
    """Return values from -3 to 3 in the shape of `like`, with alternating signs."""
    count = like.numel()
    signs = 1 - 2 * (torch.arange(count) % 2)
    return (signs * torch.linspace(0.5, 3, count)).to(like).view(like.shape)


def find_last_linear(model: nn.Module, record: ForwardRecord, name: str | None) -> LayerCall:
    """Find the linear layer whose output is the model's output.

    Args:
        model: the model that was recorded; it is run again.
        record: from `record_forward`.
        name: name of the layer, if known.

    Raises:
        InputError: the model does not end with such a layer.

    Example:
        >>> from mixmo_fastai.models.forward_record import record_forward
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> record = record_forward(network, [(4, 4)])
        >>> find_last_linear(network, record, name=None).name
        '2'
    """
    _check_layer_name(model, name, (nn.Linear, nn.Conv2d), "head", "linear layer")
    output = record.output
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise InputError(
            f"{record.name} returns {type(output).__name__}{shape}; MixMo needs logits (B, K)."
        )
    candidates = [call for call in record.last_candidates if name in (None, call.name)]
    matches = [call for call in candidates if _is_model_output(model, record, call)]
    if not matches:
        layer = f"linear layer {candidates[-1].name!r}" if candidates else "a linear layer"
        layer = layer if name is None else repr(name)
        raise InputError(
            f"{record.name} does not end with {layer}: cannot create member heads.\n"
            "Its output must be that of one linear layer (nn.Linear), without softmax, reshaping "
            "or a second head;\nan elementwise output layer may follow, such as SigmoidRange."
        )
    last = matches[-1]
    if [call.name for call in record.last_candidates].count(last.name) > 1:
        raise InputError(f"{record.name} calls its linear layer {last.name!r} more than once.")
    if not _is_model_output(copy.deepcopy(model).train(), record, last):
        raise InputError(
            f"{record.name} does not end with {last.name!r} in training: it processes the logits "
            "further, or returns auxiliary\noutputs. Build it without auxiliary outputs (for "
            "example aux_logits=False), and move other steps to the loss."
        )
    _check_own_weights(model, last.name, record.name)
    return last


def _image_changed_error(model: str, convolution: str, when: str = "") -> InputError:
    return InputError(
        f"{model} changes the image{when} before its first convolution, {convolution!r}, so the "
        "encoders would not see\nthe same image. Move such steps to the data loader, for example "
        "standardisation; in torchvision, set transform_input=False."
    )


def _is_model_output(model: nn.Module, record: ForwardRecord, call: LayerCall) -> bool:
    """Check whether a layer's output is the model's output, by replacing it with marker values."""
    if call.output.numel() != record.output.numel():
        return False
    layer, size = model.get_submodule(call.name), call.output.numel()
    values = (1e3 * (torch.arange(size) - size / 2)).to(record.image)  # positive and negative
    failure: Exception | None = None
    for first in (float("nan"), float(values[0])):  # some models reject NaN
        marker = torch.cat([values.new_tensor([first]), values[1:]]).reshape(call.output.shape)
        # A copy, because the next layer may modify it in place.
        hook = layer.register_forward_hook(lambda *_, marker=marker: marker.clone())
        try:
            with torch.no_grad():
                output = model(record.image)
        except Exception as error:  # user code may raise anything
            failure = error
            continue
        finally:
            hook.remove()
        return isinstance(output, Tensor) and _equal_with_nan(output, marker.flatten(1))
    assert failure is not None
    if model.training:
        raise InputError(
            f"{record.name} could not be run in training: {summarize_error(failure)}.\n"
            "If it has auxiliary outputs, build it without them, for example with aux_logits=False."
        ) from failure
    return False  # the model fails on marker values, so it processes its logits further


def _equal_with_nan(tensor: Any, expected: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.shape != expected.shape:
        return False
    return torch.equal(tensor.nan_to_num(), expected.nan_to_num())


def _check_layer_name(
    model: nn.Module,
    name: str | None,
    kind: type[nn.Module] | tuple[type, ...],
    argument: str,
    kind_name: str,
) -> None:
    known = find_layers(model, kind)
    if name is not None and name not in known:
        # For a head, list the linear layers if there are any, and otherwise the convolutions.
        names = [*find_layers(model, nn.Linear)] if argument == "head" else []
        names = names or [*known]
        raise InputError(
            f"{argument} must name a {kind_name} of {type(model).__name__}; got {name!r}.\n"
            f"Available: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}."
        )


def _check_own_weights(model: nn.Module, name: str, model_name: str) -> None:
    """Check that a layer's weights are parameters of that layer alone."""
    layer = model.get_submodule(name)
    if is_parametrized(layer) or "weight" not in dict(layer.named_parameters(recurse=False)):
        raise InputError(
            f"The layer {name!r} of {model_name} computes its weights from other parameters, as in "
            "weight or spectral normalisation.\nRemove this first, with torch.nn.utils."
            "parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm."
        )
    layer_ids = {id(parameter) for parameter in layer.parameters()}
    for other_name, other in model.named_modules():
        other_ids = {id(parameter) for parameter in other.parameters(recurse=False)}
        if other is not layer and layer_ids & other_ids:
            raise InputError(
                f"The layer {name!r} of {model_name} shares its weights with {other_name!r}; "
                "the conversion would untie them.\nGive each layer a separate copy first."
            )
