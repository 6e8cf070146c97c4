"""Imports on first use, and modules of version 0.1.0 under their former names."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOT = "mixmo_fastai"

MOVED = {
    "augment": "data.augment",
    "averaging": "callbacks.ema",
    "base_losses": "mixing.base_losses",
    "callback": "callbacks.mixmo",
    "data.expansion": "data.repeat",
    "deferred": "callbacks.deferred",
    "distributed": "learner.distributed",
    "epochs": "callbacks.epoch",
    "learner_checks": "callbacks.checks",
    "losses": "mixing.loss",
    "msda": "mixing.msda",
    "muon": "learner.muon",
    "names": "config.choices",
    "optimizers": "learner.optimizers",
    "pairing": "mixing.pairing",
    "parameter_groups": "learner.parameter_groups",
    "per_sample": "mixing.per_sample",
    "processes": "runtime.processes",
    "randomness": "rng",
    "recipe": "config.recipe",
    "recording": "training.history",
    "selection": "callbacks.best_epoch",
}
"""Modules of version 0.1.0 that exported Learners and programs refer to: their present names."""


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Define names of a package whose modules are imported when a name is first used.

    Args:
        package: `__name__` of the package.
        modules: for each name, the module that defines it, relative to `mixmo_fastai`.

    Returns:
        `__getattr__` and `__dir__` of the package.
    """

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{ROOT}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})


class FormerModules:
    """Import a module of version 0.1.0 under its former name, as pickled Learners do.

    It does not inherit from `importlib.abc`, whose import would double that of this package.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module that has moved; None for all others."""
        if fullname.removeprefix(f"{ROOT}.") not in MOVED:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None, which means a new module."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the names of the present module."""
        present = import_module(f"{ROOT}.{MOVED[module.__name__.removeprefix(f'{ROOT}.')]}")
        for name, value in vars(present).items():
            if not name.startswith("__"):
                setattr(module, name, value)


def find_former_modules() -> None:
    """Let Python find moved modules, after it found no module of that name."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(FormerModules())
