"""Distributed training: the process group, and communication between its processes."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runtime.launcher import launcher_number

TIMEOUT = timedelta(minutes=30)
"""How long to wait for another process before it counts as lost."""


class Processes(NamedTuple):
    """Rank and size of the process group.

    Attributes:
        rank: rank of this process.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0


def launched_processes() -> Processes:
    """Return rank and world size as set by a launcher such as torchrun; (0, 1) without one.

    Raises:
        InputError: one of them is no number.
    """
    return Processes(launcher_number("RANK"), max(1, launcher_number("WORLD_SIZE")))


@contextmanager
def joined_process_group(device: torch.device) -> Iterator[Processes]:
    """Initialize the process group for the duration of a with block; no-op for one process.

    Args:
        device: the kind of device that each process uses.

    Raises:
        InputError: a package is missing, there are too few GPUs, or a variable of the launcher is
            missing or no number.
        RunFailedError: another process was lost.
    """
    processes = launched_processes()
    if processes.count == 1:
        yield processes
        return
    if find_spec("accelerate") is None:
        raise InputError(
            "Distributed training needs accelerate.\n"
            "Install it: pip install 'mixmo-fastai[distributed]'"
        )
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "WORLD_SIZE is set but LOCAL_RANK is not.\n"
            "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    on_gpu = device.type == "cuda"
    if on_gpu:
        local_rank = launcher_number("LOCAL_RANK")
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"Process {local_rank} of this machine has no GPU: it has "
                f"{torch.cuda.device_count()}.\nStart one process per GPU."
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        # Each returns when it is connected itself; if one then ended, others could still fail to.
        dist.all_reduce(torch.zeros(1))
        yield processes
    except RuntimeError as error:
        if isinstance(error, RunFailedError) or not (lost := _CONNECTION_LOST.search(str(error))):
            raise
        raise RunFailedError(
            f"Another training process was lost: {lost[0]}.\n"
            "Existing checkpoints are unchanged. Start all processes again with --resume."
        ) from error
    finally:
        dist.destroy_process_group()


_CONNECTION_LOST = re.compile(
    r"Connection (closed|reset|refused)[\w ]*|Broken pipe|[Tt]imed out|Timeout|timeout|"
    r"NCCL error|remote process exited|Socket"
)


joined = joined_process_group  # its name in version 0.1.0


def process_group() -> Processes:
    """Return rank and size of the process group; (0, 1) if none is initialised."""
    if not dist.is_available() or not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


def broadcast_from_rank0(value: Any) -> Any:
    """Return the value of rank 0 in all processes."""
    if process_group().count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def run_on_rank0(action: Callable[[], Any]) -> Any:
    """Call a function on rank 0 only, and broadcast its result or its error.

    Returns:
        the result, in all processes.

    Raises:
        InputError, RunFailedError: raised by the function; in all processes.
    """
    result, error = None, None
    if process_group().is_rank0:
        try:
            result = action()
        except (InputError, RunFailedError) as raised:
            error = raised
    result, error = broadcast_from_rank0((result, error))
    if error is not None:
        raise error
    return result


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    count = process_group().count
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


@contextmanager
def rank0_first() -> Iterator[None]:
    """Run a with block on rank 0 before the other processes enter it, for example to fill a cache.

    If the block raises on rank 0, the other processes still enter it, and raise the same error.
    """
    group = process_group()
    if group.count > 1 and not group.is_rank0:
        dist.barrier()
    try:
        yield
    finally:
        if group.count > 1 and group.is_rank0:
            dist.barrier()


class RequestExchange:
    """Let all processes act on a request at the same step, whichever process made it.

    Every process passes its requests at every step. The maximum over processes is reduced
    asynchronously and returned at the next step, so that no step waits for communication. With a
    single process, requests take effect immediately.
    """

    def __init__(self) -> None:
        self.pending: tuple[Tensor, Any] | None = None
        self.gloo_group = None
        if process_group().count > 1:
            self.gloo_group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def exchange(self, *requests: int) -> tuple[int, ...]:
        """Send requests; return the maximum over processes of those sent one step before."""
        if self.gloo_group is None:
            return requests
        previous = self._receive() or (0,) * len(requests)
        message = torch.tensor(requests)
        work = dist.all_reduce(message, dist.ReduceOp.MAX, group=self.gloo_group, async_op=True)
        self.pending = message, work
        return previous

    def exchange_now(self, *requests: int) -> tuple[int, ...]:
        """Send requests; return the maximum of these and of those one step before. Blocks."""
        if self.gloo_group is None:
            return requests
        previous = self._receive() or (0,) * len(requests)
        self.exchange(*requests)
        current = self._receive()
        assert current is not None
        return tuple(max(pair) for pair in zip(previous, current, strict=True))

    def _receive(self) -> tuple[int, ...] | None:
        """Wait for the pending reduction and return its result; None if nothing is pending."""
        if self.pending is None:
            return None
        (message, work), self.pending = self.pending, None
        work.wait()
        return tuple(message.tolist())
