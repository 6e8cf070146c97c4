"""Optimizers by name, as functions that build fastai optimizers.

A name is one of `choices.OPTIMIZERS`, "torch/NAME" for any optimizer of torch.optim, or
"fastai/NAME" for any optimizer of fastai.optimizer. To add an optimizer, write a function like
those below and register it in `choices.OPTIMIZERS`.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import fastai.optimizer
import torch
from fastai.optimizer import OptimWrapper

from mixmo_fastai.config.choices import OPTIMIZERS, parse_optimizer
from mixmo_fastai.config.recipe import Optimizer
from mixmo_fastai.config.registered import resolve_registered
from mixmo_fastai.errors import InputError, nearest, parameter_names, unknown_option_error
from mixmo_fastai.learner.muon import Muon

OptimizerFactory = Callable[..., Any]
"""Function of parameters and learning rate that returns a fastai optimizer."""


def build_optimizer_factory(name: str, weight_decay: float, **options: Any) -> OptimizerFactory:
    """Return the function that builds an optimizer, for `opt_func` of a Learner.

    Args:
        name: name of the optimizer; see the module's docstring.
        weight_decay: weight decay of all parameters, as defined by the optimizer.
        options: keyword arguments of the optimizer, except for the learning rate.

    Raises:
        InputError: unknown name or option, or an optimizer that needs more than one forward pass
            per step.
    """
    library, library_name = parse_optimizer(name)
    if library == "torch":
        return from_torch(_find_in_torch(library_name), weight_decay=weight_decay, **options)
    if library == "fastai":
        build = _find_in_fastai(library_name)
        _check_options(name, build, options)
        return partial(build, wd=weight_decay, **options)
    build = resolve_registered("optimizer", library_name, OPTIMIZERS[library_name])
    _check_options(name, build, options)
    parameters = parameter_names(build)
    if parameters is not None and "weight_decay" not in parameters:
        raise InputError(
            f"{OPTIMIZERS[library_name]} must accept weight_decay, which every recipe passes."
        )
    factory: OptimizerFactory = build(weight_decay=weight_decay, **options)
    return factory


def optimizer_from_recipe(optimizer: Optimizer) -> OptimizerFactory:
    """Return the function that builds the optimizer of a recipe.

    Raises:
        InputError: as for `build_optimizer_factory`.
    """
    options = dict(optimizer.options)
    if optimizer.name == "sgd":
        options = {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    return build_optimizer_factory(optimizer.name, optimizer.weight_decay, **options)


def check_optimizer_settings(build: Callable[..., Any], lr: float) -> None:
    """Create an optimizer for one small parameter, to find invalid settings before training.

    Raises:
        InputError: the optimizer rejects its settings.
    """
    try:
        build([[torch.nn.Parameter(torch.zeros(2, 2))]], lr=lr)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"The optimizer rejects its settings: {error}.") from error


def sgd(
    momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 6e-4
) -> OptimizerFactory:
    """Return the published optimizer: torch's SGD with Nesterov momentum.

    Weight decay applies to all parameters, including those of BatchNorm; fastai's SGD excludes
    BatchNorm and has no Nesterov momentum.
    """
    return from_torch(
        torch.optim.SGD, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )


def adamw(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.05
) -> OptimizerFactory:
    """Return torch's AdamW (Loshchilov, Hutter, ICLR 2019)."""
    return from_torch(torch.optim.AdamW, betas=tuple(betas), eps=eps, weight_decay=weight_decay)


def muon(
    momentum: float = 0.95, weight_decay: float = 0.01, adam_ratio: float = 0.15
) -> OptimizerFactory:
    """Return Muon for weights of two or more dimensions, and Adam for all others."""
    return from_torch(Muon, momentum=momentum, weight_decay=weight_decay, adam_ratio=adam_ratio)


class TorchOptimizer(OptimWrapper):
    """fastai's wrapper of a torch optimizer, without settings that are None.

    fastai's TensorBoardCallback requires every setting to be a number.
    """

    @property
    def hypers(self) -> list[dict[str, Any]]:
        """Settings of each parameter group."""
        return [{k: v for k, v in group.items() if v is not None} for group in super().hypers]


def from_torch(kind: type[torch.optim.Optimizer], **settings: Any) -> OptimizerFactory:
    """Return a function that builds a torch optimizer for fastai; on a GPU, fused if supported.

    Raises:
        InputError: unknown setting, or `step` of the optimizer requires a closure.
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(
            f"from_torch needs a class of optimizers, such as torch.optim.AdamW; got {kind!r}."
        )
    name = f"torch/{kind.__name__}"
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"The optimizer {name} needs a closure for several forward passes per step; fastai "
            "computes one.\nUse an optimizer whose step() needs no closure."
        )
    has_decay = "weight_decay" in inspect.signature(kind).parameters
    if not has_decay and settings.pop("weight_decay", 0.0):
        raise InputError(
            f"The optimizer {name} has no weight decay.\nSet optimizer.weight_decay=0."
        )
    _check_options(name, kind, settings)
    return partial(TorchOptimizer, opt=partial(_build, kind), **settings)


def _build(
    kind: type[torch.optim.Optimizer], groups: Iterable[Any], **settings: Any
) -> torch.optim.Optimizer:
    groups = [*groups]
    parameters = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    if "fused" in inspect.signature(kind).parameters and all(p.is_cuda for p in parameters):
        settings["fused"] = True
    try:
        return kind(groups, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"The optimizer torch/{kind.__name__} rejects the settings {settings}:\n{error}."
        ) from error


def _find_in_torch(name: str) -> type[torch.optim.Optimizer]:
    """Find a class of torch.optim by its name, ignoring case."""
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    return known[_match_name(name, known, "torch")]


def _find_in_fastai(name: str) -> Callable[..., Any]:
    """Find a function of fastai.optimizer by its name, ignoring case."""
    known = {
        key: value
        for key, value in vars(fastai.optimizer).items()
        if inspect.isfunction(value)
        and {"params", "lr", "wd"} <= inspect.signature(value).parameters.keys()
    }
    return known[_match_name(name, known, "fastai")]


def _match_name(name: str, known: Iterable[str], library: str) -> str:
    """Return the known name that equals `name`, ignoring case."""
    by_lowercase = {known_name.lower(): known_name for known_name in known}
    if name.lower() not in by_lowercase:
        guess = nearest(name, by_lowercase.values())
        hint = f" Did you mean '{library}/{guess}'?" if guess else ""
        allowed = ", ".join(sorted(by_lowercase.values()))
        raise InputError(f"{library} has no optimizer {name!r}.{hint}\nAllowed: {allowed}.")
    return by_lowercase[name.lower()]


def _check_options(name: str, build: Callable[..., Any], options: Iterable[str]) -> None:
    if (parameters := parameter_names(build)) is None:
        return
    allowed = [parameter for parameter in parameters if parameter not in _NOT_OPTIONS]
    for option in options:
        if option not in parameters:
            raise unknown_option_error(f"The optimizer {name}", option, allowed, cutoff=0.5)


_NOT_OPTIONS = ("self", "params", "lr", "wd", "weight_decay")
_sgd = partial(_build, torch.optim.SGD)  # its name in Learners exported by version 0.1.0
