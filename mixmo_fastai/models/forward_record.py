"""Run a network once and record the layers that could be its first or last."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mixmo_fastai.errors import InputError, summarize_error

IMAGE_SIZES = (224, 64, 32, 28, 16, 8)
"""Image heights and widths to try if the network's input size is unknown."""


Size = int | tuple[int, int]


class LayerCall(NamedTuple):
    """A call of a named layer, with its input and output."""

    name: str
    input: Any
    output: Tensor


@dataclass
class ForwardRecord:
    """Layer calls recorded during one forward pass in evaluation mode.

    Attributes:
        name: class name of the model, for messages.
        image: the input, (2, C, H, W).
        output: the model's output.
        convolutions: names of the convolutions, in the order of their calls.
        first: call of the first convolution, or of the convolution that the user named.
        last_candidates: calls of layers that could be the last layer: linear layers with 2-D output
            and 1x1 convolutions of 1x1 maps.
        parameter_free: calls of layers without parameters, with 2-D input and output: candidates
            for the output layer.
    """

    name: str
    image: Tensor
    output: Any = None
    convolutions: list[str] = field(default_factory=list)
    first: LayerCall | None = None
    last_candidates: list[LayerCall] = field(default_factory=list)
    parameter_free: list[LayerCall] = field(default_factory=list)


def find_layers(model: nn.Module, kind: type[nn.Module] | tuple[type, ...]) -> dict[str, nn.Module]:
    """Return the layers of a type, by name.

    Example:
        >>> find_layers(nn.Sequential(nn.Flatten(), nn.Linear(8, 10)), nn.Linear)
        {'1': Linear(in_features=8, out_features=10, bias=True)}
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return {name: module for name, module in modules.items() if isinstance(module, kind)}


def check_model(model: Any) -> None:
    """Check that the argument is an `nn.Module` with initialised weights.

    Raises:
        InputError: it is not an eager `nn.Module`, is a MixMoModel, or has uninitialised weights.

    Example:
        >>> check_model(nn.Linear(8, 10))
        >>> check_model("resnet18")
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: model must be a network (nn.Module); got 'resnet18'...
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("A scripted network cannot be converted; pass the original nn.Module.")
    if not isinstance(model, nn.Module):
        received = repr(model) if isinstance(model, str) else type(model).__name__
        received += "; call it and pass the result" if callable(model) else ""
        raise InputError(
            f"model must be a network (nn.Module); got {received}.\n"
            "Pass learn.model of a Learner, or use create_model(name, num_classes) for a name."
        )
    name = type(model).__name__
    if name == "MixMoModel":
        raise InputError("The network is already a MixMoModel.")
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise InputError(
            f"{name} has uninitialised lazy layers.\nRun the network on one batch first."
        )
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise InputError(f"{name} is on the meta device, without weights.")


def record_forward(
    model: nn.Module,
    image_sizes: Sequence[tuple[int, int]],
    encoder: str | None = None,
    in_channels: int | None = None,
) -> ForwardRecord:
    """Run a model on a random image and record its layer calls.

    Args:
        model: on the CPU, in evaluation mode; not modified.
        image_sizes: sizes to try, in order, until the model runs.
        encoder: name of its first convolution, if known.
        in_channels: C, if known.

    Raises:
        InputError: the model has no convolution, or fails at all sizes.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> record = record_forward(network, [(4, 4)])
        >>> record.first.name, record.first.output.shape
        ('0', torch.Size([2, 8, 1, 1]))
        >>> [call.name for call in record.last_candidates]
        ['2']
    """
    name = type(model).__name__
    convolutions = find_layers(model, nn.Conv2d)
    if not convolutions:
        raise InputError(
            f"{name} has no convolution (nn.Conv2d) to convert into encoders.\n"
            "MixMo needs a convolution as the first layer of the network."
        )
    counts = _candidate_channels(convolutions, encoder, in_channels)
    failures = []
    for size in image_sizes:
        for channels in counts:
            image = _random_image(channels, size).to(example_parameter(model))
            record = ForwardRecord(name, image)
            try:
                with _recording(model, record, encoder), torch.no_grad():
                    record.output = model(record.image)
            except Exception as error:  # user code may raise anything
                failures.append(f"{size[0]}x{size[1]}: {summarize_error(error)}")
                continue
            return record
    if len(image_sizes) == 1:
        raise InputError(f"{name} does not accept images of {failures[0]}.")
    raise InputError(
        f"{name} failed at all image sizes that were tried; at {failures[0]}.\n"
        "Specify the size of its images: image_size=(height, width)."
    )


def candidate_sizes(model: nn.Module, image_size: Size | None) -> list[tuple[int, int]]:
    """Return the image sizes to try: `image_size`, or the model's declared size and others.

    Raises:
        InputError: image_size is not a valid size.

    Example:
        >>> candidate_sizes(nn.Identity(), image_size=(64, 48))
        [(64, 48)]
        >>> candidate_sizes(nn.Identity(), image_size=None)[:3]
        [(224, 224), (64, 64), (32, 32)]
    """
    if image_size is not None:
        if (pair := _as_pair(image_size)) is None:
            raise InputError(
                f"image_size must be a number of pixels or (height, width); got {image_size!r}."
            )
        return [pair]
    # timm's models declare `default_cfg["input_size"]`, torchvision's `image_size`.
    config = getattr(model, "default_cfg", None)
    input_size = config.get("input_size") if isinstance(config, dict) else None
    declared = _as_pair(input_size[1:] if input_size else getattr(model, "image_size", None))
    return [*([declared] if declared else []), *((size, size) for size in IMAGE_SIZES)]


def _candidate_channels(
    convolutions: dict[str, nn.Module], encoder: str | None, in_channels: int | None
) -> list[int]:
    """Return the numbers of image channels to try, in descending order of likelihood."""
    counts = [m.in_channels for m in convolutions.values() if isinstance(m, nn.Conv2d)]
    if encoder in convolutions:
        return [counts[[*convolutions].index(encoder)]]
    likely = [counts[0], *(count for count in (in_channels, 3, 1) if count in counts)]
    distinct = [*dict.fromkeys(counts)][:5]
    # The network may change the number of channels before its first convolution.
    others = [count for count in (in_channels, 3) if count is not None]
    return [*dict.fromkeys([*likely, *distinct, *others])]


def example_parameter(model: nn.Module) -> Tensor:
    """Return a floating-point parameter, to read the dtype and device of a model.

    Example:
        >>> example_parameter(nn.Linear(8, 10).double()).dtype
        torch.float64
    """
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _random_image(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def _as_pair(size: Any) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    return (pair[0], pair[1]) if is_pair and all(type(n) is int and n > 0 for n in pair) else None


@contextmanager
def _recording(model: nn.Module, record: ForwardRecord, encoder: str | None) -> Iterator[None]:
    """Record layer calls within the context."""

    def record_convolution(name: str) -> Any:
        def hook(module: nn.Conv2d, args: Any, kwargs: Any, output: Tensor) -> None:
            record.convolutions.append(name)
            is_first = record.first is None and encoder in (None, name)
            maps = (_first_argument(args, kwargs), output)
            are_1x1 = all(set(map_.shape[2:]) == {1} for map_ in maps)
            is_candidate = are_1x1 and set(module.kernel_size) == {1}
            if not is_first and not is_candidate:
                return
            call = _copy_call(name, args, kwargs, output)
            record.first = call if is_first else record.first
            record.last_candidates += [call] if is_candidate else []

        return hook

    def record_linear(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if output.ndim == 2:
                record.last_candidates.append(_copy_call(name, args, kwargs, output))

        return hook

    def record_parameter_free(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            input = _first_argument(args, kwargs)
            if all(isinstance(value, Tensor) and value.ndim == 2 for value in (input, output)):
                record.parameter_free.append(_copy_call(name, args, kwargs, output))

        return hook

    hooks = [
        module.register_forward_hook(make_hook(name), with_kwargs=True)
        for kind, make_hook in ((nn.Conv2d, record_convolution), (nn.Linear, record_linear))
        for name, module in find_layers(model, kind).items()
    ]
    hooks += [
        module.register_forward_hook(record_parameter_free(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and not [*module.children(), *module.parameters(), *module.buffers()]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copy_call(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> LayerCall:
    """Record a call with copies of its tensors, which the next layer may modify in place."""
    input = _first_argument(args, kwargs)
    return LayerCall(name, input.clone() if isinstance(input, Tensor) else input, output.clone())


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


class _FirstConvolutionCalled(Exception):  # noqa: N818  # not an error
    """Stops a forward pass at the first convolution."""
