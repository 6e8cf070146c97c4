"""What a network does between its first convolution and its last linear layer.

Shapes: B batch, D feature channels, h w feature size after the first convolution, C image channels,
H W image size.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class BackboneCore(nn.Module):
    """A network without its first convolution and its last linear layer.

    Its own forward pass runs as written, on an image of zeros that takes no memory, for networks
    that look at the size of what they are shown.

    Args:
        body: the network, with `GivenFeatures` in place of the convolution and nothing in place of
            the linear layer.
        entry: name of the former.
        last: name of the latter.
        convolution: as it was, for the size of the image.

    Shapes: (B, D, h, w) -> (B, features).
    """

    def __init__(self, body: nn.Module, entry: str, last: str, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.body, self.entry, self.last = body, entry, last
        self.in_channels = convolution.in_channels
        fixed = isinstance(convolution.padding, tuple) and type(convolution) is nn.Conv2d
        padding = convolution.padding if fixed else None
        self.geometry = [
            _Geometry(
                int(convolution.kernel_size[axis]),
                int(convolution.stride[axis]),
                int(convolution.dilation[axis]),
                None if padding is None else int(padding[axis]),
            )
            for axis in range(2)
        ]

    def forward(self, features: Tensor) -> Tensor:
        embedding: Tensor = self.run(features)
        return embedding

    def run(self, features: Tensor, filler: float = 0.0) -> Any:
        """Run the body on features and an image that is `filler` everywhere."""
        size = [own.input_size(n) for own, n in zip(self.geometry, features.shape[2:], strict=True)]
        shape = (features.shape[0], self.in_channels, *size)  # a symbol where it is exported
        entry: Any = self.body.get_submodule(self.entry)
        entry.hand_over(features)
        try:
            return self.body(features.new_full((), filler).expand(shape))
        finally:
            entry.hand_over(None)

    def around_the_head(self) -> nn.Module | None:
        """Find what was built as one piece with the last layer, such as fastai's own head.

        Returns:
            the largest part that holds the last layer and not the first; None where that is the
            layer itself.
        """
        path = self.last.split(".")
        shared = 0
        for ours, theirs in zip(path[:-1], self.entry.split("."), strict=False):
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
        self.traced: Tensor | None = None

    def hand_over(self, features: Tensor | None) -> None:
        """Say what to give, or that nothing is to be given any more."""
        if torch.compiler.is_compiling():  # which follows no threads, and leaves nothing behind
            self.traced = features
        else:
            self.of_thread.features = features

    def forward(self, input: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        features = self.traced if compiling else self.of_thread.features
        if features is None:
            raise RuntimeError(
                "the first convolution is asked for once more after the forward pass; leave it out "
                "of gradient checkpointing"
            )
        return features


class _OfThread(threading.local):
    """Features of each thread; a copy has none."""

    features: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _OfThread, ()


@dataclass(frozen=True)
class _Geometry:
    """How a convolution's output size follows from its input's, along one axis."""

    kernel: int
    stride: int
    dilation: int
    padding: int | None  # None for as much as keeps the size

    def input_size(self, output_size: int) -> int:
        """Give a size of which this is the output, a multiple of the stride where there is one."""
        if self.padding is None:
            return output_size * self.stride
        reach = self.dilation * (self.kernel - 1) + 1
        smallest = max(1, (output_size - 1) * self.stride + reach - 2 * self.padding)
        return smallest + (-smallest) % self.stride
