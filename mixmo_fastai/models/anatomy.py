"""Where a network's first convolution and its last linear layer are, seen by running it once.

Shapes: C image channels, H W image size, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixmo_fastai.errors import InputError

IMAGE_SIZES = (224, 64, 32, 28, 16, 8)
"""Heights and widths at which a network is tried where nothing says which it takes."""


@dataclass
class Seen:
    """What one forward pass showed.

    Attributes:
        name: of the model, for messages.
        image: that it was shown (2, C, H, W).
        output: what it gave.
        calls: its convolutions and linear layers in the order in which they were called: name,
            input and output.
        modules: all of them by name, called or not.
    """

    name: str
    image: Tensor
    output: Any = None
    calls: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def called(self, kind: type[nn.Module]) -> list[tuple[str, Tensor, Tensor]]:
        """Give the calls of one kind of layer."""
        return [call for call in self.calls if isinstance(self.modules[call[0]], kind)]


def look(model: nn.Module, image_size: int | tuple[int, int] | None) -> Seen:
    """Run a model once, in evaluation mode, and note its layers.

    Args:
        model: afterwards it is as before.
        image_size: of the image; its own, or what works, where not given.

    Raises:
        InputError: it has no convolution, or cannot be run.
    """
    name = type(model).__name__
    modules: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise InputError(
            f"{name} has no convolution (nn.Conv2d) to make encoders of.\n"
            "MixMo needs one that sees the image before anything else does."
        )
    reasons = []
    for size in _sizes(model, image_size):
        weight = first.weight
        drawn = torch.randn(2, first.in_channels, *size, generator=torch.Generator().manual_seed(0))
        seen = Seen(name, drawn.to(weight.device, weight.dtype), modules=modules)
        try:
            with _watched(model, seen), torch.no_grad():
                seen.output = model(seen.image)
        except Exception as error:  # anything may happen in somebody's forward pass
            reasons.append(f"at {size[0]}x{size[1]}: {str(error).partition(chr(10))[0][:120]}")
            continue
        return seen
    raise InputError(
        f"{name} could not be run on an image of {first.in_channels} channels; {reasons[0]}.\n"
        "Say the size of its images: image_size=224."
    )


def _sizes(model: nn.Module, given: int | tuple[int, int] | None) -> list[tuple[int, int]]:
    """List the sizes at which to try a model; where the model says its own, that one first."""
    if given is not None:
        return [(given, given) if isinstance(given, int) else given]
    config = getattr(model, "default_cfg", None)  # timm's
    own = config.get("input_size") if isinstance(config, dict) else None
    own = own[1:] if own else getattr(model, "image_size", None)  # torchvision's
    pair = (own, own) if isinstance(own, int) else tuple(own) if own else None
    return [*([pair] if pair else []), *((size, size) for size in IMAGE_SIZES)]


@contextmanager
def _watched(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Note calls within; afterwards the model is as it was, its training mode part by part."""

    def note(name: str) -> Any:
        return lambda _, inputs, output: seen.calls.append((name, inputs[0], output))

    hooks = [module.register_forward_hook(note(name)) for name, module in seen.modules.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode


def first_convolution(seen: Seen, given: str | None) -> str:
    """Find the convolution that is the first to see the image.

    Args:
        seen: from `look`.
        given: its name, to be checked; found where not given.

    Raises:
        InputError: there is none, or not one that alone sees the image as it is.
    """
    _check_named(seen, given, nn.Conv2d, "encoder", "convolution")
    calls = seen.called(nn.Conv2d)
    name = given or (calls[0][0] if calls else None)
    own = [call for call in calls if call[0] == name]
    if name is None or not own:
        raise InputError(f"{seen.name} did not call the convolution {name or 'that it has'!r}.")
    if len(own) > 1:
        raise InputError(
            f"{seen.name} calls its convolution {name!r} {len(own)} times per image; encoders must "
            "see it once."
        )
    if own[0][1].shape != seen.image.shape or not torch.equal(own[0][1], seen.image):
        raise InputError(
            f"{seen.name} changes the image before its first convolution, {name!r}, so that "
            "encoders would not see it.\nDo that in the loader, such as standardising pixels; in "
            "torchvision's models it is transform_input=False."
        )
    return name


def last_linear(seen: Seen, given: str | None) -> str:
    """Find the linear layer whose output is the model's.

    Args:
        seen: from `look`.
        given: its name, to be checked; found where not given.

    Raises:
        InputError: there is none.
    """
    _check_named(seen, given, nn.Linear, "head", "linear layer")
    if not isinstance(seen.output, Tensor) or seen.output.ndim != 2:
        what = f"of shape {tuple(seen.output.shape)}" if isinstance(seen.output, Tensor) else ""
        raise InputError(
            f"{seen.name} gives {type(seen.output).__name__} {what}; MixMo needs logits (B, K)."
        )
    calls = seen.called(nn.Linear)
    ends = [name for name, _, output in calls if _is_same(output, seen.output)]
    wanted = [name for name in ends if given in (None, name)]
    if not wanted:
        last = f"linear layer {given or calls[-1][0]!r}" if calls else "a linear layer (nn.Linear)"
        raise InputError(
            f"{seen.name} does not end with {last}: heads cannot be made of it.\n"
            "Its output must be that of its last linear layer, without softmax or reshaping."
        )
    if [name for name, _, _ in calls].count(wanted[-1]) > 1:
        raise InputError(f"{seen.name} calls its linear layer {wanted[-1]!r} more than once.")
    return wanted[-1]


def _is_same(output: Tensor, expected: Tensor) -> bool:
    return output.shape == expected.shape and torch.equal(output, expected)


def _check_named(
    seen: Seen, given: str | None, kind: type[nn.Module], argument: str, wanted: str
) -> None:
    if given is not None and not isinstance(seen.modules.get(given), kind):
        known = [name for name, module in seen.modules.items() if isinstance(module, kind)]
        raise InputError(
            f"{argument} {given!r} names no {wanted} of {seen.name}.\n"
            f"There are: {', '.join(known[:5])}{', …' if len(known) > 5 else ''}."
        )
