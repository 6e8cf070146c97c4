"""Distributed training: each process trains on its shard of every batch.

The result does not depend on the number of processes: all processes make the same random draws for
the whole batch, and each takes its own positions of that batch. MSDA, transforms of whole batches,
ghost batches, and losses with class weights or ignored targets are the exceptions; see
docs/distributed.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.learner import AvgLoss, AvgMetric, Learner
from torch import Tensor

from mixmo_fastai.data.loaders import BatchLoader
from mixmo_fastai.errors import InputError
from mixmo_fastai.metrics.fastai import StreamingMetric
from mixmo_fastai.models.ghost_norm import GhostBatchNorm2d
from mixmo_fastai.models.synced_norm import sync_batch_norm, sync_on_gpu
from mixmo_fastai.runtime.processes import all_gather, process_group


class SummedMetrics(Callback):
    """Sum fastai's validation averages over all processes."""

    order = 45  # before the Recorder reads them

    def after_validate(self) -> None:
        """Replace the sums of each metric by their totals over processes."""
        for metric in self.learn.recorder._valid_mets:
            for name, value in zip(_sum_names(metric), _reduced_sums(metric), strict=True):
                setattr(metric, name, value)


def _sum_names(metric: Any) -> tuple[str, str]:
    """Return the names of the attributes of a metric that are sums over samples."""
    if isinstance(metric, AvgMetric | AvgLoss):
        return "total", "count"
    if isinstance(metric, StreamingMetric):
        return "sums", "num_seen"
    raise InputError(
        f"The metric {metric.name!r} cannot be summed over processes.\n"
        "Use AvgMetric, AvgLoss or a StreamingMetric, or train in one process."
    )


def _reduced_sums(metric: Any) -> list[float | Tensor]:
    """Return the totals of a metric's sums over all processes: numbers, or tensors on the CPU."""
    local_sums = [_on_host(getattr(metric, name)) for name in _sum_names(metric)]
    return [sum(values) for values in zip(*all_gather(local_sums), strict=True)]


def _on_host(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor) and value.ndim:
        return value.cpu()
    return float(value)  # also before the first batch, when sums have no shape yet


@contextmanager
def shared(learn: Learner) -> Iterator[Learner]:
    """Train a Learner with this package's loaders in all processes of the process group.

    Like fastai's `distrib_ctx`, for loaders that shard their batches themselves, on GPUs and CPUs.
    BatchNorm statistics are synchronised over all processes, unless the network uses ghost batches.

    Raises:
        InputError: the loaders are not those of this package.
    """
    other = next((dl for dl in learn.dls.loaders if not isinstance(dl, BatchLoader)), None)
    if other is not None:
        raise InputError(
            f"shared needs the loaders of make_dataloaders; the Learner has {type(other).__name__}."
            "\nFor fastai's loaders, use learn.distrib_ctx(), which needs GPUs."
        )
    if process_group().count == 1:
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

    class ShardedTrainer(DistributedTrainer):
        """fastai's trainer for loaders that shard their images themselves."""

        name = "distributed_trainer"

        def _wrap_dl(self, dl: Any) -> Any:
            return dl

        def before_validate(self) -> None:
            """Validate identical networks, each process on its shard of the images."""
            for buffer in self.learn.model.buffers():  # ghost statistics differ between processes
                dist.broadcast(buffer, src=0)
            self.learn.dl = self.learn.dl.shard(process_group())

    on_gpu = torch.device(learn.dls.device).type == "cuda"
    if not any(isinstance(module, GhostBatchNorm2d) for module in learn.model.modules()):
        learn.model = sync_on_gpu(learn.model) if on_gpu else sync_batch_norm(learn.model)
    # The recipe sets the precision, so a launcher's setting is overridden. Without buffer
    # broadcasts, no forward pass waits for a process that has no validation images.
    ddp_kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
    return ShardedTrainer(
        sync_bn=False,  # fastai's would drop the activations in layers such as timm's
        cpu=not on_gpu,
        mixed_precision="no",
        kwargs_handlers=[ddp_kwargs],
    )
