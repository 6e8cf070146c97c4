"""Where a network's first convolution and its last linear layer are, seen by running it.

Shapes: C image channels, H W image size, K classes.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from mixmo_fastai.errors import InputError, first_line

IMAGE_SIZES = (224, 64, 32, 28, 16, 8)
"""Heights and widths at which a network is tried where nothing says which it takes."""
OTHER_SIZES = ((97, 97), (40, 56), (224, 224))
"""Sizes at which it must take the image as it is, if it takes them at all."""
Size = int | tuple[int, int]


class Call(NamedTuple):
    """A layer that was called by name, with what, and what it gave."""

    name: str
    input: Any
    output: Tensor


@dataclass
class Seen:
    """What one forward pass in evaluation mode showed.

    Attributes:
        name: of the model, for messages.
        image: that it was shown (2, C, H, W).
        output: what it gave.
        convolutions: names of those that were called, in order.
        first: the call of the first convolution, or of the one that was asked for.
        ends: calls of layers that could be the last: linear ones of rows, and convolutions 1x1 of
            maps of one place.
        plain: calls of layers without parameters that turn rows into rows, as an output layer does.
    """

    name: str
    image: Tensor
    output: Any = None
    convolutions: list[str] = field(default_factory=list)
    first: Call | None = None
    ends: list[Call] = field(default_factory=list)
    plain: list[Call] = field(default_factory=list)


def layers_of(model: nn.Module, kind: type[nn.Module] | tuple[type, ...]) -> dict[str, nn.Module]:
    """List a model's layers of a kind, by name."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return {name: module for name, module in modules.items() if isinstance(module, kind)}


def check_model(model: Any) -> None:
    """Check that something is a network that can be looked at.

    Raises:
        InputError: it is none, or is not complete.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("A scripted network cannot be converted; give the one it was made of.")
    if not isinstance(model, nn.Module):
        what = f"{model!r}" if isinstance(model, str) else type(model).__name__
        what += ", which has to be called first" if callable(model) else ""
        raise InputError(
            f"A network (nn.Module) is needed; got {what}.\n"
            "Of a Learner it is learn.model; by name it is made by create_model(name, num_classes)."
        )
    name = type(model).__name__
    if name == "MixMoModel":
        raise InputError("The network is a MixMo network already.")
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise InputError(
            f"{name} has lazy layers that have not seen an image yet.\nShow it one batch first."
        )
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise InputError(f"{name} is on the meta device, without weights.")


def look(
    model: nn.Module,
    image_sizes: Sequence[tuple[int, int]],
    encoder: str | None = None,
    in_channels: int | None = None,
) -> Seen:
    """Run a model, and note its layers.

    Args:
        model: on the CPU, in evaluation mode; left as it is.
        image_sizes: at which it is tried, until it runs.
        encoder: name of its first convolution, where it is known.
        in_channels: C, where it is known.

    Raises:
        InputError: it has no convolution, or cannot be run.
    """
    name = type(model).__name__
    convolutions = layers_of(model, nn.Conv2d)
    if not convolutions:
        raise InputError(
            f"{name} has no convolution (nn.Conv2d) to make encoders of.\n"
            "MixMo needs one that sees the image before anything else does."
        )
    counts = _channels(convolutions, encoder, in_channels)
    reasons = []
    for size in image_sizes:
        for channels in counts:
            seen = Seen(name, _image(channels, size).to(first_tensor(model)))
            try:
                with _noting(model, seen, encoder), torch.no_grad():
                    seen.output = model(seen.image)
            except Exception as error:  # anything may happen in somebody's forward pass
                reasons.append(f"{size[0]}x{size[1]}: {first_line(error)}")
                continue
            return seen
    if len(image_sizes) == 1:
        raise InputError(f"{name} does not take images of {reasons[0]}.")
    raise InputError(
        f"{name} could not be run on an image; at {reasons[0]}.\n"
        "Say the size of its images: image_size=(height, width)."
    )


def sizes_of(model: nn.Module, given: Size | None) -> list[tuple[int, int]]:
    """List the sizes at which to try a model; where the model says its own, that one first.

    Raises:
        InputError: the given one is no size.
    """
    if given is not None:
        if (pair := _pair(given)) is None:
            raise InputError(
                f"image_size must be a number of pixels or (height, width); got {given!r}."
            )
        return [pair]
    config = getattr(model, "default_cfg", None)  # timm's
    own = config.get("input_size") if isinstance(config, dict) else None
    known = _pair(own[1:] if own else getattr(model, "image_size", None))  # torchvision's
    return [*([known] if known else []), *((size, size) for size in IMAGE_SIZES)]


def first_convolution(model: nn.Module, seen: Seen, given: str | None) -> Call:
    """Find the convolution that is the first to see the image.

    Args:
        model: as it was looked at.
        seen: from `look`.
        given: its name, to be checked; found where not given.

    Raises:
        InputError: there is none, or not one that alone sees the image as it is.
    """
    _check_named(model, given, nn.Conv2d, "encoder", "convolution")
    if seen.first is None:
        raise InputError(f"{seen.name} did not call the convolution {given or 'that it has'!r}.")
    name = seen.first.name
    if (times := seen.convolutions.count(name)) > 1:
        raise InputError(
            f"{seen.name} calls its convolution {name!r} {times} times per image; encoders must "
            "see it once."
        )
    _check_plain(model, name, seen.name)
    if not _is_same(seen.first.input, seen.image):
        raise _changes_the_image(seen.name, name)
    return seen.first


def check_elsewhere(
    model: nn.Module, seen: Seen, name: str, sizes: Sequence[tuple[int, int]]
) -> None:
    """Check that the image reaches the first convolution as it is in training and at other sizes.

    Args:
        model: as it was looked at.
        seen: from `look`.
        name: of the convolution.
        sizes: other ones; those that the model does not take, or makes others of, are left out.

    Raises:
        InputError: the image is changed before.
    """
    reached: list[Any] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        reached.append(_first_of(args, kwargs))
        raise _Reached

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    channels, own = seen.image.shape[1], (seen.image.shape[2], seen.image.shape[3])
    try:
        for training, when in ((True, " in training"), (False, "")):
            model.train(training)
            for size in dict.fromkeys((own, *sizes)):
                image = _image(channels, size).to(seen.image)
                try:
                    with torch.no_grad():
                        model(image)
                except _Reached:
                    if size != own and getattr(reached[-1], "shape", None) != image.shape:
                        continue  # which is refused when such an image comes
                    if not _is_same(reached[-1], image):
                        at = "" if size == own else f" of {size[0]}x{size[1]}"
                        raise _changes_the_image(seen.name, name, at + when) from None
                except Exception as error:  # a size that it does not take
                    if size == own:
                        raise InputError(
                            f"{seen.name} could not be run{when}: {first_line(error)}."
                        ) from error
    finally:
        hook.remove()
        model.eval()


def output_layer(model: nn.Module, seen: Seen) -> str | None:
    """Find a layer after the last linear one that turns each logit into a prediction by itself.

    Such as the `SigmoidRange` of fastai's `y_range`, or `nn.Sigmoid`: a layer without parameters
    whose every number depends on the one number at its place, in training as in evaluation.

    Args:
        model: as it was looked at; it is run once more.
        seen: from `look`.

    Returns:
        its name; None when the model ends without one.
    """
    for call in reversed(seen.plain):
        layer = copy.deepcopy(model.get_submodule(call.name))
        probe = _both_signs(call.output)
        if _is_same(_tried(layer, probe), probe):
            continue  # it does nothing in evaluation, such as Dropout
        once = [each.name for each in seen.plain].count(call.name) == 1
        if once and call.input.shape == call.output.shape and _is_elementwise(layer, probe):
            both = (model, copy.deepcopy(model).train())
            return call.name if all(_ends_with(each, seen, call) for each in both) else None
        return None
    return None


def _is_elementwise(layer: nn.Module, numbers: Tensor) -> bool:
    """Check that changing half of the numbers changes no prediction of the other half."""
    half = (torch.arange(numbers.numel()) % 2 == 0).view(numbers.shape)
    expected = _tried(layer, numbers)
    changed = numbers.where(half, numbers * 0.5 + 1)
    found = [_tried(layer.train(mode), changed) for mode in (True, False)]
    given = [each for each in (expected, *found) if each is not None and each.shape == half.shape]
    return len(given) == 3 and all(_is_same(each[half], given[0][half]) for each in given)


def _tried(layer: nn.Module, numbers: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            found = layer(numbers.clone())
    except Exception:  # anything may happen in a user's forward pass
        return None
    return found if isinstance(found, Tensor) else None


def _both_signs(like: Tensor) -> Tensor:
    """Make numbers from -3 to 3, of both signs in every row, of the shape of a tensor."""
    count = like.numel()
    signs = 1 - 2 * (torch.arange(count) % 2)
    return (signs * torch.linspace(0.5, 3, count)).to(like).view(like.shape)


def last_linear(model: nn.Module, seen: Seen, given: str | None) -> Call:
    """Find the linear layer whose output is the model's.

    Args:
        model: as it was looked at; it is run once more.
        seen: from `look`.
        given: its name, to be checked; found where not given.

    Raises:
        InputError: there is none.
    """
    _check_named(model, given, (nn.Linear, nn.Conv2d), "head", "linear layer")
    if not isinstance(seen.output, Tensor) or seen.output.ndim != 2:
        what = f" of shape {tuple(seen.output.shape)}" if isinstance(seen.output, Tensor) else ""
        raise InputError(
            f"{seen.name} gives {type(seen.output).__name__}{what}; MixMo needs logits (B, K)."
        )
    named = [call for call in seen.ends if given in (None, call.name)]
    ends = [call for call in named if _ends_with(model, seen, call)]
    if not ends:
        what = f"linear layer {named[-1].name!r}" if named else "a linear layer (nn.Linear)"
        what = what if given is None else repr(given)
        raise InputError(
            f"{seen.name} does not end with {what}: heads cannot be made of it.\n"
            "Its output must be that of one linear layer, without softmax, reshaping or a second "
            "head; a layer that\nchanges each number by itself may follow, such as SigmoidRange."
        )
    last = ends[-1]
    if [call.name for call in seen.ends].count(last.name) > 1:
        raise InputError(f"{seen.name} calls its linear layer {last.name!r} more than once.")
    if not _ends_with(copy.deepcopy(model).train(), seen, last):
        raise InputError(
            f"{seen.name} does not end with {last.name!r} in training: its logits go on, or other "
            "outputs go with them.\nBuild it without, as with aux_logits=False, and do the rest in "
            "the loss."
        )
    _check_plain(model, last.name, seen.name)
    return last


def _channels(
    convolutions: dict[str, nn.Module], encoder: str | None, in_channels: int | None
) -> list[int]:
    """List the numbers of image channels to try: those of convolutions, the likeliest first."""
    own = [m.in_channels for m in convolutions.values() if isinstance(m, nn.Conv2d)]
    if encoder in convolutions:
        return [own[[*convolutions].index(encoder)]]
    likely = [own[0], *(count for count in (in_channels, 3, 1) if count in own)]
    # What no convolution takes may be made into it before the first.
    other = [count for count in (in_channels, 3) if count is not None]
    return [*dict.fromkeys([*likely, *[*dict.fromkeys(own)][:5], *other])]


def first_tensor(model: nn.Module) -> Tensor:
    """Give a parameter of a model, for where and of which type it is."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _image(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def _pair(size: Any) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    fits = isinstance(pair, tuple | list) and len(pair) == 2
    return (pair[0], pair[1]) if fits and all(type(n) is int and n > 0 for n in pair) else None


@contextmanager
def _noting(model: nn.Module, seen: Seen, encoder: str | None) -> Iterator[None]:
    """Note calls within."""

    def note_convolution(name: str) -> Any:
        def hook(module: nn.Conv2d, args: Any, kwargs: Any, output: Tensor) -> None:
            seen.convolutions.append(name)
            is_first = seen.first is None and encoder in (None, name)
            maps = (_first_of(args, kwargs), output)
            of_one_place = all(set(each.shape[2:]) == {1} for each in maps)
            is_end = of_one_place and set(module.kernel_size) == {1}
            if not is_first and not is_end:
                return
            call = _call(name, args, kwargs, output)
            seen.first = call if is_first else seen.first
            seen.ends += [call] if is_end else []

        return hook

    def note_linear(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if output.ndim == 2:
                seen.ends.append(_call(name, args, kwargs, output))

        return hook

    def note_plain(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = _first_of(args, kwargs)
            if all(isinstance(each, Tensor) and each.ndim == 2 for each in (given, output)):
                seen.plain.append(_call(name, args, kwargs, output))

        return hook

    hooks = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for kind, note in ((nn.Conv2d, note_convolution), (nn.Linear, note_linear))
        for name, module in layers_of(model, kind).items()
    ]
    hooks += [
        module.register_forward_hook(note_plain(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and not [*module.children(), *module.parameters(), *module.buffers()]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Call:
    given = _first_of(args, kwargs)
    # Copies, as the layer after it may write over them.
    return Call(name, given.clone() if isinstance(given, Tensor) else given, output.clone())


def _first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


class _Reached(Exception):  # noqa: N818  # no error
    """The first convolution was called; nothing after it needs to run."""


def _changes_the_image(model: str, convolution: str, when: str = "") -> InputError:
    return InputError(
        f"{model} changes the image{when} before its first convolution, {convolution!r}, so that "
        "encoders would not see it.\nDo that in the loader, such as standardising pixels; in "
        "torchvision's models it is transform_input=False."
    )


def _ends_with(model: nn.Module, seen: Seen, call: Call) -> bool:
    """Tell whether a layer's output is the model's, whatever it is: a mark comes out as it is."""
    if call.output.numel() != seen.output.numel():
        return False
    layer, size = model.get_submodule(call.name), call.output.numel()
    numbers = (1e3 * (torch.arange(size) - size / 2)).to(seen.image)  # of both signs
    failure: Exception | None = None
    for first in (float("nan"), float(numbers[0])):  # some refuse what is no number
        mark = torch.cat([numbers.new_tensor([first]), numbers[1:]]).reshape(call.output.shape)
        # A copy, as the layer after it may write over it.
        hook = layer.register_forward_hook(lambda *_, mark=mark: mark.clone())
        try:
            with torch.no_grad():
                found = model(seen.image)
        except Exception as error:  # anything may happen in somebody's forward pass
            failure = error
            continue
        finally:
            hook.remove()
        return isinstance(found, Tensor) and _is_same(found, mark.flatten(1))
    assert failure is not None
    if model.training:
        raise InputError(
            f"{seen.name} could not be run in training: {first_line(failure)}.\n"
            "If it has auxiliary outputs, build it without, as with aux_logits=False."
        ) from failure
    return False  # it looks at its logits


def _is_same(tensor: Any, expected: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.shape != expected.shape:
        return False
    return torch.equal(tensor.nan_to_num(), expected.nan_to_num())


def _check_named(
    model: nn.Module,
    given: str | None,
    kind: type[nn.Module] | tuple[type, ...],
    argument: str,
    wanted: str,
) -> None:
    known = layers_of(model, kind)
    if given is not None and given not in known:
        # Of a head, the linear layers before convolutions of any kind.
        names = [*layers_of(model, nn.Linear)] if argument == "head" else []
        names = names or [*known]
        raise InputError(
            f"{argument} {given!r} names no {wanted} of {type(model).__name__}.\n"
            f"There are: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}."
        )


def _check_plain(model: nn.Module, name: str, model_name: str) -> None:
    """Check that a layer's weights are its own parameters."""
    layer = model.get_submodule(name)
    if is_parametrized(layer) or "weight" not in dict(layer.named_parameters(recurse=False)):
        raise InputError(
            f"The layer {name!r} of {model_name} computes its weights from others, such as by "
            "weight or spectral normalisation.\nTake that off first: torch.nn.utils."
            "parametrize.remove_parametrizations, or remove_weight_norm of the older kind."
        )
    own = {id(parameter) for parameter in layer.parameters()}
    for other_name, other in model.named_modules():
        held = {id(parameter) for parameter in other.parameters(recurse=False)}
        if other is not layer and own & held:
            raise InputError(
                f"The layer {name!r} of {model_name} shares its weights with {other_name!r}; "
                "members would untie them.\nGive each a copy of its own first."
            )
