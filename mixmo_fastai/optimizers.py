"""Optimizers of torch as fastai takes them."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from fastai.optimizer import OptimWrapper


def sgd(momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 6e-4) -> partial[Any]:
    """Give fastai the published optimizer: torch's SGD with Nesterov's momentum.

    Its decay reaches all parameters, BatchNorm's included; fastai's own SGD spares those and has no
    Nesterov.
    """
    return partial(
        TorchOptimizer,
        opt=_sgd,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )


class TorchOptimizer(OptimWrapper):
    """fastai's wrapper of an optimizer of torch, without the settings that torch leaves at None.

    fastai's TensorBoardCallback takes every setting for a number.
    """

    @property
    def hypers(self) -> list[dict[str, Any]]:
        """Settings of each group of parameters."""
        return [{k: v for k, v in own.items() if v is not None} for own in super().hypers]


def _sgd(groups: Iterable[Any], **settings: Any) -> torch.optim.SGD:
    """Make torch's optimizer, in one kernel for all parameters where they lie on a GPU."""
    groups = [*groups]
    parameters = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    on_gpu = all(p.is_cuda for p in parameters)
    return torch.optim.SGD(groups, fused=True if on_gpu else None, **settings)
