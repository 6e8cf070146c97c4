"""torch optimizers for fastai's Learner."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from fastai.optimizer import OptimWrapper


def sgd(momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 6e-4) -> partial[Any]:
    """Return fastai's `opt_func` for the published optimizer: torch's SGD with Nesterov momentum.

    Weight decay applies to all parameters, including BatchNorm's. fastai's own SGD excludes those
    and has no Nesterov momentum.
    """
    return partial(
        TorchOptimizer,
        opt=_sgd,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )


class TorchOptimizer(OptimWrapper):
    """fastai's wrapper of a torch optimizer, without hyperparameters that are None.

    fastai's TensorBoardCallback assumes that every hyperparameter is a number.
    """

    @property
    def hypers(self) -> list[dict[str, Any]]:
        """Hyperparameters of each parameter group."""
        return [{k: v for k, v in group.items() if v is not None} for group in super().hypers]


def _sgd(groups: Iterable[Any], **settings: Any) -> torch.optim.SGD:
    """Build torch's optimizer, with fused kernels if all parameters are on a GPU."""
    groups = [*groups]
    parameters = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    on_gpu = all(p.is_cuda for p in parameters)
    return torch.optim.SGD(groups, fused=True if on_gpu else None, **settings)
