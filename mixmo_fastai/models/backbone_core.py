"""The part of a network between its first convolution and its last linear layer.

Shapes: B batch, D feature channels, h w feature size after the first convolution, C image channels,
H W image size, K classes.
"""

import copy
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError


class BackboneCore(nn.Module):
    """A network without its first convolution and its last linear layer.

    The network's own `forward` runs unchanged. Its input is an image of zeros that occupies no
    memory, for networks that read the image size.

    Args:
        network: modified in place; pass a copy.
        first: name of the first convolution.
        last: name of the last linear layer, or of the 1x1 convolution used as one.
        output: name of the layer that turns logits into predictions, if any.

    Shapes: (B, D, h, w) and the size (H, W) of the image -> (B, features).

    Example:
        >>> layers = nn.Conv2d(3, 8, 3), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 10)
        >>> core = BackboneCore(nn.Sequential(*layers), first="0", last="3")
        >>> core(torch.zeros(2, 8, 6, 6), size=(8, 8)).shape
        torch.Size([2, 8])
    """

    output: str | None = None  # missing in pickles of version 0.1.0

    def __init__(
        self, network: nn.Module, first: str, last: str, output: str | None = None
    ) -> None:
        super().__init__()
        convolution, linear = network.get_submodule(first), network.get_submodule(last)
        assert isinstance(convolution, nn.Conv2d)
        self.first, self.last, self.last_kind, self.output = first, last, type(linear), output
        self.in_channels = convolution.in_channels
        self.stride = (int(convolution.stride[0]), int(convolution.stride[1]))
        _replace_layer(network, convolution, FeaturePlaceholder())
        _replace_layer(network, linear, nn.Identity())
        if output is not None:
            replace_with_identity(network, output)
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
                f"{type(self.body).__name__} returns {type(embedding).__name__}; expected logits "
                "only.\nBuild it without auxiliary outputs, for example with aux_logits=False."
            )
        return embedding

    def run(self, features: Tensor, image: Tensor) -> Any:
        """Run the network on an image, with `features` as the output of its first convolution.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
            >>> core = BackboneCore(network, first="0", last="2")
            >>> core.run(features=torch.zeros(2, 8, 1, 1), image=torch.zeros(2, 3, 4, 4)).shape
            torch.Size([2, 8])
        """
        placeholder: Any = self.body.get_submodule(self.first)
        placeholder.set_features(features, image.shape)
        try:
            return self.body(image)
        finally:
            placeholder.set_features(None, None)

    def rebuild(
        self, convolution: nn.Module, linear: nn.Module, output: nn.Module | None = None
    ) -> nn.Module:
        """Return a copy of the original network with these first, last and output layers.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
            >>> core = BackboneCore(network, first="0", last="2")
            >>> core.rebuild(nn.Conv2d(3, 8, 4), nn.Linear(8, 5))(torch.zeros(2, 3, 4, 4)).shape
            torch.Size([2, 5])
        """
        network = copy.deepcopy(self.body)
        if "num_classes" in vars(network):  # an attribute of timm's networks
            vars(network)["num_classes"] = linear.get_parameter("weight").shape[0]
        _replace_layer(network, network.get_submodule(self.first), convolution)
        last = linear if issubclass(self.last_kind, nn.Linear) else _as_convolution(linear)
        _replace_layer(network, network.get_submodule(self.last), last)
        if self.output is not None and output is not None:
            _replace_layer(network, network.get_submodule(self.output), output)
        return network

    def original_names(self, names: Iterable[str]) -> set[str]:
        """Return tensor names of the original network, from those of its `MixMoModel`.

        Example:
            >>> layers = nn.Conv2d(3, 8, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)
            >>> core = BackboneCore(nn.Sequential(*layers), first="0", last="3")
            >>> sorted(core.original_names(["encoders.0.weight", "core.body.1.weight"]))
            ['0.weight', '1.weight', '3.weight']
        """
        prefix = "core.body."
        core_names = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        return core_names | {f"{self.first}.weight", f"{self.last}.weight"}

    @contextmanager
    def restored(self, convolution: nn.Module, linear: nn.Module) -> Iterator[nn.Module]:
        """Yield the original network with this first convolution and last layer, temporarily.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 10))
            >>> core = BackboneCore(network, first="0", last="2")
            >>> with core.restored(nn.Conv2d(3, 8, 4), nn.Linear(8, 5)) as original:
            ...     original(torch.zeros(2, 3, 4, 4)).shape
            torch.Size([2, 5])
        """
        placeholders = [self.body.get_submodule(name) for name in (self.first, self.last)]
        layers = (convolution, linear)
        for placeholder, layer in zip(placeholders, layers, strict=True):
            _swap(self.body, placeholder, layer)
        try:
            yield self.body
        finally:
            for placeholder, layer in zip(placeholders, layers, strict=True):
                _swap(self.body, layer, placeholder)

    def head_block(self) -> nn.Module | None:
        """Find the block that contains the last layer, such as the head that fastai builds.

        Returns:
            The largest submodule that contains the last layer but not the first convolution; None
            if that is the last layer itself.

        Example:
            >>> head = nn.Sequential(nn.Flatten(), nn.Linear(8, 10))
            >>> core = BackboneCore(nn.Sequential(nn.Conv2d(3, 8, 4), head), first="0", last="1.1")
            >>> core.head_block() is head
            True
        """
        path = self.last.split(".")
        num_shared = 0
        for last_part, first_part in zip(path[:-1], self.first.split("."), strict=False):
            if last_part != first_part:
                break
            num_shared += 1
        block = path[: num_shared + 1]
        return None if block == path else self.body.get_submodule(".".join(block))


class FeaturePlaceholder(nn.Module):
    """Replaces the first convolution and returns the features that the core received.

    Several threads may run one network at the same time. Pickles of version 0.1.0 contain this
    module, so do not rename its attributes.

    Example:
        >>> placeholder = FeaturePlaceholder()
        >>> placeholder.set_features(torch.ones(2, 8, 6, 6), torch.Size([2, 3, 8, 8]))
        >>> placeholder(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_thread = _ThreadFeatures()
        self.traced: tuple[Tensor | None, torch.Size | None] = None, None

    def set_features(self, features: Tensor | None, image_shape: torch.Size | None) -> None:
        """Set the features to return and the shape of their images; None clears them.

        Example:
            >>> placeholder = FeaturePlaceholder()
            >>> placeholder.set_features(None, None)
            >>> placeholder(torch.zeros(2, 3, 8, 8))
            Traceback (most recent call last):
            mixmo_fastai.errors.InputError: The first convolution was called outside the model's ...
        """
        if torch.compiler.is_compiling():  # tracing does not support thread-local state
            self.traced = features, image_shape
        else:
            _exclude_from_tracing()
            self.of_thread.features, self.of_thread.image_shape = features, image_shape

    def forward(self, input: Tensor) -> Tensor:
        features, shape = self.traced
        if not torch.compiler.is_compiling() or features is None:
            features, shape = self._thread_features()
        if features is None:
            raise InputError(
                "The first convolution was called outside the model's forward pass.\n"
                "Exclude it from gradient checkpointing and from torch.compiler.disable."
            )
        if shape is not None and input.shape != shape:
            before, after = ("x".join(map(str, size[2:])) for size in (shape, input.shape))
            raise InputError(
                f"The network changes images of {before} to {after} before its first convolution, "
                "so the encoders would not\nsee the same image. Resize images in the data loader, "
                "to a size that the network does not change."
            )
        return features

    def _thread_features(self) -> tuple[Tensor | None, torch.Size | None]:
        stored = self.of_thread
        # After a graph break, features that were set while compiling are read outside the graph.
        return self.traced if stored.features is None else (stored.features, stored.image_shape)


_READ_FEATURES = FeaturePlaceholder._thread_features


def _exclude_from_tracing() -> None:
    """Exclude the reading of thread-local state from tracing, if anything may be traced.

    The decorator imports `torch._dynamo`, which takes 1.5 s and is loaded anyway before something
    is compiled.
    """
    method = FeaturePlaceholder._thread_features
    if "torch._dynamo" in sys.modules and method is _READ_FEATURES:
        FeaturePlaceholder._thread_features = torch.compiler.disable(method)  # type: ignore[method-assign, no-untyped-call, unused-ignore]


class _ThreadFeatures(threading.local):
    """Features of each thread; empty after copying and unpickling."""

    features: Tensor | None = None
    image_shape: torch.Size | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _ThreadFeatures, ()


# The names of these classes in Learners that version 0.1.0 exported.
GivenFeatures, _OfThread = FeaturePlaceholder, _ThreadFeatures


def replace_with_identity(network: nn.Module, name: str) -> nn.Module:
    """Replace a layer by `nn.Identity`; return the layer.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())
        >>> replace_with_identity(network, "1"), network[1]
        (Sigmoid(), Identity())
    """
    layer = network.get_submodule(name)
    _replace_layer(network, layer, nn.Identity())
    return layer


def as_linear(layer: nn.Module) -> nn.Linear:
    """Return a linear layer unchanged; convert a 1x1 convolution of 1x1 maps to a linear layer.

    Example:
        >>> as_linear(nn.Conv2d(8, 10, kernel_size=1))
        Linear(in_features=8, out_features=10, bias=True)
    """
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1:
        raise InputError(
            "The last layer is a grouped convolution; cannot create member heads from it."
        )
    linear = empty_linear(layer.in_channels, layer.out_channels, like=layer)
    _copy_parameters(layer, linear)
    return linear


def empty_linear(in_features: int, out_features: int, *, like: nn.Module) -> nn.Linear:
    """Create an uninitialised linear layer, without using torch's global generator.

    Example:
        >>> empty_linear(8, 10, like=nn.Linear(8, 5, bias=False))
        Linear(in_features=8, out_features=10, bias=False)
    """
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
        original = source.get_parameter(name)
        parameter.copy_(original.view_as(parameter)).requires_grad_(original.requires_grad)


def _replace_layer(network: nn.Module, layer: nn.Module, module: nn.Module) -> None:
    """Replace a layer under all of its names, and set the new module to the network's mode."""
    module.train(network.training)
    _swap(network, layer, module)


def _swap(network: nn.Module, layer: nn.Module, module: nn.Module) -> None:
    for parent in [*network.modules()]:
        for name, child in parent._modules.items():
            if child is layer:
                parent._modules[name] = module
