"""What a network does between its first convolution and its last linear layer.

Shapes: B batch, D feature channels, h w feature size after the first convolution, C image channels,
H W image size, K classes.
"""

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError


class BackboneCore(nn.Module):
    """A network without its first convolution and its last linear layer.

    Its own forward pass runs as written, on an image of zeros that takes no memory, for networks
    that look at the size of what they are shown.

    Args:
        network: a copy of its own, which is cut here.
        first: name of the convolution.
        last: name of the linear layer, or of a convolution 1x1 in its place.
        output: name of the layer that turns logits into predictions, if there is one.

    Shapes: (B, D, h, w) and the size (H, W) of the image -> (B, features).
    """

    output: str | None = None  # pickles of version 0.1.0 have none

    def __init__(
        self, network: nn.Module, first: str, last: str, output: str | None = None
    ) -> None:
        super().__init__()
        convolution, linear = network.get_submodule(first), network.get_submodule(last)
        assert isinstance(convolution, nn.Conv2d)
        self.first, self.last, self.last_kind, self.output = first, last, type(linear), output
        self.in_channels = convolution.in_channels
        self.stride = (int(convolution.stride[0]), int(convolution.stride[1]))
        _replace(network, convolution, GivenFeatures())
        _replace(network, linear, nn.Identity())
        if output is not None:
            take_out(network, output)
        self.body = network
        self.training = network.training

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            height, width = features.shape[2:]
            size = height * self.stride[0], width * self.stride[1]
        blank = features.new_zeros(()).expand(features.shape[0], self.in_channels, *size)
        embedding = self.run(features, blank)
        if not isinstance(embedding, Tensor):
            raise InputError(
                f"{type(self.body).__name__} gives {type(embedding).__name__}, not logits alone.\n"
                "Build it without auxiliary outputs, as with aux_logits=False."
            )
        return embedding

    def run(self, features: Tensor, image: Tensor) -> Any:
        """Run the network on an image, with given features in place of the image's own."""
        given: Any = self.body.get_submodule(self.first)
        given.hand_over(features, image.shape)
        try:
            return self.body(image)
        finally:
            given.hand_over(None, None)

    def whole(
        self, convolution: nn.Module, linear: nn.Module, output: nn.Module | None = None
    ) -> nn.Module:
        """Put layers back to where they were cut out of a copy: the network as it was built."""
        network = copy.deepcopy(self.body)
        if "num_classes" in vars(network):  # as timm's networks tell it
            vars(network)["num_classes"] = linear.get_parameter("weight").shape[0]
        _replace(network, network.get_submodule(self.first), convolution)
        end = linear if issubclass(self.last_kind, nn.Linear) else _as_convolution(linear)
        _replace(network, network.get_submodule(self.last), end)
        if self.output is not None and output is not None:
            _replace(network, network.get_submodule(self.output), output)
        return network

    def had(self, names: Iterable[str]) -> set[str]:
        """List tensors of the network before it was cut, of the names of a MixMoModel."""
        inside = "core.body."
        kept = {name.removeprefix(inside) for name in names if name.startswith(inside)}
        return kept | {f"{self.first}.weight", f"{self.last}.weight"}

    @contextmanager
    def filled(self, convolution: nn.Module, linear: nn.Module) -> Iterator[nn.Module]:
        """Put layers where they were cut out, for a moment: the network as it was built."""
        gaps = [self.body.get_submodule(name) for name in (self.first, self.last)]
        layers = (convolution, linear)
        for gap, layer in zip(gaps, layers, strict=True):
            _put(self.body, gap, layer)
        try:
            yield self.body
        finally:
            for gap, layer in zip(gaps, layers, strict=True):
                _put(self.body, layer, gap)

    def around_the_head(self) -> nn.Module | None:
        """Find what was built as one piece with the last layer, such as fastai's own head.

        Returns:
            the largest part that holds the last layer and not the first; None where that is the
            layer itself.
        """
        path = self.last.split(".")
        shared = 0
        for ours, theirs in zip(path[:-1], self.first.split("."), strict=False):
            if ours != theirs:
                break
            shared += 1
        own = path[: shared + 1]
        return None if own == path else self.body.get_submodule(".".join(own))


class GivenFeatures(nn.Module):
    """Stands where the first convolution was, and gives what the core has been handed instead.

    Several threads may ask one network at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_thread = _OfThread()
        self.traced: tuple[Tensor | None, torch.Size | None] = None, None

    def hand_over(self, features: Tensor | None, image_shape: torch.Size | None) -> None:
        """Say what to give, and for which images, or that nothing is to be given any more."""
        if torch.compiler.is_compiling():  # which follows no threads, and leaves nothing behind
            self.traced = features, image_shape
        else:
            self.of_thread.features, self.of_thread.image_shape = features, image_shape

    def forward(self, input: Tensor) -> Tensor:
        features, shape = self.traced
        if not torch.compiler.is_compiling() or features is None:
            features, shape = self._of_this_thread()
        if features is None:
            raise InputError(
                "The first convolution is asked for apart from the forward pass.\n"
                "Leave it out of gradient checkpointing and of torch.compiler.disable."
            )
        if shape is not None and input.shape != shape:
            sizes = ("x".join(map(str, each[2:])) for each in (shape, input.shape))
            raise InputError(
                "The network makes of images of {} such of {} before its first convolution, so "
                "that encoders do not see what it would.\nDo that in the loader: give it "
                "images of a size that it leaves as it is.".format(*sizes)
            )
        return features

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _of_this_thread(self) -> tuple[Tensor | None, torch.Size | None]:
        own = self.of_thread
        # A network that cannot be compiled in one piece is handed features here, and asks there.
        return self.traced if own.features is None else (own.features, own.image_shape)


class _OfThread(threading.local):
    """Features of each thread; a copy has none."""

    features: Tensor | None = None
    image_shape: torch.Size | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _OfThread, ()


def take_out(network: nn.Module, name: str) -> nn.Module:
    """Replace a layer by one that does nothing, and return the layer."""
    layer = network.get_submodule(name)
    _replace(network, layer, nn.Identity())
    return layer


def as_linear(layer: nn.Module) -> nn.Linear:
    """Give a linear layer, or a convolution 1x1 of a map of one place as the linear one it is."""
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1:
        raise InputError("The last layer is a convolution in groups: heads cannot be made of it.")
    linear = undrawn(layer.in_channels, layer.out_channels, like=layer)
    _copy_parameters(layer, linear)
    return linear


def undrawn(in_features: int, out_features: int, *, like: nn.Module) -> nn.Linear:
    """Make a linear layer without drawing from torch's global generator."""
    weight, has_bias = like.get_parameter("weight"), getattr(like, "bias", None) is not None
    layer = nn.Linear(in_features, out_features, has_bias, device="meta", dtype=weight.dtype)
    return layer.to_empty(device=weight.device)


def _as_convolution(linear: nn.Module) -> nn.Conv2d:
    assert isinstance(linear, nn.Linear)
    weight, has_bias = linear.weight, linear.bias is not None
    convolution = nn.Conv2d(
        linear.in_features, linear.out_features, 1, bias=has_bias, device="meta", dtype=weight.dtype
    ).to_empty(device=weight.device)
    _copy_parameters(linear, convolution)
    return convolution


@torch.no_grad()
def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in target.named_parameters():
        given = source.get_parameter(name)
        parameter.copy_(given.view_as(parameter)).requires_grad_(given.requires_grad)


def _replace(network: nn.Module, layer: nn.Module, module: nn.Module) -> None:
    """Put a module where a layer is, under all of its names, in the network's mode."""
    module.train(network.training)
    _put(network, layer, module)


def _put(network: nn.Module, layer: nn.Module, module: nn.Module) -> None:
    for parent in [*network.modules()]:
        for name, own in parent._modules.items():
            if own is layer:
                parent._modules[name] = module
