"""Checks of the parts of a `MixMoModel`: encoders, core, heads, and their saved weights."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mixmo_fastai.errors import InputError


def check_core_output(embedding: Tensor, head: nn.Module) -> None:
    """Check that the heads can read the output of the core.

    Example:
        >>> check_core_output(torch.zeros(4, 64), nn.Linear(64, 10))
        >>> check_core_output(torch.zeros(4, 32), nn.Linear(64, 10))
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: The core returned (4, 32); the heads need (B, 64)...
    """
    width = getattr(head, "in_features", None)
    if embedding.ndim != 2 or (isinstance(width, int) and embedding.shape[1] != width):
        raise InputError(
            f"The core returned {tuple(embedding.shape)}; the heads need (B, "
            f"{'features' if width is None else width}).\n"
            "End the core with pooling and nn.Flatten(), and give the heads its number of features."
        )


def separate_modules(name: str, modules: Any) -> list[nn.Module]:
    """Check that members do not share a module.

    Example:
        >>> head = nn.Linear(64, 10)
        >>> separate_modules("heads", [head, nn.Linear(64, 10)])[0] is head
        True
        >>> separate_modules("heads", [head, head])
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: heads must be separate modules; ...
    """
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList | nn.Sequential):
        raise InputError(f"{name} must be a list of modules, one per member; got one module.")
    separate = [*modules]
    for module in separate:
        if not isinstance(module, nn.Module):
            raise InputError(f"{name} must be modules; got {module!r}.")
    if len({id(module) for module in separate}) < len(separate):
        raise InputError(
            f"{name} must be separate modules; the same module is given more than once, so that "
            "members would share its weights.\n"
            "Build each one: [make() for _ in range(2)] instead of [make()] * 2."
        )
    return separate


def check_num_members(names: Iterable[str], num_members: int) -> None:
    """Check that saved tensors are those of a network with as many members.

    Args:
        names: names of the tensors; those of another network than a `MixMoModel` are not checked.
        num_members: M of the network that loads them.

    Raises:
        InputError: their number of members differs.

    Example:
        >>> check_num_members(["encoders.0.weight", "encoders.1.weight"], num_members=2)
        >>> check_num_members(["encoders.0.weight", "encoders.1.weight"], num_members=3)
        Traceback (most recent call last):
        mixmo_fastai.errors.InputError: These weights are those of 2 members; the network has 3...
    """
    members = {name.split(".")[1] for name in names if name.startswith(("encoders.", "heads."))}
    if members and len(members) != num_members:
        raise InputError(
            f"These weights are those of {len(members)} members; the network has {num_members}.\n"
            f"Build it with num_members={len(members)}."
        )
