"""Convert the state of any optimizer to named tensors, and back.

An optimizer of torch or fastai keeps a dictionary per parameter. Tensors and numbers in it are
stored as `parameter/key`; the name of a Python number ends with its type. Momentum buffers are
stored under the name of the parameter alone, as in version 0.1.0.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from fastai.optimizer import Lookahead, Optimizer, average_grad, average_sqr_grad, step_stat
from torch import Tensor, nn

from mixmo_fastai.errors import InputError

MOMENTUM, SLOW, COUNT = "momentum_buffer", "slow_weights", "count"
_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}


def optimizer_tensors(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Collect the state of an optimizer as tensors.

    Args:
        optimizer: fastai optimizer, or fastai's wrapper of a torch optimizer.
        parameters: parameters of the network, by name.

    Raises:
        InputError: the state holds something other than tensors and numbers.
    """
    tensors: dict[str, Tensor] = {}
    state = _state_of(optimizer)
    for name, parameter in parameters.items():
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[name if key == MOMENTUM else f"{name}/{key}"] = value
            elif value is not None:
                kind = type(value).__name__
                if kind not in _NUMBERS:
                    raise InputError(
                        f"The optimizer keeps {key!r} of type {kind}, which checkpoints cannot "
                        "hold.\nUse another optimizer, or one whose state is tensors and numbers."
                    )
                tensors[f"{name}/{key}:{kind}"] = torch.tensor(value, dtype=_NUMBERS[kind][1])
    if isinstance(optimizer, Lookahead) and optimizer.slow_weights is not None:
        for name, slow in _slow_weights(optimizer, parameters).items():
            tensors[f"{name}/{SLOW}"] = slow
        tensors[COUNT] = torch.tensor(optimizer.count)
    return tensors


def restore_optimizer(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Load the tensors of `optimizer_tensors` into an optimizer.

    Raises:
        ValueError: a tensor belongs to another network or optimizer; the message names it.
    """
    state, is_fused = _state_of(optimizer), _is_fused(optimizer)
    saved_slow: dict[str, Tensor] = {}
    for full_name, value in tensors.items():
        if full_name == COUNT and isinstance(optimizer, Lookahead):
            optimizer.count = int(value)
            continue
        name, _, key = full_name.rpartition("/") if "/" in full_name else (full_name, "", MOMENTUM)
        if name not in parameters:
            raise ValueError(full_name)
        parameter = parameters[name]
        key, _, kind = key.partition(":")
        if kind:
            if kind not in _NUMBERS or value.ndim or value.dtype != _NUMBERS[kind][1]:
                raise ValueError(full_name)
            state[parameter][key] = _NUMBERS[kind][0](value.item())
        elif key in (MOMENTUM, SLOW) and (value.shape, value.dtype) != (
            parameter.shape,
            parameter.dtype,
        ):
            raise ValueError(full_name)
        elif key == SLOW:
            saved_slow[name] = value
        else:
            state[parameter][key] = _on_device(value, parameter, is_fused)
    if saved_slow:
        if not isinstance(optimizer, Lookahead):
            raise ValueError(f"{min(saved_slow)}/{SLOW}")
        optimizer._copy_weights()
        slow_weights = _slow_weights(optimizer, parameters)
        if odd := slow_weights.keys() ^ saved_slow.keys():
            raise ValueError(f"{min(odd)}/{SLOW}")
        for name, slow in slow_weights.items():
            slow.copy_(saved_slow[name])


def check_complete(
    optimizer: Any,
    trained: Collection[str],
    tensors: Mapping[str, Tensor],
    hypers: Collection[Mapping[str, float]],
) -> None:
    """Check that the state of an optimizer covers either all trained parameters or none.

    Args:
        optimizer: fastai optimizer, or fastai's wrapper of a torch optimizer.
        trained: names of the parameters that are trained.
        tensors: the output of `optimizer_tensors`.
        hypers: hyperparameters of each parameter group at the last step; empty before the first.

    Raises:
        ValueError: a parameter is missing or has a state before the first step; the message names
            it.
    """
    split = (name.rpartition("/") for name in tensors)
    kept = {parameter or key for parameter, _, key in split if key not in _FASTAI_FLAGS}
    if kept and not hypers:
        raise ValueError(min(kept))
    missing = {*trained} - kept
    if missing and (kept or (hypers and _must_keep_state(optimizer, hypers))):
        raise ValueError(min(missing))


def _must_keep_state(optimizer: Any, hypers: Iterable[Mapping[str, float]]) -> bool:
    """Check whether an optimizer certainly has state after a step.

    SGD without momentum has none; torch's SGD may have some if the momentum was not 0 before.
    Optimizers of other packages are not known.
    """
    if isinstance(optimizer, Lookahead):
        return True
    if isinstance(optimizer, Optimizer):
        return any(step in _STATEFUL_STEPS for step in optimizer.cbs)
    inner = getattr(optimizer, "opt", None)
    if isinstance(inner, torch.optim.SGD):
        return any(group.get("mom") for group in hypers)
    return type(inner).__module__.startswith(_KNOWN_PACKAGES)


_FASTAI_FLAGS = ("do_wd:bool", "force_train:bool")
"""Kept for biases and the parameters of BatchNorm, by optimizers without state too."""
_STATEFUL_STEPS = (average_grad, average_sqr_grad, step_stat)
_KNOWN_PACKAGES = ("torch.optim", "mixmo_fastai")


def _state_of(optimizer: Any) -> Any:
    if isinstance(optimizer, Lookahead):
        return optimizer.opt.state
    return getattr(optimizer, "opt", optimizer).state


def _is_fused(optimizer: Any) -> bool:
    groups = getattr(getattr(optimizer, "opt", None), "param_groups", ())
    return any(group.get("fused") or group.get("capturable") for group in groups)


def _on_device(value: Tensor, parameter: Tensor, is_fused: bool) -> Tensor:
    """Copy a value to the device on which the optimizer keeps it."""
    if value.shape == parameter.shape and value.ndim:
        # In the layout of the parameter, which fused optimizers require.
        copied = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        return copied.copy_(value)
    if value.ndim == 0 and not is_fused:
        return value.clone()  # step counters stay on the CPU
    return value.to(parameter.device, copy=True)


def _slow_weights(
    optimizer: Lookahead, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the slow weights of a lookahead optimizer by the names of the parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = zip(optimizer.param_lists, optimizer.slow_weights, strict=True)
    return {
        names[id(parameter)]: slow
        for group, slow_group in groups
        for parameter, slow in zip(group, slow_group, strict=True)
    }
