"""What a Learner must be like to train a MixMo network, each with what to do when it is not."""

import sys
from collections.abc import Iterable
from typing import Any

from fastai.optimizer import OptimWrapper

from mixmo_fastai.errors import InputError


def check_batch(num_inputs: int, num_targets: int) -> None:
    """Check that batches hold one input and one target.

    Raises:
        InputError: they hold more or less.
    """
    if num_inputs == num_targets == 1:
        return
    if num_inputs > 1:
        advice = "Join the inputs in one tensor (n, C, H, W), such as images as more channels"
    elif num_targets > 1:
        advice = (
            "Train a Learner for each target, or join them in one tensor, as RegressionBlock(2) "
            "and MultiCategoryBlock do"
        )
    else:
        advice = "Give loaders of pairs, such as (image, label)"
    raise InputError(
        "MixMo needs batches of one input and one target; the loader gives "
        f"{_counted(num_inputs, 'input')} and {_counted(num_targets, 'target')}.\n{advice}."
    )


def count_parts(dls: Any, batch: Any) -> tuple[int, int]:
    """Count the inputs and targets of a batch as fastai's Learner does."""
    parts = len(batch) if isinstance(batch, list | tuple) else 1
    num_inputs = getattr(dls, "n_inp", 1 if parts == 1 else parts - 1)
    return min(num_inputs, parts), max(0, parts - num_inputs)


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Check that no Mix callback of fastai's is among callbacks, or among classes of them.

    Raises:
        InputError: there is one.
    """
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if _is_fastai_mix(kind):
            name = kind.__name__
            kinds = [kind for kind in ("mixup", "cutmix") if kind == name.lower()]
            hint = f" For the same within each member: msda={kinds[0]!r}." if kinds else ""
            raise InputError(
                f"fastai's {name} cannot be combined with MixMoCallback: both replace the targets."
                f"\nRemove it: learn.remove_cb({name}).{hint}"
            )


def check_opt_func(opt_func: Any) -> None:
    """Check that the optimizer can be made for the parameters of a new network.

    Raises:
        InputError: it is made already.
    """
    made = isinstance(opt_func, OptimWrapper) or hasattr(opt_func, "param_groups")
    if made and not isinstance(opt_func, type):
        raise InputError(
            "opt_func is an optimizer already, of the parameters of the network before its "
            "conversion.\nGive a function that makes one: partial(OptimWrapper, "
            "opt=torch.optim.AdamW)."
        )


def check_optimizer(learn: Any) -> None:
    """Check that what is trained is the network, not one that was there before.

    Raises:
        InputError: the optimizer holds no parameter of the network.
    """
    optimizer = getattr(learn, "opt", None)
    if optimizer is None:  # it is only looked at what training would see
        return
    trained = {id(each[0]) for each in optimizer.all_params()}
    if not any(id(parameter) in trained for parameter in learn.model.parameters()):
        raise InputError(
            "The Learner's optimizer holds no parameter of its model: it is of the model before.\n"
            "Make it anew: learn.create_opt(). Or let to_mixmo(learn) do all of it."
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_fastai_mix(kind: type) -> bool:
    # Importing fastai's module, which brings its tabular part along, would double the start-up;
    # where nobody has imported it, nobody has one of its callbacks.
    module = sys.modules.get("fastai.callback.mixup")
    return module is not None and issubclass(kind, module.MixHandler)
