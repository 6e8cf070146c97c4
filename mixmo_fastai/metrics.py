"""fastai metrics of a network with several members."""

from functools import partial
from typing import Any

import torch
from fastai.learner import Metric
from torch import Tensor

from mixmo_fastai.callback import unwrap


class MemberAccuracy(Metric):
    """Mean accuracy of the members on their own, from the forward pass of the ensemble.

    The heads' outputs are caught where they are made, so it costs no second forward pass. Ensemble
    figures are those of fastai's ordinary metrics.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._outputs: dict[int, Tensor] = {}

    def reset(self) -> None:
        """Begin a new pass."""
        self._release()
        self.num_right, self.num_seen = 0.0, 0

    def accumulate(self, learn: Any) -> None:
        """Add one batch."""
        if not self._hooks:  # the first batch of a pass was computed before there were hooks
            logits = unwrap(learn.model).member_logits(*learn.xb)
            self._watch(unwrap(learn.model))
        else:
            logits = torch.stack([self._outputs[i] for i in sorted(self._outputs)], dim=1)
        right = logits.argmax(dim=2) == learn.y[:, None]  # (B, M)
        self.num_right += right.float().mean(dim=1).sum().item()
        self.num_seen += len(right)

    @property
    def value(self) -> float | None:
        """The accuracy in [0, 1], or None before any batch."""
        self._release()
        return self.num_right / self.num_seen if self.num_seen else None

    @property
    def name(self) -> str:
        """The heading of its column."""
        return "member_accuracy"

    def _watch(self, network: Any) -> None:
        self._hooks = [
            head.register_forward_hook(partial(self._catch, i))
            for i, head in enumerate(network.heads)
        ]

    def _catch(self, index: int, module: Any, args: Any, output: Tensor) -> None:
        self._outputs[index] = output

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._outputs = [], {}


member_accuracy = MemberAccuracy
