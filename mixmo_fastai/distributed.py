"""One training in several processes, each with its share of every batch.

A run is what its recipe says, however many processes train it: all draw alike for the whole batch,
and each takes its positions of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.learner import AvgLoss, AvgMetric, Learner

from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics import MemberAccuracy
from mixmo_fastai.models.ghost_norm import GhostBatchNorm2d
from mixmo_fastai.models.synced_norm import sync_batch_norm
from mixmo_fastai.processes import gathered, group


class SummedMetrics(Callback):
    """Let fastai's averages count what all processes have seen."""

    order = 45  # before the Recorder reads them

    def after_validate(self) -> None:
        """Add up over the processes."""
        for metric in self.learn.recorder._valid_mets:
            for name, value in zip(_sums_of(metric), _added_up(metric), strict=True):
                setattr(metric, name, value)


def _sums_of(metric: Any) -> tuple[str, str]:
    if isinstance(metric, AvgMetric | AvgLoss):
        return "total", "count"
    if isinstance(metric, MemberAccuracy):
        return "num_correct", "num_seen"
    raise InputError(f"The metric {metric.name!r} cannot be added up over processes.")


def _added_up(metric: Any) -> list[float]:
    own = [float(getattr(metric, name)) for name in _sums_of(metric)]
    return [sum(values) for values in zip(*gathered(own), strict=True)]


@contextmanager
def shared(learn: Learner) -> Iterator[Learner]:
    """Train a Learner of this package's loaders in all processes that have joined.

    As fastai's `distrib_ctx`, for loaders that share their batches themselves, on GPUs and CPUs.
    BatchNorm is over the batch of all processes, unless it is in ghost batches.
    """
    if group().count == 1:
        yield learn
        return
    trainer = _make_trainer(learn)
    learn.add_cbs([trainer, SummedMetrics()])
    try:
        yield learn
    finally:
        learn.remove_cbs([trainer, *learn.cbs.filter(lambda cb: isinstance(cb, SummedMetrics))])


def _make_trainer(learn: Learner) -> Callback:
    from accelerate import DistributedDataParallelKwargs
    from fastai.distributed import DistributedTrainer  # needs accelerate

    class SharedTrainer(DistributedTrainer):
        """fastai's, whose loaders are left to share their images themselves."""

        name = "distributed_trainer"

        def _wrap_dl(self, dl: Any) -> Any:
            return dl

        def before_validate(self) -> None:
            """Show this process its part of the validation images, to one and the same network."""
            for buffer in self.learn.model.buffers():  # of ghost batches each has moved its own
                dist.broadcast(buffer, src=0)
            self.learn.dl = self.learn.dl.share(group())

    on_gpu = torch.device(learn.dls.device).type == "cuda"
    has_ghosts = any(isinstance(m, GhostBatchNorm2d) for m in learn.model.modules())
    if not on_gpu and not has_ghosts:
        sync_batch_norm(learn.model)
    # Precision is the recipe's, whatever a launcher says; and a process without validation images
    # must not be waited for there.
    alike = DistributedDataParallelKwargs(broadcast_buffers=False)
    return SharedTrainer(
        sync_bn=on_gpu and not has_ghosts,
        cpu=not on_gpu,
        mixed_precision="no",
        kwargs_handlers=[alike],
    )
