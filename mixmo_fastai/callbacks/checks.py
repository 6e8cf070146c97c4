"""Checks that a Learner can train a MixMo network; each error says what to do."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from fastai.optimizer import OptimWrapper

from mixmo_fastai.errors import InputError
from mixmo_fastai.runtime.text import counted


def check_batch(num_inputs: int, num_targets: int) -> None:
    """Check that batches hold one input and one target.

    Raises:
        InputError: they hold more or fewer.
    """
    if num_inputs == num_targets == 1:
        return
    if num_inputs > 1:
        advice = (
            "Networks of several inputs are not supported. Join images of one size in one tensor "
            "(n, C, H, W), as additional channels"
        )
    elif num_targets > 1:
        advice = (
            "Train a Learner for each target, or join the targets in one tensor, as "
            "RegressionBlock(2) and MultiCategoryBlock do"
        )
    else:
        advice = "Pass loaders of pairs, such as (image, label)"
    raise InputError(
        "Batches must have one input and one target; the loader yields "
        f"{counted(num_inputs, 'input')} and {counted(num_targets, 'target')}.\n{advice}."
    )


def count_inputs_and_targets(dls: Any, batch: Any) -> tuple[int, int]:
    """Count the inputs and targets of a batch as fastai's Learner does."""
    parts = len(batch) if isinstance(batch, list | tuple) else 1
    num_inputs = getattr(dls, "n_inp", 1 if parts == 1 else parts - 1)
    return min(num_inputs, parts), max(0, parts - num_inputs)


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Check that callbacks, or classes of callbacks, include none of fastai's Mix callbacks.

    Raises:
        InputError: one of them is a Mix callback.
    """
    for callback in callbacks:
        callback_class = callback if isinstance(callback, type) else type(callback)
        if _is_fastai_mix(callback_class):
            name = callback_class.__name__
            kinds = [kind for kind in ("mixup", "cutmix") if kind == name.lower()]
            hint = f" To mix pixels within each member, use msda={kinds[0]!r}." if kinds else ""
            raise InputError(
                f"fastai's {name} cannot be combined with MixMoCallback: both replace the targets."
                f"\nRemove it: learn.remove_cb({name}).{hint}"
            )


def check_opt_func(opt_func: Any) -> None:
    """Check that `opt_func` is a function that creates an optimizer, not an optimizer.

    Raises:
        InputError: it is an optimizer, a class of torch, or not a function.
    """
    if isinstance(opt_func, type) and issubclass(opt_func, torch.optim.Optimizer):
        raise InputError(
            f"opt_func must create an optimizer of fastai; got the class {opt_func.__name__} of "
            "torch.\n"
            f"Wrap it: opt_func=from_torch({opt_func.__name__}), from "
            "mixmo_fastai.learner.optimizers."
        )
    if opt_func is not None and not callable(opt_func):
        raise InputError(
            f"opt_func must be a function that creates an optimizer; got {opt_func!r}.\n"
            "Functions: Adam of fastai.optimizer, or sgd() of mixmo_fastai.learner.optimizers."
        )
    is_optimizer = isinstance(opt_func, OptimWrapper) or hasattr(opt_func, "param_groups")
    if is_optimizer and not isinstance(opt_func, type):
        raise InputError(
            "opt_func must be a function that creates an optimizer; got an optimizer, which has "
            "the parameters of\nthe network before its conversion. Pass e.g. "
            "partial(OptimWrapper, opt=torch.optim.AdamW)."
        )


def check_optimizer(learn: Any) -> None:
    """Check that the optimizer trains the Learner's current network, not a previous one.

    Raises:
        InputError: the optimizer holds no parameter of the network.
    """
    optimizer = getattr(learn, "opt", None)
    if optimizer is None:  # a preview of the batches does not train
        return
    trained = {id(each[0]) for each in optimizer.all_params()}
    if not any(id(parameter) in trained for parameter in learn.model.parameters()):
        raise InputError(
            "The Learner's optimizer holds no parameter of its model: it was created for another.\n"
            "Call learn.create_opt() to create a new one, or convert with to_mixmo(learn)."
        )


def _is_fastai_mix(callback_class: type) -> bool:
    # Importing this fastai module also imports fastai.tabular and would double the start-up time;
    # if it is not imported, none of its callbacks can exist.
    module = sys.modules.get("fastai.callback.mixup")
    return module is not None and issubclass(callback_class, module.MixHandler)
